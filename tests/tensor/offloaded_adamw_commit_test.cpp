// Commits of the C++ OffloadedAdamW. The reference is the same training without
// a break; for float32 it is PyTorch's kernel in memory.

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/tensor/offloaded_adamw.h"

namespace torch_ext {
namespace {

using torch::optim::OptimizerParamGroup;
using Tensors = std::vector<at::Tensor>;

constexpr const char* kFile = "state.r0-of-1.e0.d0.store";

/// A folder for a store. libtorch.so has a std::filesystem::remove_all() of its
/// own, which crashes in a folder that is not empty.
class StoreDir : public test::TempDir {
 public:
  ~StoreDir() { unlink((*this / kFile).c_str()); }
};

bool is_file(const std::filesystem::path& path) {
  return std::ifstream(path).is_open();
}

/// Parameters of a few tiles, the same each time. The third is frozen.
Tensors make_parameters(c10::ScalarType dtype = at::kFloat) {
  Tensors made;
  for (const std::int64_t size : {40001, 700, 5, 21000}) {
    const at::Tensor whole = at::arange(size, at::kDouble).mul(0.1).sin();
    made.push_back(whole.to(dtype).requires_grad_(made.size() != 2));
  }
  return made;
}

at::Tensor loss_of(const Tensors& parameters, std::uint64_t step) {
  const auto target = static_cast<double>(step % 3);
  at::Tensor loss = parameters[0].sub(target).square().sum();
  for (std::size_t i = 1; i < parameters.size(); ++i) {
    loss = loss + parameters[i].add(target).square().sum();
  }
  return loss;
}

/// Makes steps [first, last). Each depends on the values that it finds.
void train(const Tensors& parameters, OffloadedAdamW& optimizer,
           std::uint64_t first, std::uint64_t last) {
  for (std::uint64_t step = first; step < last; ++step) {
    optimizer.zero_grad();
    loss_of(parameters, step).backward();
    optimizer.step();
  }
}

Tensors copies(const Tensors& tensors) {
  Tensors copied;
  for (const at::Tensor& tensor : tensors) {
    copied.push_back(tensor.detach().clone());
  }
  return copied;
}

bool equal(const Tensors& a, const Tensors& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) return false;
  }
  return true;
}

/// All tensors of a state, and its steps.
std::pair<Tensors, std::vector<std::uint64_t>> state_of(
    OffloadedAdamW& optimizer) {
  std::pair<Tensors, std::vector<std::uint64_t>> state;
  for (const auto& each : optimizer.state_dict()) {
    state.first.push_back(each.state.exp_avg);
    state.first.push_back(each.state.exp_avg_sq);
    if (each.state.master.defined()) state.first.push_back(each.state.master);
    state.second.push_back(each.state.step);
  }
  return state;
}

void expect_equal(const std::pair<Tensors, std::vector<std::uint64_t>>& a,
                  const std::pair<Tensors, std::vector<std::uint64_t>>& b) {
  EXPECT_TRUE(equal(a.first, b.first));
  EXPECT_EQ(a.second, b.second);
}

template <typename Error>
std::string text_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

bool has_note(OffloadedAdamW& optimizer, const std::string& part) {
  for (const std::string& note : optimizer.notes()) {
    if (has(note, part)) return true;
  }
  return false;
}

/// A training with PyTorch's kernel in memory.
class InMemory {
 public:
  explicit InMemory(std::vector<OffloadedAdamWOptions> options)
      : options_(std::move(options)), parameters_(make_parameters()) {
    for (const at::Tensor& parameter : parameters_) {
      moments_.push_back({at::zeros_like(parameter.detach()),
                          at::zeros_like(parameter.detach()), at::zeros({})});
    }
  }

