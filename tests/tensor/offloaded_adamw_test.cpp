#include "torch_ext/tensor/offloaded_adamw.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/temp_dir.h"
#include "torch_ext/optim/adamw_update.h"

namespace torch_ext {
namespace {

using torch::optim::OptimizerParamGroup;

constexpr std::uint64_t kBudget = std::uint64_t{256} << 10;

/// Parameters that are also trained by PyTorch's kernel, in memory.
class OffloadedAdamWTest : public testing::Test {
 protected:
  struct InMemory {
    at::Tensor parameter, exp_avg, exp_avg_sq, step;
  };

  static OffloadedAdamWOptions options(double lr = 1e-3) {
    return OffloadedAdamWOptions(lr);
  }

  StateOptions offload() const {
    return {.nvme_path = temp_.path(), .host_memory = kBudget};
  }

  std::vector<at::Tensor> make(const std::vector<std::int64_t>& sizes) {
    std::vector<at::Tensor> made;
    for (const std::int64_t size : sizes) {
      made.push_back(at::randn({size}));
      in_memory_.push_back({made.back().clone(), at::zeros({size}),
                            at::zeros({size}), at::zeros({})});
      made.back().requires_grad_(true);
      parameters_.push_back(made.back());
    }
    return made;
  }

  /// New gradients, and a step in memory with `options`.
  void step_in_memory(std::size_t first, std::size_t last,
                      const OffloadedAdamWOptions& options) {
    for (std::size_t i = first; i < last; ++i) {
      InMemory& p = in_memory_[i];
      const at::Tensor gradient = at::randn_like(p.parameter);
      parameters_[i].mutable_grad() = gradient;
      p.step.add_(1);
      const auto [beta1, beta2] = options.betas();
      at::_fused_adamw_({p.parameter}, {gradient}, {p.exp_avg}, {p.exp_avg_sq},
                        {}, {p.step}, options.lr(), beta1, beta2,
                        options.weight_decay(), options.eps(),
                        /*amsgrad=*/false, options.maximize());
    }
  }

  bool equal() const {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!at::equal(parameters_[i], in_memory_[i].parameter)) return false;
    }
    return true;
  }

  test::TempDir temp_;
  std::vector<at::Tensor> parameters_;
  std::vector<InMemory> in_memory_;
};

TEST_F(OffloadedAdamWTest, StepsEqualThoseInMemoryBitForBit) {
  OffloadedAdamWOptions second = options(0.02)
                                     .betas({0.8, 0.9})
                                     .eps(1e-6)
                                     .weight_decay(0.3)
                                     .maximize(true);
  const std::vector<at::Tensor> one = make({1, 65, 60000});
  const std::vector<at::Tensor> two = make({30001, 64});
  OffloadedAdamW optimizer(
      {OptimizerParamGroup(one),
       OptimizerParamGroup(two,
                           std::make_unique<OffloadedAdamWOptions>(second))},
      options(), offload());
  for (int step = 0; step < 10; ++step) {
    auto& first = static_cast<OffloadedAdamWOptions&>(
        optimizer.param_groups()[0].options());
    first.lr(1e-3 * (step + 1));  // A schedule.
    step_in_memory(0, 3, first);
    step_in_memory(3, 5, second);
    optimizer.step();
  }
  EXPECT_TRUE(equal());
  EXPECT_GT(optimizer.stats().tiles, 10u);
  EXPECT_LE(optimizer.stats().host_bytes_peak, kBudget);
}

TEST_F(OffloadedAdamWTest, AGroupMayJoinLateAndParametersGoWithoutGradient) {
  OffloadedAdamW optimizer(make({100, 200}), options(), offload());
  step_in_memory(0, 1, options());
  optimizer.step();
  optimizer.add_param_group(OptimizerParamGroup(make({300})));
  optimizer.zero_grad();
  step_in_memory(1, 3, options());
  optimizer.step();
  EXPECT_TRUE(equal());
}

