#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adamw_hyper.h"
#include "adamw_offload.h"
#include "gradient_hook.h"
#include "state_checks.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

/// A step that begins in backward. The Python and the C++ optimizer share it;
/// each brings its hooks, the mark that it puts in place of a gradient, and the
/// names of parameters. With `takes`, which is "update":
///
/// 1. A hook asks wants() about each gradient that backward has accumulated. A
///    second one of a parameter is refused, since it would not be counted. What
///    may not be complete yet is left to step().
/// 2. With the first gradient, begin() notes the groups. It gives parameters
///    without state room, so that the first step need not keep all gradients.
/// 3. take() hands over the gradient, with the options that fix() kept when the
///    group's first gradient came. The caller puts a mark in its place.
/// 4. step() asks refusal() about what it finds in place of each gradient, and
///    takes the gradients that were left to it.
/// 5. finish() ends the step. It says what was changed meanwhile that the step
///    had used already. The step is made all the same.
///
/// Without `takes`, which is "prefetch", a gradient that wants() lets through
/// is only copied to the host, and none of the rest is called.
///
/// Errors: StateError, and what the offload throws. Threads: one call at a
/// time.
class BackwardStep {
 public:
  using Parameter = AdamWOffload::Parameter;
  /// The slots of the parameters of each group.
  using Slots = std::vector<std::vector<std::size_t>>;

  /// What the caller has done that is not allowed, or nothing. The name of the
  /// parameter, if it is defined, goes before the text.
  using Complaint = std::pair<std::string, at::Tensor>;

  BackwardStep(AdamWOffload& offload, bool takes)
      : offload_(offload), takes_(takes) {}

  /// Whether a hook is to hand over the gradient that it was called with. For a
  /// DTensor, `gradient` is this process's part. `is_nested` returns whether
  /// this backward pass is within another. It is asked once in a pass.
  bool wants(std::size_t slot, const at::Tensor& parameter,
             const at::Tensor& gradient,
             const std::function<bool()>& is_nested) {
    if (may_change_later(parameter)) {
      if (!takes_) return false;
      fail<StateError>(
          offload_.name(),
          "a hook, such as DistributedDataParallel's, changes gradients after "
          "backward has accumulated them, which overlap_backward=\"update\" "
          "would not see: take \"prefetch\", or no overlap, or FSDP2");
    }
    if (!takes_) return true;
    if (taken_.contains(slot)) {
      fail<StateError>(
          offload_.name(),
          "a second backward pass before step(), or within another, as "
          "activation checkpointing of your own may make it: its gradient "
          "would not be counted. All but the last go inside `with "
          "optimizer.accumulate():`, in C++ an AccumulateGuard; with passes "
          "within another use overlap_backward=\"prefetch\". If backward was "
          "interrupted, step() ends the step with what it had taken, and "
          "zero_grad() drops the rest");
    }
    // FSDP2's CPUOffloadPolicy copies gradients from a device to page-locked
    // memory, which may last until backward ends.
    const bool may_be_late = gradient.is_cpu() && gradient.is_pinned();
    return !comes_in_parts(is_nested) && !may_be_late;
  }

  /// Whether a gradient was taken in a step that has not ended.
  bool is_open() const { return !taken_.empty(); }

  /// Begins a step. `trained`: the parameters that require a gradient, in the
  /// groups' order. Errors: as AdamWOffload::check().
  void begin(const Slots& groups, std::vector<Parameter> trained) {
    std::erase_if(trained, [this](const Parameter& parameter) {
      return offload_.has_state(parameter.slot);
    });
    // Backward mostly goes the other way round.
    std::reverse(trained.begin(), trained.end());
    if (!trained.empty()) offload_.make_room(trained);
    groups_ = groups_of(groups);
    begun_groups_ = groups.size();
    options_.clear();
  }

  /// Returns the group that a parameter was in when the step began. None: it is
  /// not trained any more.
  std::optional<std::size_t> group_of(std::size_t slot) const {
    const auto found = groups_.find(slot);
    if (found == groups_.end()) return {};
    return found->second;
  }

  /// As group_of(). For a parameter that joined later, `now` is its group now,
  /// which gets a number of its own.
  std::size_t group_or(std::size_t slot, std::size_t now) const {
    return group_of(slot).value_or(begun_groups_ + now);
  }

  /// Fixes a group's options for the rest of the step, unless that is done.
  /// `options()` returns them as they are now, or nothing if the parameter is
  /// in no group any more. Returns whether they are fixed.
  bool fix(std::size_t group,
           const std::function<std::optional<AdamWHyper>()>& options) {
    if (options_.contains(group)) return true;
    const std::optional<AdamWHyper> found = options();
    if (found) options_.emplace(group, *found);
    return found.has_value();
  }

