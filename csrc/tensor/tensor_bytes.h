#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <c10/core/GradMode.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "../base/mutex.h"
#include "c10_device.h"
#include "dense_tensor.h"
#include "memory_in_flight.h"
#include "plain_modes.h"
#include "tensor_check.h"
#include "torch_ext/device/device.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {

/// Makes the bytes that a Swapper or FileTransfer moves out of tensors, and has
/// the devices that they are on. While a tensor's memory is used, its storage
/// cannot be resized. Memory that one operation writes may not be given to
/// another: std::invalid_argument; see MemoryInFlight. A device's memory is in
/// use until the last copy is queued. From then on the streams keep the order,
/// for a caller who has waited. It outlives what it is given to. Threads: any.
class TensorBytes {
 public:
  /// Returns the elements of any dense strided tensor, packed. Errors:
  /// TypeError, std::invalid_argument; see check_has_plain_memory().
  DeviceBytes source(const at::Tensor& tensor, const std::string& operation) {
    check_has_plain_memory(tensor, operation);
    if (is_packed(tensor)) {
      DeviceBytes bytes = of(tensor, Direction::kOut);
      bytes.fixed = in_flight_.source(tensor, operation);
      return bytes;
    }
    const PlainModes plain;
    return of(tensor.detach().resolve_conj().resolve_neg().contiguous(),
              Direction::kOut);
  }

  /// Returns where the packed elements of `tensor` come to. They are put in
  /// their places when the last one has come. `tensor` has passed
  /// check_is_destination().
  DeviceBytes destination(const at::Tensor& tensor,
                          const std::string& operation) {
    if (is_packed(tensor)) {
      DeviceBytes bytes = of(tensor, Direction::kIn);
      bytes.fixed = in_flight_.destination(tensor, operation);
      return bytes;
    }
    const PlainModes plain_modes;
    const at::Tensor plain = tensor.detach();
    const at::Tensor packed = at::empty(
        plain.sizes(),
        at::TensorOptions().dtype(plain.scalar_type()).device(plain.device()));
    check_has_plain_memory(packed, operation);
    DeviceBytes bytes = of(packed, Direction::kIn);
    auto kept =
        std::make_shared<std::pair<at::Tensor, at::Tensor>>(plain, packed);
    bytes.on_arrival = [pair = kept.get()](Device& on) {
      unpack(pair->first, pair->second, on);
    };
    bytes.keep_alive = std::move(kept);
    bytes.fixed = MemoryInFlight::lock_storage(tensor);
    return bytes;
  }

 private:
  enum class Direction { kOut, kIn };

  static bool is_packed(const at::Tensor& tensor) {
    return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
  }

  static void unpack(const at::Tensor& to, const at::Tensor& packed,
                     Device& device) {
    const c10::NoGradGuard no_grad;
    // The caller has checked the destination, in its own mode, where it is
    // allowed.
    const at::AutoDispatchBelowADInplaceOrView plain;
    if (to.is_cpu()) {
      copy_in_pieces(to, packed);
    } else {
      static_cast<C10Device&>(device).copy(to, packed);
    }
  }

  // There are two devices, and so two copy streams. A swap-out that waits for a
  // long kernel must not hold up the swap-ins behind it.
  std::shared_ptr<Device> device_of(const at::Tensor& tensor,
                                    Direction direction) {
    if (tensor.is_cpu()) return host_device();
    const MutexLock lock(mutex_);
    auto& device = devices_[{tensor.device(), direction}];
    if (device == nullptr) device = device_for(tensor.device());
    return device;
  }

  DeviceBytes of(const at::Tensor& contiguous, Direction direction) {
    return {.device = device_of(contiguous, direction),
            .data = static_cast<std::byte*>(
                const_cast<void*>(contiguous.const_data_ptr())),
            .size = static_cast<std::uint64_t>(contiguous.nbytes()),
            // This is not the tensor: whoever drops the last reference to a
            // tensor that Python knows must hold the GIL.
            .keep_alive = std::make_shared<c10::Storage>(contiguous.storage())};
  }

  struct Less {
    using Key = std::pair<c10::Device, Direction>;
    bool operator()(const Key& a, const Key& b) const {
      const auto order = [](const Key& key) {
        return std::tuple(key.first.type(), key.first.index(), key.second);
      };
      return order(a) < order(b);
    }
  };

  MemoryInFlight in_flight_;
  Mutex mutex_;
  std::map<Less::Key, std::shared_ptr<Device>, Less> devices_
      GUARDED_BY(mutex_);
};

}  // namespace torch_ext
