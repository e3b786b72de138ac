#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/faulty_engine.h"
#include "support/temp_dir.h"
#include "tensor/adamw_offload.h"
#include "tensor/gradient_hook.h"
#include "torch_ext/tensor/offloaded_adamw.h"

namespace torch_ext {
namespace {

using Tensors = std::vector<at::Tensor>;

/// Updates during backward, through LibTorch.
class OverlapTest : public testing::Test {
 protected:
  StateOptions offload(OverlapBackward overlap,
                       StateFormat format = StateFormat::kExact) const {
    StateOptions options;
    options.nvme_path = temp_.path();
    options.host_memory = std::uint64_t{240} << 10;
    options.state_format = format;
    options.overlap_backward = overlap;
    return options;
  }

  /// Weights of a net of four layers, the same each time.
  static Tensors weights(c10::ScalarType dtype = at::kFloat) {
    Tensors weights;
    for (int i = 0; i < 4; ++i) {
      const at::Tensor drawn = at::randn(
          {72, 72},
          at::detail::createCPUGenerator(static_cast<std::uint64_t>(i + 1)));
      weights.push_back(drawn.mul(0.1).to(dtype));
      weights.back().requires_grad_(true);
    }
    return weights;
  }

  static at::Tensor loss_of(const Tensors& weights, double scale = 1) {
    at::Tensor x = at::full({4, 72}, scale, weights[0].options());
    for (const at::Tensor& weight : weights) x = x.matmul(weight).tanh();
    return x.square().sum();
  }

  static void train(const Tensors& weights, OffloadedAdamW& optimizer) {
    for (int step = 1; step <= 6; ++step) {
      optimizer.zero_grad();
      loss_of(weights, 0.1 * step).backward();
      optimizer.step();
    }
  }

  static bool equal(const Tensors& a, const Tensors& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (!at::equal(a[i], b[i])) return false;
    }
    return true;
  }

  /// For torch::optim::AdamW, which rounds otherwise than the fused kernel.
  static bool all_close(const Tensors& a, const Tensors& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (!at::allclose(a[i], b[i], 1e-5, 1e-6)) return false;
    }
    return true;
  }

  test::TempDir temp_;
};

TEST_F(OverlapTest, NoModeChangesTheResultOfAnyFormat) {
  for (const auto format :
       {StateFormat::kExact, StateFormat::kBf16, StateFormat::kInt8}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      std::vector<Tensors> trained;
      for (const auto overlap :
           {OverlapBackward::kOff, OverlapBackward::kPrefetch,
            OverlapBackward::kUpdate}) {
        trained.push_back(weights(dtype));
        OffloadedAdamW optimizer(trained.back(), OffloadedAdamWOptions(1e-2),
                                 offload(overlap, format));
        train(trained.back(), optimizer);
        EXPECT_EQ(optimizer.stats().steps, 6u);
      }
      EXPECT_TRUE(equal(trained[0], trained[1]));
      EXPECT_TRUE(equal(trained[0], trained[2]));
      EXPECT_FALSE(equal(trained[0], weights(dtype)));
    }
  }
}

TEST_F(OverlapTest, AGradientThatWasTakenCannotBeUsed) {
  const Tensors ours = weights();
  OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(1e-2),
                           offload(OverlapBackward::kUpdate));
  loss_of(ours).backward();
  EXPECT_ANY_THROW(torch::nn::utils::clip_grad_norm_(ours, 1.0));
  EXPECT_ANY_THROW(ours[0].grad().norm().item());
  EXPECT_ANY_THROW(loss_of(ours).backward());
  optimizer.step();
  optimizer.zero_grad();
  EXPECT_FALSE(ours[0].grad().defined());
}

/// Expects a StateError that says `text`.
template <typename Call>
void expect_refused(const std::string& text, const Call& call) {
  try {
    call();
    ADD_FAILURE() << "no StateError: " << text;
  } catch (const StateError& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos)
        << error.what();
  }
}

TEST_F(OverlapTest, AGradientThatWouldNotBeCountedIsRefused) {
  const Tensors ours = weights();
  OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(1e-2),
                           offload(OverlapBackward::kUpdate));
  loss_of(ours).backward();
  optimizer.zero_grad();
  expect_refused("a second backward pass before step()",
                 [&] { loss_of(ours).backward(); });
  optimizer.zero_grad();
  ours[1].mutable_grad() = at::full({72, 72}, 1.0);
  expect_refused(
      "parameter 1 of group 0 (dtype Float, sizes [72, 72]) "
      "has got a gradient after the one of this step",
      [&] { optimizer.step(); });
  optimizer.zero_grad();
  optimizer.step();
  loss_of(ours).backward();
  optimizer.step();
  expect_refused("has had its gradient taken by an earlier step",
                 [&] { optimizer.step(); });
  optimizer.zero_grad();
  optimizer.step();
  EXPECT_EQ(optimizer.stats().steps, 3u);
  EXPECT_EQ(optimizer.state_dict()[1].state.step, 2u);
}

