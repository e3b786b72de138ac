#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "c10_device.h"
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

  /// Makes another thread read tensors on devices after what the calling
  /// thread has queued there so far, on streams of its own. Errors: StateError
  /// during a graph's capture.
  void read_later() {
    for (const OrderedReader& tensor : tensors_) {
      const c10::Device device = tensor.source().device();
      if (device.is_cpu() || find(device) != nullptr) continue;
      Stream& stream = streams_.emplace_back(device);
      stream.ready.record(stream.device.stream(Device::Stream::kCurrent));
    }
  }

  void enter_thread() override {
    for (Stream& stream : streams_) {
      stream.device.enter_thread();
      stream.ready.block(stream.device.stream(Device::Stream::kCopy));
    }
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const OrderedReader& tensor = tensors_.at(segment.parameter);
      // A copy to the host waits for the stream that is current.
      std::optional<c10::StreamGuard> here;
      if (const Stream* stream = find(tensor.source().device())) {
        here.emplace(stream->device.stream(Device::Stream::kCopy));
      }
      if (direction_ == Direction::kToCommit) {
        tensor.copy_to(segment.fields[0], segment.first, segment.count);
      } else {
        tensor.write(segment.fields[0], segment.first, segment.count);
      }
    }
  }

 private:
  struct Stream {
    explicit Stream(c10::Device on) : device(on), of(on), ready(on.type()) {}
    C10Device device;
    c10::Device of;
    c10::Event ready;
  };

  Stream* find(c10::Device device) {
    const auto found = std::ranges::find(streams_, device, &Stream::of);
    return found != streams_.end() ? &*found : nullptr;
  }

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
  std::deque<Stream> streams_;  ///< One for each device, after read_later().
};

}  // namespace torch_ext
