#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext::test {

/// A small training with commits. State and parameters follow from the number
/// of steps alone, so what a commit must hold is computed in memory.
class CommitTraining {
 public:
  static constexpr std::size_t kBlock = 4096;
  static constexpr std::size_t kTile = 2 * kBlock;

  /// `buffers`: of 13 tiles so many may be in memory.
  static TileOptions options(
      const std::vector<std::filesystem::path>& directories, int buffers,
      std::string engine = "threads") {
    TileOptions options;
    for (const auto& path : directories) {
      options.store.directory.all().push_back({path});
    }
    options.store.aio.block_size = kBlock;
    options.store.aio.queue_depth = 8;
    options.store.engine = std::move(engine);
    options.tile_bytes = kTile;
    options.host_memory = static_cast<std::uint64_t>(buffers) * kTile;
    return options;
  }

  explicit CommitTraining(const TileOptions& options)
      : offload_(std::make_unique<OptimizerOffload>(options)) {
    for (const std::uint64_t size : kSizes) {
      offload_->add_parameter(size, StateFields::floats(1));
      parameters_.emplace_back(size, kFirst);
    }
  }

  /// Errors: those of OptimizerOffload::resume().
  static std::unique_ptr<CommitTraining> resume(
      const TileOptions& options, const CommitChoice& choice = {}) {
    std::unique_ptr<CommitTraining> training(new CommitTraining);
    training->offload_ = OptimizerOffload::resume(options, choice);
    training->step_ = training->offload_->commits().back().step;
    for (const std::uint64_t size : kSizes) {
      training->parameters_.emplace_back(size);
    }
    Function take = training->values_from_commit();
    training->offload_->read_values(take);
    return training;
  }

  void step() {
    ++step_;
    std::vector<std::size_t> all(kSizes.size());
    std::iota(all.begin(), all.end(), 0);
    Function update = update_of_step();
    offload_->step(all, update);
  }

  /// The same step, whose parameters become active one by one.
  void open_step() {
    ++step_;
    Function update = update_of_step();
    offload_->begin_step(update);
    for (std::size_t i = kSizes.size(); i-- > 0;) offload_->release(i);
    offload_->end_step();
  }

  /// Says that the last step has failed and changed nothing.
  void take_back() { --step_; }

  void commit(std::size_t keep = 1, const CommitGroup& group = {}) {
    Function give = values_to_commit();
    offload_->commit(step_, "after " + std::to_string(step_), values(), give,
                     keep, group);
  }

  CommitTicket start_commit(std::size_t keep = 1) {
    return offload_->start_commit(
        step_, "after " + std::to_string(step_), values(),
        std::make_unique<Function>(values_to_commit()), keep);
  }

  void rollback(std::uint64_t generation) {
    Function take = values_from_commit();
    offload_->rollback(generation, take);
    step_ = generation_step(generation);
  }

  /// Called with each segment, before a commit reads the value, and after a
  /// step has updated it.
  std::function<void(const StateSegment&)> on_read = {};
  std::function<void(const StateSegment&)> on_update = {};

  /// Returns what is not as in memory; an empty text if nothing.
  std::string wrong() {
    const auto& [states, values] = expected(step_);
    const auto commits = offload_->commits();
    if (!commits.empty() &&
        commits.back().document !=
            "after " + std::to_string(commits.back().step)) {
      return "the document is another's";
    }
    if (values != parameters_) return "a value is wrong";
    std::string found;
    Function compare([&](const StateSegment& segment) {
      if (!std::equal(segment.field<std::uint32_t>(0),
                      segment.field<std::uint32_t>(0) + segment.count,
                      states[segment.parameter].data() + segment.first)) {
        found = "state of parameter " + std::to_string(segment.parameter) +
                " is wrong";
      }
    });
    offload_->read_state(compare);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      if (offload_->step_of(i) != step_) found = "a number of steps is wrong";
    }
    return found;
  }

  using Arrays = std::vector<std::vector<std::uint32_t>>;
  /// State and values after so many steps.
  static const std::pair<Arrays, Arrays>& expected(std::uint64_t steps) {
    thread_local std::map<std::uint64_t, std::pair<Arrays, Arrays>> known;
    if (known.empty()) {
      for (const std::uint64_t size : kSizes) {
        known[0].first.emplace_back(size, 0);
        known[0].second.emplace_back(size, kFirst);
      }
    }
    for (std::uint64_t i = known.rbegin()->first + 1; i <= steps; ++i) {
      auto& [states, values] = known[i] = known[i - 1];
      for (std::size_t p = 0; p < kSizes.size(); ++p) {
        for (std::uint64_t e = 0; e < kSizes[p]; ++e) {
          advance(states[p][e], values[p][e], e, i);
        }
      }
    }
    return known.at(steps);
  }

  std::uint64_t steps() const { return step_; }
  /// The last commit's. REQUIRES: there is one.
  std::uint64_t generation() const {
    return offload_->commits().back().generation;
  }
  OptimizerOffload& offload() { return *offload_; }

 private:
  static constexpr std::array<std::uint64_t, 5> kSizes = {5000, 300, 9000, 1,
                                                          12000};
  static constexpr std::uint32_t kFirst = 7;

  struct Function final : UpdateKernel {
    explicit Function(std::function<void(const StateSegment&)> work)
        : work(std::move(work)) {}
    void update(std::span<const StateSegment> segments) override {
      for (const StateSegment& segment : segments) work(segment);
    }
    std::function<void(const StateSegment&)> work;
  };

  CommitTraining() = default;

  Function update_of_step() {
    return Function([this](const StateSegment& segment) {
      for (std::uint64_t i = 0; i < segment.count; ++i) {
        advance(segment.field<std::uint32_t>(0)[i],
                parameters_[segment.parameter][segment.first + i],
                segment.first + i, segment.step);
      }
      if (on_update) on_update(segment);
    });
  }
  static std::vector<CommittedValue> values() {
    std::vector<CommittedValue> values;
    for (const std::uint64_t size : kSizes) values.push_back({size, 4});
    return values;
  }
  Function values_to_commit() {
    return Function([this](const StateSegment& segment) {
      if (on_read) on_read(segment);
      std::copy_n(parameters_[segment.parameter].data() + segment.first,
                  segment.count, segment.field<std::uint32_t>(0));
    });
  }
  Function values_from_commit() {
    return Function([this](const StateSegment& segment) {
      std::copy_n(segment.field<std::uint32_t>(0), segment.count,
                  parameters_[segment.parameter].data() + segment.first);
    });
  }
  std::uint64_t generation_step(std::uint64_t generation) {
    for (const auto& commit : offload_->commits()) {
      if (commit.generation == generation) return commit.step;
    }
    return 0;
  }

  /// A step of one element: each depends on the step before.
  static void advance(std::uint32_t& state, std::uint32_t& value,
                      std::uint64_t element, std::uint64_t step) {
    state = state * 2'654'435'761u + static_cast<std::uint32_t>(element + step);
    value = value * 31 + state;
  }

  std::unique_ptr<OptimizerOffload> offload_;
  Arrays parameters_;
  std::uint64_t step_ = 0;
};

}  // namespace torch_ext::test