TEST_F(OverlapTest, AGroupKeepsTheOptionsThatItsFirstGradientFound) {
  const Tensors ours = weights(), theirs = weights();
  std::optional<OffloadedAdamW> optimizer;
  const auto set_lr =
      std::make_shared<const GradientHook::Function>([&](const at::Tensor&) {
        optimizer->param_groups()[0].options().set_lr(0.5);
      });
  GradientHook::add(ours[2], set_lr);
  optimizer.emplace(ours, OffloadedAdamWOptions(1e-2),
                    offload(OverlapBackward::kUpdate));
  torch::optim::AdamW other(theirs, torch::optim::AdamWOptions(1e-2));
  loss_of(ours).backward();
  loss_of(theirs).backward();
  expect_refused("options of param_groups[0] were changed",
                 [&] { optimizer->step(); });
  other.step();
  EXPECT_TRUE(all_close(ours, theirs));
}

TEST_F(OverlapTest, GroupsThatMoveUpKeepTheirOwnOptions) {
  const Tensors ours = weights(), theirs = weights();
  std::vector<torch::optim::OptimizerParamGroup> groups, torchs;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double lr = 1.0 / static_cast<double>(1 + i);
    groups.emplace_back(Tensors{ours[i]},
                        std::make_unique<OffloadedAdamWOptions>(lr));
    torchs.emplace_back(Tensors{theirs[i]},
                        std::make_unique<torch::optim::AdamWOptions>(lr));
  }
  OffloadedAdamW optimizer(groups, OffloadedAdamWOptions(1e-2),
                           offload(OverlapBackward::kUpdate));
  torch::optim::AdamW other(torchs);
  ours[0].square().sum().backward();
  theirs[0].square().sum().backward();
  optimizer.param_groups().erase(optimizer.param_groups().begin());
  for (std::size_t i = 1; i < ours.size(); ++i) {
    ours[i].mutable_grad() = at::ones_like(ours[i]);
    theirs[i].mutable_grad() = at::ones_like(theirs[i]);
  }
  expect_refused("was taken out of param_groups", [&] { optimizer.step(); });
  other.step();
  EXPECT_TRUE(all_close(ours, theirs));
}

TEST_F(OverlapTest, GradientsAreAddedUpInsideAGuard) {
  std::vector<Tensors> trained;
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    trained.push_back(weights());
    const Tensors& ours = trained.back();
    OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(1e-2),
                             offload(overlap));
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      {
        const OffloadedAdamW::AccumulateGuard guard(optimizer);
        loss_of(ours, 0.5).backward();
        EXPECT_FALSE(ours[0].grad().is_meta());
      }
      loss_of(ours, 0.25).backward();
      optimizer.step();
    }
  }
  EXPECT_TRUE(equal(trained[0], trained[1]));
}

TEST_F(OverlapTest, ANormIsClippedAsTorchDoes) {
  const Tensors ours = weights(), theirs = weights();
  StateOptions with = offload(OverlapBackward::kUpdate);
  with.max_grad_norm = 0.01;
  OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(1e-2), with);
  OffloadedAdamW other(theirs, OffloadedAdamWOptions(1e-2),
                       offload(OverlapBackward::kOff));
  for (int step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    other.zero_grad();
    loss_of(ours).backward();
    loss_of(theirs).backward();
    optimizer.step();
    torch::nn::utils::clip_grad_norm_(theirs, 0.01);
    other.step();
  }
  EXPECT_TRUE(equal(ours, theirs));
  with.max_grad_norm = 0;
  EXPECT_THROW(OffloadedAdamW(weights(), OffloadedAdamWOptions(), with),
               std::invalid_argument);
}

/// As DistributedDataParallel adds to what accumulates a gradient.
struct LaterHook final : torch::autograd::FunctionPostHook {
  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& outputs,
      const torch::autograd::variable_list&) override {
    return outputs;
  }
};

TEST_F(OverlapTest, AGradientThatAHookChangesLaterIsNotTaken) {
  const Tensors ours = weights();
  OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(0.01),
                           offload(OverlapBackward::kUpdate));
  const auto accumulator = torch::autograd::impl::grad_accumulator(ours[1]);
  accumulator->add_post_hook(std::make_unique<LaterHook>());
  EXPECT_THROW(loss_of(ours).backward(), StateError);
}