TEST_F(OffloadedAdamWTest, TheClosuresLossIsReturned) {
  const std::vector<at::Tensor> parameters = make({100});
  OffloadedAdamW optimizer(parameters, options(), offload());
  const auto closure = [&] {
    EXPECT_TRUE(c10::GradMode::is_enabled());
    optimizer.zero_grad();
    at::Tensor loss = parameters[0].square().sum();
    loss.backward();
    return loss;
  };
  const double before = optimizer.step(closure).item<double>();
  const double after = optimizer.step(closure).item<double>();
  EXPECT_LT(after, before);
}

TEST_F(OffloadedAdamWTest, WrongArgumentsAreRefused) {
  const std::vector<at::Tensor> parameters = make({10});
  const std::vector<OffloadedAdamWOptions> wrong = {
      options(-1), options().eps(-1), options().betas({1, 0.9}),
      options().betas({0.9, -1}), options().weight_decay(-1)};
  for (const OffloadedAdamWOptions& bad : wrong) {
    EXPECT_THROW(OffloadedAdamW(parameters, bad, offload()),
                 std::invalid_argument);
  }
  StateOptions small = offload();
  small.host_memory = 1000;
  EXPECT_THROW(OffloadedAdamW(parameters, options(), small),
               std::invalid_argument);
  StateOptions nowhere = offload();
  nowhere.nvme_path = temp_ / "missing";
  EXPECT_THROW(OffloadedAdamW(parameters, options(), nowhere), IoError);
  const at::Tensor wide = at::zeros({3}, at::kDouble).requires_grad_(true);
  EXPECT_THROW(OffloadedAdamW({wide}, options(), offload()), TypeError);
}

template <typename Error, typename Call>
void expect_named(const std::string& name, Call call) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).substr(0, name.size()), name)
        << error.what();
  }
}

TEST_F(OffloadedAdamWTest, FrozenParametersOfAnyKindAreLeftAlone) {
  const at::Tensor packed = at::ones({8, 8}, at::kByte);
  const at::Tensor wide = at::ones({5}, at::kDouble);
  const at::Tensor meta = at::ones({5}, at::device(at::kMeta));
  std::vector<at::Tensor> all = {packed, wide, meta};
  for (const at::Tensor& parameter : make({300})) all.push_back(parameter);
  StateOptions taking = offload();
  taking.overlap_backward = OverlapBackward::kUpdate;
  for (const StateOptions& how : {offload(), taking}) {
    OffloadedAdamW optimizer(all, options(), how);
    EXPECT_LT(optimizer.plan().state_bytes, 2 * 316 * sizeof(float));
    step_in_memory(0, 1, options());
    optimizer.step();
    EXPECT_EQ(optimizer.state_dict().size(), 1u);
    EXPECT_TRUE(equal());
    EXPECT_TRUE(at::equal(packed, at::ones({8, 8}, at::kByte)));
    // Its turn comes when it has a gradient.
    wide.mutable_grad() = at::ones({5}, at::kDouble);
    expect_named<TypeError>(
        "parameter 1 of group 0 (dtype Double, sizes [5]): OffloadedAdamW: a "
        "parameter of dtype Double",
        [&] { optimizer.step(); });
    EXPECT_TRUE(equal());
    wide.mutable_grad() = at::Tensor();
    in_memory_[0] = {parameters_[0].detach().clone(), at::zeros({300}),
                     at::zeros({300}), at::zeros({})};
  }
}