  /// Takes a gradient of a group whose options are fixed. For a DTensor,
  /// `trained` has this process's part of the parameter `whole`.
  void take(std::size_t group, const AdamWOffload::Trained& trained,
            const at::Tensor& whole) {
    const AdamWHyper& hyper = options_.at(group);
    offload_.take(hyper, trained);
    if (!whole.is_same(trained.parameter.tensor) && !whole.is_inference()) {
      whole.unsafeGetTensorImpl()->bump_version();
    }
    taken_[trained.parameter.slot] = {whole, hyper, version_of(whole)};
  }

  /// Returns the whole parameters that were taken.
  std::vector<at::Tensor> taken() const {
    std::vector<at::Tensor> all;
    for (const auto& [slot, taken] : taken_) all.push_back(taken.whole);
    return all;
  }

  /// Says why step() cannot take what it finds in place of a gradient. Empty:
  /// it can. The parameter's name goes before it.
  std::string refusal(std::size_t slot, bool is_mark) const {
    const bool taken = taken_.contains(slot);
    // After a complaint it may be the same step once more.
    if (is_mark && !taken && !complained_) {
      return "has had its gradient taken by an earlier step, which would not "
             "be counted again: call zero_grad() after each step";
    }
    if (!is_mark && taken) {
      return "has got a gradient after the one of this step was taken, which "
             "would not be counted: zero_grad() drops it, step() then ends the "
             "step";
    }
    return {};
  }

  /// Ends the step. The groups are given as they are now. Options that cannot
  /// be used are none. Errors: as AdamWOffload::finish(). The step has ended
  /// then too.
  Complaint finish(const Slots& groups,
                   const std::vector<std::optional<AdamWHyper>>& options) {
    Complaint complaint = complaint_about(groups_of(groups), options);
    complained_ = !complaint.first.empty();
    reset();
    offload_.finish();
    return complaint;
  }

  /// Forgets a step that the offload has given up. Returns what was taken.
  std::vector<at::Tensor> reset() {
    std::vector<at::Tensor> all = taken();
    taken_.clear();
    options_.clear();
    in_parts_ = false;
    return all;
  }

 private:
  struct Taken {
    at::Tensor whole;
    AdamWHyper hyper;
    std::int64_t version = 0;
  };

  static std::map<std::size_t, std::size_t> groups_of(const Slots& groups) {
    std::map<std::size_t, std::size_t> group_of;
    for (std::size_t i = 0; i < groups.size(); ++i) {
      for (const std::size_t slot : groups[i]) group_of[slot] = i;
    }
    return group_of;
  }

  /// A number that grows when others than the update write to a parameter. On a
  /// device one cannot tell.
  static std::int64_t version_of(const at::Tensor& tensor) {
    return tensor.is_cpu() && !tensor.is_inference() ? tensor._version() : 0;
  }

  /// Reentrant activation checkpointing begins backward passes within one.
  /// These would read again what has been updated.
  bool comes_in_parts(const std::function<bool()>& is_nested) {
    const int pass = torch::autograd::get_current_graph_task_id();
    if (std::exchange(pass_, pass) != pass &&
        (has_reentrant_checkpoint() || is_nested())) {
      in_parts_ = true;
      offload_.note(
          "reentrant activation checkpointing brings gradients in parts: with "
          "overlap_backward=\"update\" such backward passes keep their "
          "gradients, and step() updates the parameters. To update them during "
          "backward, pass use_reentrant=False to "
          "torch.utils.checkpoint.checkpoint");
    }
    return in_parts_;
  }

  Complaint complaint_about(
      const std::map<std::size_t, std::size_t>& group_of,
      const std::vector<std::optional<AdamWHyper>>& options) const {
    const std::string between =
        " between backward() and step(). With overlap_backward=\"update\" ";
    for (const auto& [slot, taken] : taken_) {
      const auto group = group_of.find(slot);
      if (group == group_of.end()) {
        return {"was taken out of param_groups" + between +
                    "it is updated by the step that backward() has begun, and "
                    "its state goes on: change groups after step()",
                taken.whole};
      }
      if (options[group->second] != taken.hyper) {
        return {"options of param_groups[" + std::to_string(group->second) +
                    "] were changed" + between +
                    "the step has used the ones that it found in backward(): "
                    "change them after step()",
                {}};
      }
    }
    for (const auto& [slot, taken] : taken_) {
      if (version_of(taken.whole) == taken.version) continue;
      return {"was changed" + between +
                  "it is being updated then, and what was written is lost, or "
                  "not: change parameters after step()",
              taken.whole};
    }
    return {};
  }

  AdamWOffload& offload_;
  const bool takes_;
  // The group of each slot, and how many groups there were, at begin().
  std::map<std::size_t, std::size_t> groups_;
  std::size_t begun_groups_ = 0;
  std::map<std::size_t, AdamWHyper> options_;  // What fix() kept, by group.
  std::map<std::size_t, Taken> taken_;         // By slot.
  int pass_ = -1;            // In which the last gradient came.
  bool in_parts_ = false;    // Whether this step's gradients may come so.
  bool complained_ = false;  // About the last step.
};

}  // namespace torch_ext