  void train(std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t step = first; step < last; ++step) {
      loss_of(parameters_, step).backward();
      const c10::NoGradGuard no_grad;
      for (std::size_t i = 0; i < parameters_.size(); ++i) {
        at::Tensor& parameter = parameters_[i];
        if (!parameter.grad().defined()) continue;
        const OffloadedAdamWOptions& how = options_[i];
        const auto& [exp_avg, exp_avg_sq, count] = moments_[i];
        count.add_(1);
        const auto [beta1, beta2] = how.betas();
        at::_fused_adamw_({parameter}, {parameter.grad()}, {exp_avg},
                          {exp_avg_sq}, {}, {count}, how.lr(), beta1, beta2,
                          how.weight_decay(), how.eps(), /*amsgrad=*/false,
                          how.maximize());
        parameter.mutable_grad().reset();
      }
    }
  }

  const Tensors& parameters() const { return parameters_; }
  std::vector<OffloadedAdamWOptions>& options() { return options_; }

  /// As state_of().
  std::pair<Tensors, std::vector<std::uint64_t>> state() const {
    std::pair<Tensors, std::vector<std::uint64_t>> state;
    for (const auto& [exp_avg, exp_avg_sq, count] : moments_) {
      const auto steps = static_cast<std::uint64_t>(count.item<double>());
      if (steps == 0) continue;
      state.first.push_back(exp_avg);
      state.first.push_back(exp_avg_sq);
      state.second.push_back(steps);
    }
    return state;
  }

 private:
  struct Moments {
    at::Tensor exp_avg, exp_avg_sq, count;
  };
  std::vector<OffloadedAdamWOptions> options_;  // For each parameter.
  Tensors parameters_;
  std::vector<Moments> moments_;
};

class OffloadedAdamWCommitTest : public testing::Test {
 protected:
  StateOptions offload() const {
    return {.nvme_path = temp_.path(), .host_memory = std::uint64_t{240} << 10};
  }

  std::unique_ptr<OffloadedAdamW> make(const Tensors& parameters) const {
    return std::make_unique<OffloadedAdamW>(
        parameters, OffloadedAdamWOptions(1e-2), offload());
  }

  std::string file() const { return (temp_ / kFile).string(); }

  std::string bytes() const {
    std::ifstream in(file(), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  StoreDir temp_;
};

TEST_F(OffloadedAdamWCommitTest, TwoStepsACommitAndTwoMoreAreFourSteps) {
  for (const auto format :
       {StateFormat::kExact, StateFormat::kBf16, StateFormat::kInt8}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      const StoreDir elsewhere, here;
      StateOptions with = offload();
      with.nvme_path = elsewhere.path();
      with.overlap_backward = format == StateFormat::kBf16
                                  ? OverlapBackward::kUpdate
                                  : OverlapBackward::kOff;
      with.state_format = format;
      with.seed = 7;
      const OffloadedAdamWOptions options(1e-2);
      const Tensors whole = make_parameters(dtype);
      OffloadedAdamW unbroken(whole, options, with);
      train(whole, unbroken, 0, 4);

      with.nvme_path = here.path();
      const Tensors first = make_parameters(dtype);
      {
        OffloadedAdamW optimizer(first, options, with);
        train(first, optimizer, 0, 2);
        EXPECT_EQ(optimizer.commit().step, 2u);
        train(first, optimizer, 2, 3);  // Lost.
      }
      with.state_format = StateFormat::kExact;
      with.seed = 0;
      Tensors second;
      for (const at::Tensor& parameter : make_parameters(dtype)) {
        second.push_back(at::full_like(parameter.detach(), 3)
                             .requires_grad_(parameter.requires_grad()));
      }
      second[2].copy_(whole[2]);  // Frozen ones are the caller's.
      const auto optimizer = OffloadedAdamW::resume(second, with);
      EXPECT_EQ(optimizer->committed_step(), 2u);
      train(second, *optimizer, 2, 4);
      EXPECT_TRUE(equal(second, whole));
      expect_equal(state_of(*optimizer), state_of(unbroken));
      EXPECT_EQ(optimizer->commit().step, 4u);
    }
  }
}

TEST_F(OffloadedAdamWCommitTest, StepsGoOnBesideACommit) {
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    const StoreDir here;
    StateOptions with = offload();
    with.nvme_path = here.path();
    with.overlap_backward = overlap;
    InMemory reference(std::vector(4, OffloadedAdamWOptions(1e-2)));
    const Tensors parameters = make_parameters();
    {
      OffloadedAdamW optimizer(parameters, OffloadedAdamWOptions(1e-2), with);
      std::optional<CommitTicket> last;
      for (std::uint64_t step = 0; step < 4; ++step) {
        train(parameters, optimizer, step, step + 1);
        last = optimizer.start_commit({}, {.extra = std::to_string(step)});
      }
      reference.train(0, 4);
      const Tensors committed = copies(reference.parameters());
      train(parameters, optimizer, 4, 6);
      last->wait_source();
      EXPECT_EQ(last->wait().step, 4u);
      EXPECT_EQ(optimizer.committed_step(), 4u);
      EXPECT_EQ(optimizer.committed_extra(), "3");
      reference.train(4, 6);
      EXPECT_TRUE(equal(parameters, reference.parameters()));
      optimizer.rollback();
      EXPECT_TRUE(equal(parameters, committed));
      train(parameters, optimizer, 4, 5);
      optimizer.start_commit();
    }  // It ends first.
    const Tensors found = make_parameters();
    const auto optimizer = OffloadedAdamW::resume(found, with);
    EXPECT_EQ(optimizer->committed_step(), 5u);
    EXPECT_TRUE(equal(found, parameters));
  }
}