TEST_F(OffloadedAdamWTest, ErrorsNameTheParameter) {
  const std::vector<at::Tensor> all = make({30, 40});
  OffloadedAdamW optimizer(
      {OptimizerParamGroup({all[0]}), OptimizerParamGroup({all[1]})}, options(),
      offload());
  step_in_memory(0, 2, options());
  const at::Tensor good = all[1].grad();
  const std::string place = "parameter 0 of group 1 (dtype Float, sizes [40])";
  all[1].mutable_grad() = at::ones({40}, at::kInt);
  expect_named<TypeError>(place, [&] { optimizer.step(); });
  all[1].mutable_grad() = at::ones({40}).to_sparse();
  expect_named<StateError>(place, [&] { optimizer.step(); });
  all[1].mutable_grad() = good;
  optimizer.step();
  EXPECT_TRUE(equal());
  auto state = optimizer.state_dict();
  state[1].state.exp_avg = at::ones({3});
  expect_named<std::invalid_argument>(
      place, [&] { optimizer.load_state_dict(state); });
  optimizer.add_param_group(
      OptimizerParamGroup({at::ones({3}, at::kDouble).requires_grad_(true)}));
  expect_named<TypeError>("parameter 0 of group 2 (dtype Double, sizes [3])",
                          [&] { optimizer.step(); });
}

TEST_F(OffloadedAdamWTest, AGroupWithOptionsOfAnotherOptimizerIsRefused) {
  OffloadedAdamW optimizer(make({10}), options(), offload());
  const at::Tensor other = at::ones({10}).requires_grad_();
  other.mutable_grad() = at::ones({10});
  optimizer.add_param_group(OptimizerParamGroup(
      {other}, std::make_unique<torch::optim::AdamWOptions>()));
  EXPECT_THROW(optimizer.step(), TypeError);
  EXPECT_TRUE(at::equal(other, at::ones({10})));
}

TEST_F(OffloadedAdamWTest, AStateDictBringsTheStateBack) {
  OffloadedAdamW optimizer(make({30001, 5, 7}), options(), offload());
  for (int step = 0; step < 3; ++step) {
    step_in_memory(0, 2, options());
    optimizer.step();
  }
  const auto state = optimizer.state_dict();
  ASSERT_EQ(state.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(state[i].parameter, i);
    EXPECT_EQ(state[i].state.step, 3u);
    EXPECT_TRUE(at::equal(state[i].state.exp_avg, in_memory_[i].exp_avg));
  }
  std::vector<at::Tensor> others;
  for (const at::Tensor& parameter : parameters_) {
    others.push_back(parameter.detach().clone().requires_grad_(true));
  }
  OffloadedAdamW other(others, options(), offload());
  other.load_state_dict(state);
  for (int step = 0; step < 3; ++step) {
    step_in_memory(0, 3, options());
    for (std::size_t i = 0; i < 3; ++i) {
      others[i].mutable_grad() = parameters_[i].grad();
    }
    optimizer.step();
    other.step();
  }
  EXPECT_TRUE(equal());
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(at::equal(others[i], parameters_[i]));
  }
}

/// What a caller may have set, for as long as it lives.
struct CallersModes {
  CallersModes() {
    c10::set_default_dtype(caffe2::TypeMeta::Make<c10::BFloat16>());
  }
  ~CallersModes() { c10::set_default_dtype(before); }

  const caffe2::TypeMeta before = c10::get_default_dtype();
  const c10::InferenceMode inference;
};

TEST_F(OffloadedAdamWTest, TheCallersDefaultDtypeAndModesChangeNothing) {
  std::unique_ptr<OffloadedAdamW> optimizer;
  StateOptions clipping = offload();
  clipping.max_grad_norm = 1e9;
  const std::vector<at::Tensor> parameters = make({3001, 64});
  {
    const CallersModes modes;
    optimizer =
        std::make_unique<OffloadedAdamW>(parameters, options(), clipping);
  }
  std::vector<OffloadedAdamW::ParameterState> state;
  for (int step = 0; step < 3; ++step) {
    step_in_memory(0, 2, options());
    const CallersModes modes;
    optimizer->step();
    if (step == 1) {
      state = optimizer->state_dict();
      optimizer->load_state_dict(state);
    }
  }
  EXPECT_TRUE(equal());
  EXPECT_FALSE(optimizer->grad_norm().is_inference());
  EXPECT_EQ(optimizer->grad_norm().scalar_type(), at::kFloat);
  for (const auto& each : state) {
    for (const at::Tensor& tensor :
         {each.state.exp_avg, each.state.exp_avg_sq}) {
      EXPECT_EQ(tensor.scalar_type(), at::kFloat);
      EXPECT_FALSE(tensor.is_inference());
      tensor.add_(0);  // With an inference tensor it would be an error.
    }
  }
}

