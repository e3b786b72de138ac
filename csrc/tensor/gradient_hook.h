#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <typeinfo>
#include <utility>

namespace torch_ext {

/// Calls a function when backward has accumulated a parameter's gradient. It
/// comes after the hooks that the parameter has already.
class GradientHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  using Function = std::function<void(const at::Tensor& parameter)>;

  /// The function is not called once `owner` is gone.
  static void add(const at::Tensor& parameter,
                  const std::shared_ptr<const Function>& owner) {
    auto& hooks = torch::autograd::impl::post_acc_grad_hooks(parameter);
    hooks = std::unique_ptr<PostAccumulateGradHook>(
        new GradientHook(owner, std::move(hooks)));
  }

  void operator()(const at::Tensor& parameter) override {
    if (before_ != nullptr) (*before_)(parameter);
    if (const auto function = function_.lock()) (*function)(parameter);
  }

 private:
  GradientHook(std::weak_ptr<const Function> function,
               std::unique_ptr<PostAccumulateGradHook> before)
      : function_(std::move(function)), before_(std::move(before)) {}

  std::weak_ptr<const Function> function_;
  std::unique_ptr<PostAccumulateGradHook> before_;
};

/// Whether a hook comes after those of the parameter's gradient, and may change
/// the gradient. DistributedDataParallel's hooks do: they average it over
/// processes.
inline bool may_change_later(const at::Tensor& parameter) {
  const auto node = torch::autograd::impl::try_get_grad_accumulator(parameter);
  return node != nullptr && !node->post_hooks().empty();
}

/// Whether the backward pass that calls a hook on this thread has reentrant
/// activation checkpointing in it. That is a function whose backward
/// recomputes, and runs a backward pass of its own. Gradients then come in
/// parts, and what has been updated meanwhile is read again. Only the name
/// shows it: Python's torch.utils.checkpoint, and others with such a name, such
/// as DeepSpeed's.
inline bool has_reentrant_checkpoint() {
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr) return false;
  return std::any_of(
      nodes->begin(), nodes->end(), [](torch::autograd::Node* node) {
        const auto contains = [](std::string_view text, const char* part) {
          return text.find(part) != std::string_view::npos;
        };
        // A node's name is made on demand, and slowly. There may be 100,000
        // nodes.
        const char* const type = typeid(*node).name();
        return contains(type, "heckpoint") ||
               (contains(type, "PyNode") &&
                contains(node->name(), "heckpoint"));
      });
}

/// Puts a tensor in place of a gradient that an optimizer has taken. It is on
/// the meta device, so whoever asks for its values, or adds to it, gets an
/// error.
inline void mark_as_taken(const at::Tensor& parameter) {
  parameter.mutable_grad() =
      at::empty_strided(parameter.sizes(), parameter.strides(),
                        parameter.options().device(c10::kMeta));
}

inline bool is_taken(const at::Tensor& parameter) {
  return parameter.grad().defined() && parameter.grad().is_meta();
}

}  // namespace torch_ext