TEST_F(OffloadedAdamWCommitTest, ARunInMemoryGivesTheSame) {
  const auto slow = OffloadedAdamWOptions(1e-3)
                        .betas({0.8, 0.9})
                        .eps(1e-6)
                        .weight_decay(0.3)
                        .maximize(true);
  const OffloadedAdamWOptions fast(1e-2);
  InMemory reference({fast, fast, fast, slow});
  const auto groups_of = [](const Tensors& p) {
    std::vector<OptimizerParamGroup> groups;
    groups.emplace_back(Tensors{p[0], p[1], p[2]});
    groups.emplace_back(Tensors{p[3]});
    return groups;
  };
  Tensors parameters = make_parameters();
  auto groups = groups_of(parameters);
  groups[1].set_options(std::make_unique<OffloadedAdamWOptions>(slow));
  auto optimizer = std::make_unique<OffloadedAdamW>(groups, fast, offload());
  for (std::uint64_t step = 0; step < 8; step += 2) {
    const double lr = 1e-2 / static_cast<double>(step + 3);  // A schedule.
    for (auto& options : reference.options()) options.lr(lr);
    for (auto& group : optimizer->param_groups()) group.options().set_lr(lr);
    reference.train(step, step + 2);
    train(parameters, *optimizer, step, step + 2);
    optimizer->commit(100 + step);
    optimizer->close();
    parameters = make_parameters();
    optimizer = OffloadedAdamW::resume(groups_of(parameters), offload());
    EXPECT_EQ(optimizer->committed_step(), 100 + step);
    EXPECT_TRUE(equal(parameters, reference.parameters()));
    for (const auto& group : optimizer->param_groups()) {
      EXPECT_EQ(group.options().get_lr(), lr);
    }
  }
  expect_equal(state_of(*optimizer), reference.state());
  EXPECT_EQ(static_cast<OffloadedAdamWOptions&>(optimizer->defaults()).lr(),
            fast.lr());
}

TEST_F(OffloadedAdamWCommitTest, ASnapshotGoesOnAsTheOriginalDoes) {
  const StoreDir elsewhere;
  InMemory reference(std::vector(4, OffloadedAdamWOptions(1e-2)));
  reference.train(0, 4);
  const Tensors first = make_parameters();
  const auto original = make(first);
  train(first, *original, 0, 2);
  EXPECT_TRUE(
      has(text_of<StateError>([&] { original->snapshot(elsewhere.path()); }),
          "nothing was committed"));
  original->commit();
  train(first, *original, 2, 3);
  const SnapshotReport report = original->snapshot(elsewhere.path());
  EXPECT_EQ(report.step, 2u);
  EXPECT_TRUE(is_file(elsewhere / kFile));
  EXPECT_TRUE(
      has(text_of<IoError>([&] { original->snapshot(elsewhere.path()); }),
          "it is there already"));
  StateOptions there = offload();
  there.nvme_path = elsewhere.path();
  const Tensors second = make_parameters();
  const auto copy = OffloadedAdamW::resume(second, there);
  train(second, *copy, 2, 4);
  train(first, *original, 3, 4);
  for (const auto& [parameters, optimizer] :
       {std::pair(&first, original.get()), {&second, copy.get()}}) {
    EXPECT_TRUE(equal(*parameters, reference.parameters()));
    expect_equal(state_of(*optimizer), reference.state());
  }
}