// The core's update of whole parameters, with what a step multiplies with.
void step_packed(StateFormat format, std::uint64_t step, std::uint32_t ordinal,
                 const at::Tensor& parameter, const at::Tensor& gradient,
                 std::vector<std::byte>* moments) {
  const auto t = static_cast<double>(step);
  AdamWRun run;
  run.count = static_cast<std::uint64_t>(parameter.numel());
  run.exp_avg = {moments[0].data(), moments[2].data()};
  run.exp_avg_sq = {moments[1].data(), moments[3].data()};
  run.gradient = gradient.const_data_ptr<float>();
  run.master = parameter.mutable_data_ptr<float>();
  update_adamw(
      format, run,
      {.decay = static_cast<float>(1 - 0.02 * 0.3),
       .exp_avg = static_cast<float>(1 - 0.8),
       .beta2 = 0.9f,
       .exp_avg_sq = static_cast<float>(1 - 0.9),
       .inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(0.9, t))),
       .eps = 1e-6f,
       .step_size = static_cast<float>(0.02 / (1 - std::pow(0.8, t))),
       .maximize = true},
      {77, step, ordinal});
}

TEST_F(OffloadedAdamWTest, PackedFormatsAreTheCoresUpdateOfTheWholeParameter) {
  for (const StateFormat format : {StateFormat::kBf16, StateFormat::kInt8}) {
    parameters_.clear();
    in_memory_.clear();
    const std::vector<at::Tensor> two = make({40001, 700});
    StateOptions with = offload();
    with.state_format = format;
    with.seed = 77;
    OffloadedAdamW optimizer(two,
                             options(0.02)
                                 .betas({0.8, 0.9})
                                 .eps(1e-6)
                                 .weight_decay(0.3)
                                 .maximize(true),
                             with);
    std::vector<std::byte> moments[2][4];
    for (auto& of_parameter : moments) {
      for (auto& bytes : of_parameter) bytes.resize(2 * 40001);
    }
    for (std::uint64_t step = 1; step < 6; ++step) {
      for (std::uint32_t i = 0; i < 2; ++i) {
        const at::Tensor& parameter = in_memory_[i].parameter;
        two[i].mutable_grad() = at::randn_like(parameter);
        step_packed(format, step, i, parameter, two[i].grad(), moments[i]);
      }
      optimizer.step();
      EXPECT_TRUE(equal());
    }
  }
}

TEST_F(OffloadedAdamWTest, AStateThatDoesNotFitIsRefused) {
  OffloadedAdamW optimizer(make({5}), options(), offload());
  step_in_memory(0, 1, options());
  optimizer.step();
  auto state = optimizer.state_dict();
  state[0].parameter = 1;
  EXPECT_THROW(optimizer.load_state_dict(state), std::invalid_argument);
  state[0].parameter = 0;
  state[0].state.exp_avg = at::zeros({6});
  EXPECT_THROW(optimizer.load_state_dict(state), std::invalid_argument);
  step_in_memory(0, 1, options());
  optimizer.step();
  EXPECT_TRUE(equal());
}

TEST_F(OffloadedAdamWTest, TheStateOfTheBaseClassHasStepsAndNoTensors) {
  OffloadedAdamW optimizer(make({5, 6}), options(), offload());
  EXPECT_TRUE(optimizer.state().empty());
  step_in_memory(1, 2, options());
  optimizer.step();
  optimizer.step();
  ASSERT_EQ(optimizer.state().size(), 1u);
  const auto& shown = static_cast<const OffloadedAdamWParamState&>(
      *optimizer.state().at(parameters_[1].unsafeGetTensorImpl()));
  EXPECT_EQ(shown.step, 2u);
}

