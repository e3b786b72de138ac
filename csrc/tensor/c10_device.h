#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "torch_ext/base/error.h"
#include "torch_ext/device/cuda_runtime.h"
#include "torch_ext/device/device.h"

namespace torch_ext {

/// Any accelerator of PyTorch as a Device, through c10's generic streams and
/// events. Its copy stream is one of PyTorch's pool. It needs no CUDA header.
///
/// Copies are asynchronous where PyTorch's are. On CUDA they always are to and
/// from memory that pin() has locked.
class C10Device final : public Device {
 public:
  /// The CUDA run-time, for what PyTorch does not offer: page-locking, telling
  /// whether a stream is being captured, thread-local capture mode.
  struct Runtime {
    std::shared_ptr<CudaRuntime> cuda;  ///< If null, none of the three is done.
    std::string why_not;                ///< Why it is null.
  };

  /// A `device` without an index means the calling thread's current one.
  /// Errors: c10::Error if there is no such device, or if it has no streams.
  explicit C10Device(c10::Device device)
      : C10Device(device, runtime_for(device.type())) {}

  C10Device(c10::Device device, Runtime runtime)
      : guard_(device.type()),
        device_(device.has_index() ? device : guard_.getDevice()),
        // The few kernels here, such as an optimizer's update, would wait for
        // all blocks of a long kernel that came before them. Copies to and from
        // the host know no priority.
        copy_stream_(guard_.getStreamFromGlobalPool(device_,
                                                    /*isHighPriority=*/true)),
        runtime_(std::move(runtime)) {}

  std::string name() const override { return device_.str(); }

  void enter_thread() override {
    // PyTorch puts the thread's device back after each call. Without this, it
    // would make a context on device 0.
    guard_.setDevice(device_);
    if (runtime_.cuda) runtime_.cuda->use_thread_local_capture_mode();
  }

  void pin(std::span<std::byte> memory) override {
    if (!runtime_.cuda) throw StateError(runtime_.why_not);
    runtime_.cuda->host_register(memory.data(), memory.size());
  }

  void unpin(std::span<std::byte> memory) noexcept override {
    if (runtime_.cuda) runtime_.cuda->host_unregister(memory.data());
  }

  /// The calling thread's current stream on this device, or the copy stream.
  /// Errors: StateError if the current one is being captured into a graph.
  c10::Stream stream(Stream which) const {
    if (which == Stream::kCopy) return copy_stream_;
    // An event in a graph is a node of the graph, and is never done.
    if (is_captured()) {
      throw StateError("the current stream of " + name() +
                       " is being captured into a graph; do this outside of "
                       "the capture");
    }
    return guard_.getStream(device_);
  }

  /// Whether the calling thread's current stream is being captured.
  bool is_captured() const {
    return runtime_.cuda && runtime_.cuda->is_capturing(
                                guard_.getStream(device_).native_handle());
  }

  EventPtr record(Stream which) override {
    auto event = std::make_shared<Event>(device_.type());
    event->event.record(stream(which));
    return event;
  }

  void wait(Stream which, const EventPtr& event) override {
    static_cast<const Event&>(*event).event.block(stream(which));
  }

  bool query(const EventPtr& event) override {
    return static_cast<const Event&>(*event).event.query();
  }

  void copy(std::byte* to, const std::byte* from, std::size_t bytes,
            bool to_host) override {
    const c10::Device cpu(c10::kCPU);
    const c10::StreamGuard on_copy_stream(copy_stream_);
    view(to, bytes, to_host ? cpu : device_)
        .copy_(view(from, bytes, to_host ? device_ : cpu),
               /*non_blocking=*/true);
  }

  /// Says that the copy stream uses the tensor's memory: see
  /// torch.Tensor.record_stream.
  void uses(const at::Tensor& tensor) {
    guard_.recordDataPtrOnStream(tensor.storage().data_ptr(), copy_stream_);
  }

  /// Queues `to.copy_(from)`, both on this device, on the copy stream.
  void copy(const at::Tensor& to, const at::Tensor& from) {
    const c10::StreamGuard on_copy_stream(copy_stream_);
    to.copy_(from, /*non_blocking=*/true);
  }

 private:
  struct Event final : DeviceEvent {
    explicit Event(c10::DeviceType type) : event(type) {}
    c10::Event event;
  };

  static Runtime runtime_for(c10::DeviceType type) {
    Runtime runtime;
    if (type == c10::kCUDA) {
      runtime.cuda = CudaRuntime::open({}, &runtime.why_not);
    } else {
      runtime.why_not = "not supported for devices of type " +
                        c10::DeviceTypeName(type, true);
    }
    return runtime;
  }

  // Naming the device saves PyTorch from asking the driver whose memory this
  // is.
  static at::Tensor view(const std::byte* data, std::size_t bytes,
                         c10::Device device) {
    return at::for_blob(const_cast<std::byte*>(data),
                        {static_cast<std::int64_t>(bytes)})
        .options(at::TensorOptions().dtype(at::kByte).device(device))
        .target_device(device)
        .make_tensor();
  }

  const c10::impl::VirtualGuardImpl guard_;
  const c10::Device device_;
  const c10::Stream copy_stream_;
  const Runtime runtime_;
};

/// Returns a new C10Device with a copy stream of its own. For the CPU it
/// returns host_device(), without touching any accelerator. Errors: as
/// C10Device.
inline std::shared_ptr<Device> device_for(c10::Device device) {
  if (device.is_cpu()) return host_device();
  return std::make_shared<C10Device>(device);
}

inline std::shared_ptr<Device> device_for(const at::Tensor& tensor) {
  return device_for(tensor.device());
}

}  // namespace torch_ext