TEST_F(OffloadedAdamWCommitTest, EachKeptCommitCanBeGoneBackTo) {
  InMemory reference(std::vector(4, OffloadedAdamWOptions(1e-2)));
  const Tensors parameters = make_parameters();
  const auto optimizer = make(parameters);
  std::map<std::uint64_t, Tensors> values;
  std::map<std::uint64_t, std::pair<Tensors, std::vector<std::uint64_t>>> state;
  for (std::uint64_t step = 2; step <= 6; step += 2) {
    train(parameters, *optimizer, step - 2, step);
    optimizer->commit({}, {.extra = std::to_string(step), .keep = 9});
    reference.train(step - 2, step);
    values[step] = copies(reference.parameters());
    const auto [tensors, steps] = reference.state();
    state[step] = {copies(tensors), steps};
  }
  std::vector<std::uint64_t> there;
  for (const auto& [generation, step, time] : optimizer->commits()) {
    there.push_back(step);
    EXPECT_EQ(generation, there.size());
    EXPECT_GT(time, 1'600'000'000);
  }
  EXPECT_EQ(there, (std::vector<std::uint64_t>{2, 4, 6}));
  train(parameters, *optimizer, 6, 7);
  for (const std::uint64_t step : {6u, 2u, 4u}) {
    optimizer->rollback(step);
    EXPECT_EQ(optimizer->committed_step(), step);
    EXPECT_EQ(optimizer->committed_extra(), std::to_string(step));
    EXPECT_TRUE(equal(parameters, values[step]));
    for (const auto& [parameter, shown] : optimizer->state()) {
      EXPECT_EQ(static_cast<OffloadedAdamWParamState&>(*shown).step, step);
    }
    EXPECT_EQ(optimizer->state().size(), 3u);
    expect_equal(state_of(*optimizer), state[step]);
    train(parameters, *optimizer, step, 6);
    EXPECT_TRUE(equal(parameters, values[6]));
  }
  optimizer->rollback();
  EXPECT_EQ(optimizer->committed_step(), 6u);
  const std::string text =
      text_of<std::invalid_argument>([&] { optimizer->rollback(5); });
  EXPECT_TRUE(has(text,
                  "no commit of step 5; the steps of those kept are 2, "
                  "4, 6"))
      << text;
  EXPECT_TRUE(equal(parameters, values[6]));
  // A resume picks one, too.
  optimizer->close();
  const Tensors others = make_parameters();
  const auto resumed = OffloadedAdamW::resume(others, offload(), 4);
  EXPECT_TRUE(equal(others, values[4]));
  resumed->rollback(6);
  EXPECT_TRUE(equal(others, values[6]));
  resumed->rollback(2);
  EXPECT_EQ(resumed->commit({}, {.keep = 2}).step, 2u);
  EXPECT_EQ(resumed->commits().front().step, 6u);
}

TEST_F(OffloadedAdamWCommitTest, ARollbackIsAWayOnAfterAFailedStep) {
  InMemory reference(std::vector(4, OffloadedAdamWOptions(1e-2)));
  const Tensors parameters = make_parameters();
  const auto optimizer = make(parameters);
  train(parameters, *optimizer, 0, 2);
  optimizer->commit();
  optimizer->state_dict();  // All writes have ended.
  std::string before = bytes();
  train(parameters, *optimizer, 2, 3);
  optimizer->state_dict();
  const std::string after = bytes();
  before.resize(after.size());
  // What the step has written is no commit's. The drive changes a bit of each
  // block there.
  std::fstream drive(file(), std::ios::binary | std::ios::in | std::ios::out);
  std::size_t damaged = 0;
  for (std::size_t at = 0; at < after.size(); at += 4096) {
    if (after.compare(at, 4096, before, at, 4096) == 0) continue;
    drive.seekp(static_cast<std::streamoff>(at));
    drive.put(static_cast<char>(after[at] ^ 1));
    ++damaged;
  }
  drive.close();
  ASSERT_GT(damaged, 8u);
  EXPECT_THROW(train(parameters, *optimizer, 3, 5), IoError);
  EXPECT_THROW(train(parameters, *optimizer, 3, 4), IoError);
  EXPECT_THROW(optimizer->commit(), IoError);
  optimizer->rollback();
  reference.train(0, 2);
  EXPECT_TRUE(equal(parameters, reference.parameters()));
  expect_equal(state_of(*optimizer), reference.state());
  reference.train(2, 5);
  train(parameters, *optimizer, 2, 5);
  EXPECT_TRUE(equal(parameters, reference.parameters()));
}

TEST_F(OffloadedAdamWCommitTest, BetweenBackwardAndStepAStepIsGivenUp) {
  InMemory reference(std::vector(4, OffloadedAdamWOptions(1e-2)));
  const Tensors parameters = make_parameters();
  StateOptions with = offload();
  with.overlap_backward = OverlapBackward::kUpdate;
  OffloadedAdamW optimizer(parameters, OffloadedAdamWOptions(1e-2), with);
  train(parameters, optimizer, 0, 2);
  optimizer.commit();
  optimizer.zero_grad();
  loss_of(parameters, 2).backward();
  const std::string text = text_of<StateError>([&] { optimizer.commit(); });
  EXPECT_TRUE(has(text, "commit() between backward() and step()")) << text;
  optimizer.rollback();
  reference.train(0, 2);
  EXPECT_TRUE(equal(parameters, reference.parameters()));
  train(parameters, optimizer, 2, 4);
  reference.train(2, 4);
  EXPECT_TRUE(equal(parameters, reference.parameters()));
  expect_equal(state_of(optimizer), reference.state());
  optimizer.commit();
}

TEST_F(OffloadedAdamWCommitTest, AParameterThatTheCommitLacksBeginsAnew) {
  StateOptions with = offload();
  with.overlap_backward = OverlapBackward::kUpdate;
  const Tensors all = make_parameters();
  const OffloadedAdamWOptions options(1e-2);
  OffloadedAdamW optimizer({all[0], all[1]}, options, with);
  train({all[0], all[1]}, optimizer, 0, 1);
  optimizer.commit();
  auto& groups = optimizer.param_groups();
  groups[0].params().push_back(all[3]);
  train({all[0], all[1], all[3]}, optimizer, 1, 3);
  const std::string text =
      text_of<std::invalid_argument>([&] { optimizer.rollback(); });
  EXPECT_TRUE(has(text, "parameter 2 of group 0 is not in the commit")) << text;
  groups[0].params().pop_back();
  optimizer.rollback();
  EXPECT_EQ(optimizer.state_dict().size(), 2u);
  // It comes back. Its gradient is taken once, and its state is new.
  groups[0].params().push_back(all[3]);
  train({all[0], all[1], all[3]}, optimizer, 1, 3);
  const auto state = optimizer.state_dict();
  ASSERT_EQ(state.size(), 3u);
  EXPECT_EQ(state[0].state.step, 3u);
  EXPECT_EQ(state[2].state.step, 2u);
}

TEST_F(OffloadedAdamWCommitTest, AnothersParametersAreListedAndLeftAlone) {
  {
    const Tensors parameters = make_parameters();
    const auto optimizer = make(parameters);
    train(parameters, *optimizer, 0, 1);
    optimizer->commit();
  }
  const auto refusal = [&](const std::vector<OptimizerParamGroup>& groups) {
    return text_of<std::invalid_argument>(
        [&] { OffloadedAdamW::resume(groups, offload()); });
  };
  Tensors other = make_parameters();
  other[0] = at::ones({200, 200}).t().requires_grad_(true);
  other[1] = at::ones({700}, at::kHalf).requires_grad_(true);
  other.pop_back();
  const Tensors before = copies(other);
  std::string text = refusal({OptimizerParamGroup(other)});
  EXPECT_TRUE(has(text,
                  "the parameters are not those of the commit: "
                  "parameter 0 of group 0 has shape [40001] there and [200, "
                  "200] here; parameter 0 of group 0 has order [0] there and "
                  "[1, 0] here; parameter 1 of group 0 has dtype float32 there "
                  "and float16 here; parameter 3 of group 0 is missing"))
      << text;
  EXPECT_TRUE(equal(other, before));
  other = make_parameters();
  other[3] = other[0];
  EXPECT_TRUE(has(refusal({OptimizerParamGroup(other)}),
                  "parameter 3 of group 0 is in the groups twice"));
  Tensors many;
  for (int i = 0; i < 20; ++i) many.push_back(at::ones({1}));
  text = refusal(
      {OptimizerParamGroup(make_parameters()), OptimizerParamGroup(many)});
  EXPECT_TRUE(has(text,
                  "parameter 9 of group 1 is not in the commit, and 10 "
                  "more"))
      << text;
  EXPECT_TRUE(has(refusal({OptimizerParamGroup(make_parameters()),
                           OptimizerParamGroup(Tensors())}),
                  "there are 2 groups, and the commit has 1"));
  // The store is not held by those who were refused.
  OffloadedAdamW::resume(make_parameters(), offload());
}

TEST_F(OffloadedAdamWCommitTest, WhatAResumeCannotTakeIsRefused) {
  const Tensors parameters = make_parameters();
  const auto resume = [&](const StateOptions& with,
                          std::optional<std::uint64_t> step = {}) {
    return OffloadedAdamW::resume(parameters, with, step);
  };
  const auto error_of = [&] {
    try {
      resume(offload());
    } catch (const IoError& error) {
      return error.error();
    }
    return 0;
  };
  EXPECT_EQ(error_of(), ENOENT);
  {
    const auto optimizer = make(parameters);
    train(parameters, *optimizer, 0, 1);
    EXPECT_EQ(error_of(), ENOENT);
    EXPECT_TRUE(has(text_of<StateError>([&] { optimizer->rollback(); }),
                    "nothing was committed yet"));
    EXPECT_TRUE(optimizer->commits().empty());
    EXPECT_EQ(optimizer->committed_step(), std::nullopt);
    optimizer->commit(5);
    EXPECT_EQ(error_of(), EAGAIN);
    // Another run says at once that it cannot commit, and why.
    const Tensors others = make_parameters();
    const auto second = make(others);
    EXPECT_TRUE(has_note(*second, "resume() goes on from it"));
    train(others, *second, 0, 1);
    try {
      second->commit();
      ADD_FAILURE() << "a store was replaced";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EEXIST);
    }
  }
  StateOptions with = offload();
  with.seed = 1;
  EXPECT_TRUE(
      has(text_of<std::invalid_argument>([&] { resume(with); }), "::seed"));
  with = offload();
  with.state_format = StateFormat::kInt8;
  EXPECT_TRUE(has(text_of<std::invalid_argument>([&] { resume(with); }),
                  "::state_format: the commit has it"));
  EXPECT_TRUE(has(text_of<std::invalid_argument>([&] { resume(offload(), 4); }),
                  "the steps of those kept are 5"));
  const auto resumed = resume(offload());
  EXPECT_FALSE(has_note(*resumed, "resume() goes on from it"));
}