/// A layer that is computed again in backward, by a backward pass of its own;
/// so its weight gets a gradient in parts.
struct CheckpointedLayer : public torch::autograd::Function<CheckpointedLayer> {
  static at::Tensor forward(torch::autograd::AutogradContext* context,
                            const at::Tensor& x, const at::Tensor* weight) {
    context->save_for_backward({x});
    context->saved_data["weight"] = reinterpret_cast<std::int64_t>(weight);
    return x.matmul(*weight).tanh();
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context,
      torch::autograd::variable_list gradients) {
    const auto* weight = reinterpret_cast<const at::Tensor*>(
        context->saved_data["weight"].toInt());
    const at::Tensor x =
        context->get_saved_variables()[0].detach().requires_grad_(true);
    const c10::AutoGradMode with_grad(true);
    x.matmul(*weight).tanh().backward(gradients[0]);
    return {x.grad(), at::Tensor()};
  }
};

TEST_F(OverlapTest, GradientsThatComeInPartsAreLeftToStep) {
  std::vector<Tensors> trained;
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    trained.push_back({weights()[0]});
    const at::Tensor& weight = trained.back()[0];
    OffloadedAdamW optimizer(trained.back(), OffloadedAdamWOptions(1e-2),
                             offload(overlap));
    for (int step = 1; step <= 3; ++step) {
      optimizer.zero_grad();
      at::Tensor x = at::full({4, 72}, 0.1 * step).requires_grad_(true);
      for (int i = 0; i < 3; ++i) x = CheckpointedLayer::apply(x, &weight);
      // The gradient of this comes first.
      x.matmul(weight).square().sum().backward();
      optimizer.step();
    }
    const auto is_remedy = [](const std::string& note) {
      return note.find("use_reentrant=False") != std::string::npos;
    };
    EXPECT_EQ(std::ranges::count_if(optimizer.notes(), is_remedy),
              overlap == OverlapBackward::kUpdate ? 1 : 0);
  }
  EXPECT_TRUE(equal(trained[0], trained[1]));
  EXPECT_FALSE(at::equal(trained[0][0], weights()[0]));
}