TEST_F(OffloadedAdamWTest, ErasingAnEntryOfTheStateBeginsItAnew) {
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    parameters_.clear();
    in_memory_.clear();
    StateOptions with = offload();
    with.overlap_backward = overlap;
    const std::vector<at::Tensor> made = make({30000, 5, 7});
    OffloadedAdamW optimizer(made, options(), with);
    for (int step = 0; step < 9; ++step) {
      if (step == 3) optimizer.state().erase(made[0].unsafeGetTensorImpl());
      if (step == 5) optimizer.state().clear();
      if (step == 7) {
        auto& entry = *optimizer.state().at(made[1].unsafeGetTensorImpl());
        static_cast<OffloadedAdamWParamState&>(entry).step = 40;
        in_memory_[1].step.fill_(40);
      }
      for (std::size_t i = 0; i < 3; ++i) {
        if (step != 5 && (step != 3 || i != 0)) continue;
        in_memory_[i].exp_avg.zero_();
        in_memory_[i].exp_avg_sq.zero_();
        in_memory_[i].step.zero_();
      }
      step_in_memory(0, 3, options());
      optimizer.step();
      EXPECT_TRUE(equal()) << step;
    }
    const auto state = optimizer.state_dict();
    ASSERT_EQ(state.size(), 3u);
    EXPECT_EQ(state[0].state.step, 4u);
    EXPECT_EQ(state[1].state.step, 42u);
    optimizer.state().clear();
    EXPECT_TRUE(optimizer.state_dict().empty());
  }
}

TEST_F(OffloadedAdamWTest, StateIsTheParametersWhateverGroupItIsIn) {
  OffloadedAdamW optimizer(make({30000, 5}), options(), offload());
  for (int step = 0; step < 3; ++step) {
    step_in_memory(0, 2, options());
    optimizer.step();
  }
  auto& groups = optimizer.param_groups();
  groups[0].params().pop_back();
  step_in_memory(0, 1, options());
  optimizer.step();
  groups[0].params().push_back(parameters_[1]);
  for (int step = 0; step < 3; ++step) {
    step_in_memory(0, 2, options());
    optimizer.step();
  }
  EXPECT_TRUE(equal());
}

TEST_F(OffloadedAdamWTest, AParameterThatIsNoMoreLeavesNoState) {
  OffloadedAdamW optimizer(make({5}), options(), offload());
  auto& params = optimizer.param_groups()[0].params();
  for (int i = 0; i < 50; ++i) {
    // Often at the address of the last.
    at::Tensor other = at::randn({30000}).requires_grad_(true);
    at::Tensor expected = other.detach().clone();
    at::Tensor exp_avg = at::zeros({30000}), exp_avg_sq = at::zeros({30000});
    params.push_back(other);
    other.mutable_grad() = at::randn({30000});
    optimizer.step();
    at::_fused_adamw_({expected}, {other.grad()}, {exp_avg}, {exp_avg_sq}, {},
                      {at::ones({})}, 1e-3, 0.9, 0.999, 1e-2, 1e-8,
                      /*amsgrad=*/false, /*maximize=*/false);
    EXPECT_TRUE(at::equal(other, expected));
    params.pop_back();
  }
  optimizer.step();
  EXPECT_TRUE(optimizer.state().empty());
  EXPECT_EQ(optimizer.stats().tiles, 0u);
}

TEST_F(OffloadedAdamWTest, AClosedOptimizerRefusesSteps) {
  OffloadedAdamW optimizer(make({5}), options(), offload());
  step_in_memory(0, 1, options());
  optimizer.step();
  optimizer.close();
  EXPECT_THROW(optimizer.step(), StateError);
  EXPECT_EQ(optimizer.stats().steps, 1u);
}

}  // namespace
}  // namespace torch_ext