TEST_F(OffloadedAdamWCommitTest, AStoreOfSeveralProcessesIsRefused) {
  const Tensors parameters = make_parameters();
  const auto expect_refused = [&](const std::string& file,
                                  const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EEXIST);
      EXPECT_EQ(error.failure().path, file);
      EXPECT_TRUE(has(error.what(), "Python's resume() goes on from it"));
    }
  };
  const auto resume = [&] { OffloadedAdamW::resume(parameters, offload()); };
  const std::string newer = temp_ / "state.r1-of-2.e1.d0.store";
  std::ofstream(newer) << "Python's";
  expect_refused(newer, resume);
  auto optimizer = make(parameters);
  EXPECT_TRUE(has_note(*optimizer, "cannot commit as long as it is there"));
  train(parameters, *optimizer, 0, 1);
  expect_refused(newer, [&] { optimizer->commit(); });
  expect_refused(newer, [&] { optimizer->start_commit(); });
  EXPECT_FALSE(is_file(temp_ / kFile));
  unlink(newer.c_str());
  optimizer->commit();
  std::ofstream(newer) << "Python's";
  train(parameters, *optimizer, 1, 2);
  optimizer->commit();  // What it has begun, it may go on with.
  optimizer->close();
  expect_refused(newer, resume);
  // An older one is what a store of one process has replaced.
  const std::string older = temp_ / "state.r1-of-2.e0.d0.store";
  const std::string mine = temp_ / "state.r0-of-1.e1.d0.store";
  std::rename(newer.c_str(), older.c_str());
  expect_refused(older, resume);  // Nothing says which is the newer.
  std::rename((temp_ / kFile).c_str(), mine.c_str());
  EXPECT_TRUE(has(text_of<std::invalid_argument>(resume), "another store's"));
  unlink(older.c_str());
  unlink(mine.c_str());
}