TEST_F(OverlapTest,
       AfterAFailedLoadInTheMiddleOfAStepItsErrorIsWhatCallsThrow) {
  const auto script = std::make_shared<test::FaultScript>();
  AdamWOffload offload(
      {.store = {.directory = temp_.path(),
                 .engine_factory = test::faulty_factory("threads", script)},
       .host_memory = std::uint64_t{240} << 10});
  const at::Tensor tensor = at::full({100'000}, 1.0);
  const at::Tensor gradient = at::full({100'000}, 0.5);
  const AdamWOffload::Parameter parameter{offload.add(tensor, true), tensor};
  const AdamWHyper hyper{.lr = 0.01};
  offload.take(hyper, {parameter, gradient});
  offload.finish();
  const auto saved = offload.save({parameter});
  offload.take(hyper, {parameter, gradient});
  EXPECT_TRUE(offload.in_step());
  script->set_plan(test::from(0, test::Fault::fail(EIO)));
  const auto error_of = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const IoError& error) {
      return error.what();
    }
    return "no IoError";
  };
  // The last write may fail after the call, but not the first.
  EXPECT_NE(error_of([&] { offload.load(saved); }).find("EIO"),
            std::string::npos);
  EXPECT_FALSE(offload.in_step());
  script->set_plan(nullptr);
  for (int i = 0; i < 2; ++i) {
    EXPECT_NE(error_of([&] {
                offload.take(hyper, {parameter, gradient});
              }).find("load it anew"),
              std::string::npos);
    EXPECT_NE(error_of([&] { offload.finish(); }).find("load it anew"),
              std::string::npos);
  }
  offload.load(saved);
  offload.take(hyper, {parameter, gradient});
  offload.finish();
  EXPECT_EQ(offload.step_of(parameter.slot), 2u);
}

TEST_F(OverlapTest, WhatChangesBetweenBackwardAndStepIsAnErrorOfTheStep) {
  using Change = std::function<void(OffloadedAdamW&, Tensors&)>;
  const auto set_lr = [](double lr) {
    return [lr](OffloadedAdamW& optimizer, Tensors&) {
      optimizer.param_groups()[0].options().set_lr(lr);
    };
  };
  const auto write = [](OffloadedAdamW&, Tensors& weights) {
    const c10::NoGradGuard no_grad;
    weights[2].clamp_(-0.01, 0.01);
  };
  const auto take_out = [](OffloadedAdamW& optimizer, Tensors&) {
    optimizer.param_groups()[0].params().pop_back();
  };
  const auto erase = [](OffloadedAdamW& optimizer, Tensors& weights) {
    optimizer.state().erase(weights[1].unsafeGetTensorImpl());
  };
  const std::vector<std::pair<Change, std::string>> changes = {
      {set_lr(0.5), "options of param_groups[0] were changed"},
      {set_lr(-1.0), "options of param_groups[0] were changed"},
      {write,
       "parameter 2 of group 0 (dtype Float, sizes [72, 72]) was "
       "changed between"},
      {take_out,
       "a parameter in no group, of sizes [72, 72] was taken out of "
       "param_groups between"},
      {erase,
       "parameter 1 of group 0 (dtype Float, sizes [72, 72]) had its "
       "entry in state() erased"}};
  for (const auto& [change, text] : changes) {
    Tensors trained = weights();
    OffloadedAdamW optimizer(trained, OffloadedAdamWOptions(),
                             offload(OverlapBackward::kUpdate));
    loss_of(trained).backward();
    optimizer.step();
    optimizer.zero_grad();
    loss_of(trained).backward();
    EXPECT_THROW(optimizer.state_dict(), StateError);
    change(optimizer, trained);
    expect_refused(text, [&] { optimizer.step(); });
    // The step has been made, and is not said of twice.
    Tensors& params = optimizer.param_groups()[0].params();
    EXPECT_EQ(optimizer.state_dict().size(), params.size());
    optimizer.param_groups()[0].options().set_lr(1e-3);
    params = trained;
    optimizer.zero_grad();
    loss_of(trained).backward();
    optimizer.step();
    for (const auto& each : optimizer.state_dict()) {
      EXPECT_EQ(each.state.step, 3u);
    }
  }
}

TEST_F(OverlapTest, GroupsMayChangeBetweenSteps) {
  std::vector<Tensors> results;
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    const Tensors trained = weights();
    std::vector<torch::optim::OptimizerParamGroup> groups = {
        torch::optim::OptimizerParamGroup(trained),
        torch::optim::OptimizerParamGroup(
            Tensors{}, std::make_unique<OffloadedAdamWOptions>(0.1))};
    OffloadedAdamW optimizer(groups, OffloadedAdamWOptions(0.01),
                             offload(overlap));
    train(trained, optimizer);
    optimizer.zero_grad();
    // One is trained with other options from now on, and one no more.
    Tensors& first = optimizer.param_groups()[0].params();
    optimizer.param_groups()[1].params().push_back(first[0]);
    first.erase(first.begin(), first.begin() + 2);
    const at::Tensor before = trained[1].detach().clone();
    train(trained, optimizer);
    EXPECT_TRUE(at::equal(trained[1], before));
    results.push_back(trained);
  }
  EXPECT_TRUE(equal(results[0], results[1]));
}

TEST_F(OverlapTest, AStateThatIsLoadedEndsTheStepThatBackwardBegan) {
  const Tensors trained = weights();
  OffloadedAdamW optimizer(trained, OffloadedAdamWOptions(),
                           offload(OverlapBackward::kUpdate));
  train(trained, optimizer);
  const auto saved = optimizer.state_dict();
  optimizer.zero_grad();
  loss_of(trained).backward();
  optimizer.load_state_dict(saved);
  EXPECT_EQ(optimizer.state_dict().size(), trained.size());
  optimizer.zero_grad();
  loss_of(trained).backward();
  optimizer.step();
  EXPECT_EQ(optimizer.state_dict()[0].state.step, 7u);
}

TEST_F(OverlapTest, HooksOfAnOptimizerThatIsGoneDoNothing) {
  const Tensors ours = weights();
  int calls = 0;
  const auto mine = std::make_shared<const GradientHook::Function>(
      [&](const at::Tensor&) { ++calls; });
  GradientHook::add(ours[0], mine);
  {
    OffloadedAdamW optimizer(ours, OffloadedAdamWOptions(1e-2),
                             offload(OverlapBackward::kUpdate));
    train(ours, optimizer);
    EXPECT_EQ(calls, 6);
    optimizer.zero_grad();
  }
  loss_of(ours).backward();
  EXPECT_EQ(calls, 7);
  EXPECT_TRUE(ours[0].grad().is_cpu());
}

}  // namespace
}  // namespace torch_ext
