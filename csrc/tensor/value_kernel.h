#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <span>
#include <vector>

#include "dense_tensor.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// Moves tensors to the values of a commit, or back. A value has the tensor's
/// elements in row-major order, whatever its strides are.
class ValueKernel final : public UpdateKernel {
 public:
  enum class Direction { kToCommit, kFromCommit };

  ValueKernel(const std::vector<at::Tensor>& tensors, Direction direction)
      : direction_(direction) {
    for (const at::Tensor& tensor : tensors) {
      tensors_.emplace_back(tensor, row_major(tensor.sizes()));
    }
  }

  static std::vector<CommittedValue> values_of(
      const std::vector<at::Tensor>& tensors) {
    std::vector<CommittedValue> values;
    for (const at::Tensor& tensor : tensors) {
      values.push_back({static_cast<std::uint64_t>(tensor.numel()),
                        static_cast<std::uint32_t>(tensor.dtype().itemsize())});
    }
    return values;
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const OrderedReader& tensor = tensors_.at(segment.parameter);
      if (direction_ == Direction::kToCommit) {
        tensor.copy_to(segment.fields[0], segment.first, segment.count);
      } else {
        tensor.write(segment.fields[0], segment.first, segment.count);
      }
    }
  }

 private:
  static std::vector<std::int64_t> row_major(at::IntArrayRef sizes) {
    std::vector<std::int64_t> strides(sizes.size());
    std::int64_t next = 1;
    for (std::size_t i = sizes.size(); i-- > 0;) {
      strides[i] = next;
      next *= std::max<std::int64_t>(sizes[i], 1);
    }
    return strides;
  }

  const Direction direction_;
  std::vector<OrderedReader> tensors_;
};

}  // namespace torch_ext