TEST_F(OffloadedAdamWCommitTest, WhatCannotBeCommittedIsRefused) {
  const Tensors parameters = make_parameters();
  auto optimizer = make(parameters);
  train(parameters, *optimizer, 0, 1);
  EXPECT_THROW(optimizer->commit({}, {.keep = 0}), std::invalid_argument);
  EXPECT_THROW(optimizer->commit(std::uint64_t{1} << 63),
               std::invalid_argument);
  auto& group = optimizer->param_groups()[0];
  group.options().set_lr(-1);
  EXPECT_THROW(optimizer->commit(), std::invalid_argument);
  group.options().set_lr(1e-2);
  group.params().push_back(parameters[1]);
  EXPECT_TRUE(has(text_of<std::invalid_argument>([&] { optimizer->commit(); }),
                  "is in the groups twice"));
  group.params().pop_back();
  const at::Tensor wide = at::ones({3}, at::kDouble);
  group.params().push_back(wide);
  optimizer->commit();  // A frozen one may be anything.
  wide.requires_grad_(true);
  EXPECT_TRUE(has(text_of<TypeError>([&] { optimizer->commit(); }),
                  "parameter 4 of group 0 (dtype Double"));
  group.params().pop_back();
  group.params().erase(group.params().begin());
  optimizer->commit();
  EXPECT_TRUE(has_note(*optimizer, "parameters that are in no group"));
  optimizer->close();
  EXPECT_THROW(optimizer->commit(), StateError);
  EXPECT_THROW(optimizer->rollback(), StateError);
  EXPECT_THROW(optimizer->commits(), StateError);

  const StoreDir elsewhere;
  StateOptions unchecked = offload();
  unchecked.nvme_path = elsewhere.path();
  unchecked.verify = false;
  OffloadedAdamW other(parameters, OffloadedAdamWOptions(), unchecked);
  EXPECT_TRUE(has(text_of<StateError>([&] { other.commit(); }), "verify"));
  EXPECT_FALSE(is_file(elsewhere / kFile));
}

TEST_F(OffloadedAdamWCommitTest, ParametersMayStayTheCallers) {
  const Tensors parameters = make_parameters();
  auto optimizer = make(parameters);
  train(parameters, *optimizer, 0, 1);
  optimizer->commit(1);
  optimizer->commit(2, {.include_parameters = false});
  const Tensors kept = copies(parameters);
  EXPECT_TRUE(
      has(text_of<std::invalid_argument>([&] { optimizer->rollback(); }),
          "the commit of step 2 has no parameters"));
  EXPECT_TRUE(equal(parameters, kept));
  optimizer->close();
  const Tensors others = make_parameters();
  const Tensors before = copies(others);
  optimizer = OffloadedAdamW::resume(others, offload());
  EXPECT_TRUE(equal(others, before));
  EXPECT_EQ(optimizer->state_dict().size(), 3u);
}

TEST_F(OffloadedAdamWCommitTest, ExtraIsAnyBytes) {
  const Tensors parameters = make_parameters();
  std::string every;
  for (int i = 0; i < 1000; ++i) every += static_cast<char>(i % 256);
  auto optimizer = make(parameters);
  optimizer->commit(0, {.extra = every});
  EXPECT_EQ(optimizer->committed_extra(), every);
  optimizer->close();
  EXPECT_EQ(OffloadedAdamW::resume(parameters, offload())->committed_extra(),
            every);
}

TEST_F(OffloadedAdamWCommitTest, OptionsComeBackWhereTheyWere) {
  const Tensors parameters = make_parameters();
  const auto optimizer = make(parameters);
  optimizer->commit();
  auto& options = static_cast<OffloadedAdamWOptions&>(
      optimizer->param_groups()[0].options());
  options.lr(7).betas({0.1, 0.2}).eps(1).weight_decay(2).maximize(true);
  auto& defaults = static_cast<OffloadedAdamWOptions&>(optimizer->defaults());
  defaults.lr(8);
  optimizer->rollback();
  for (const OffloadedAdamWOptions* each : {&options, &defaults}) {
    EXPECT_EQ(each->lr(), 1e-2);
    EXPECT_EQ(each->betas(), std::make_tuple(0.9, 0.999));
    EXPECT_EQ(each->eps(), 1e-8);
    EXPECT_EQ(each->weight_decay(), 1e-2);
    EXPECT_FALSE(each->maximize());
  }
  optimizer->close();
  // Those that a resume is given do not count, which is said.
  const auto with = [&](std::unique_ptr<torch::optim::OptimizerOptions> given) {
    std::vector<OptimizerParamGroup> groups;
    groups.emplace_back(parameters, std::move(given));
    return groups;
  };
  const std::string said = "the options of the groups are the commit's";
  for (const bool same : {true, false}) {
    const auto resumed = OffloadedAdamW::resume(
        with(std::make_unique<OffloadedAdamWOptions>(same ? 1e-2 : 1e-3)),
        offload());
    EXPECT_EQ(has_note(*resumed, said), !same);
    EXPECT_EQ(resumed->param_groups()[0].options().get_lr(), 1e-2);
  }
  const auto resumed = OffloadedAdamW::resume(
      with(std::make_unique<torch::optim::AdamWOptions>()), offload());
  EXPECT_TRUE(has_note(*resumed, said));
  train(parameters, *resumed, 0, 1);
}

TEST_F(OffloadedAdamWCommitTest, AGraphSeesThatParametersHaveChanged) {
  // The second is written element by element, past PyTorch's operators.
  const Tensors parameters = {
      at::ones({20, 30}).requires_grad_(true),
      at::ones({20, 30}).t().requires_grad_(true),
  };
  const auto optimizer = make(parameters);
  optimizer->commit();
  for (const at::Tensor& parameter : parameters) {
    const at::Tensor loss = parameter.square().sum();
    optimizer->rollback();
    EXPECT_TRUE(has(text_of<c10::Error>([&] { loss.backward(); }),
                    "modified by an inplace operation"));
  }
}

TEST_F(OffloadedAdamWCommitTest, OtherLayoutsInMemoryComeBack) {
  const auto made = [] {
    return Tensors{
        at::arange(60000, at::kFloat).view({200, 300}).t().requires_grad_(true),
        at::ones({}).requires_grad_(true)};
  };
  const Tensors parameters = made();
  auto optimizer = make(parameters);
  train(parameters, *optimizer, 0, 2);
  optimizer->commit();
  const Tensors kept = copies(parameters);
  train(parameters, *optimizer, 2, 4);
  optimizer->close();
  const Tensors others = made();
  optimizer = OffloadedAdamW::resume(others, offload());
  EXPECT_TRUE(equal(others, kept));
  train(others, *optimizer, 2, 4);
  EXPECT_TRUE(equal(others, parameters));
}

// tests/python/test_commit_cpp.py calls this with folders, one on a line. Each
// has the store of a training that Python began, or is empty. Its name has the
// dtype and the format.
TEST(CommitOfPythonTest, GoesOnInCpp) {
  const char* const folders = std::getenv("TORCH_EXT_TEST_COMMITS");
  if (folders == nullptr) GTEST_SKIP() << "TORCH_EXT_TEST_COMMITS is not set";
  std::istringstream lines(folders);
  for (std::string folder; std::getline(lines, folder);) {
    const std::string name = folder.substr(folder.rfind('/') + 1);
    const c10::ScalarType dtype = has(name, "bfloat16")  ? at::kBFloat16
                                  : has(name, "float16") ? at::kHalf
                                                         : at::kFloat;
    const Tensors parameters = {
        at::arange(30000, at::kFloat).div(30000).to(dtype).view({100, 300}),
        at::ones({5}, at::kByte), at::ones({700}, dtype)};
    for (const std::size_t i : {0u, 2u}) parameters[i].requires_grad_(true);
    StateOptions with{.nvme_path = folder,
                      .host_memory = std::uint64_t{1} << 20};
    std::unique_ptr<OffloadedAdamW> optimizer;
    if (is_file(folder + "/" + StoreName().newest_in(folder).of_file(0))) {
      optimizer = OffloadedAdamW::resume(
          {OptimizerParamGroup({parameters[0], parameters[1]}),
           OptimizerParamGroup({parameters[2]})},
          with);
    } else {
      with.state_format = parse_state_format(name.substr(name.rfind('-') + 1));
      with.seed = 7;
      optimizer = std::make_unique<OffloadedAdamW>(
          std::vector<OptimizerParamGroup>{
              OptimizerParamGroup({parameters[0], parameters[1]}),
              OptimizerParamGroup(
                  {parameters[2]},
                  std::make_unique<OffloadedAdamWOptions>(
                      OffloadedAdamWOptions(1e-3).betas({0.8, 0.99})))},
          OffloadedAdamWOptions(1e-2), with);
    }
    for (int step = 0; step < 3; ++step) {
      for (const std::size_t i : {0u, 2u}) {
        parameters[i].mutable_grad() =
            parameters[i].detach().mul(0.5).add(0.25);
      }
      optimizer->step();
    }
    for (const std::string& note : optimizer->notes()) {
      std::cout << name << ": " << note << "\n";
    }
    optimizer->commit({},
                      {.extra = optimizer->committed_extra() + "\xff and C++"});
  }
}

}  // namespace
}  // namespace torch_ext
