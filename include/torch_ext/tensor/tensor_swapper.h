#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <c10/core/GradMode.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/swap/swapper.h"
#include "torch_ext/tensor/c10_device.h"
#include "torch_ext/tensor/dense_tensor.h"
#include "torch_ext/tensor/tensor_check.h"

namespace torch_ext {

/// An operation of a TensorSwapper. Copies share it; dropping it, and the
/// tensor, is always safe. Threads: any.
class TensorTicket {
 public:
  using Timeout = SwapTicket::Timeout;

  /// See SwapTicket::wait_source: from then on the tensor that was swapped
  /// out may be overwritten by work on the current stream.
  void wait_source(Timeout timeout = std::nullopt) const {
    ticket_.wait_source(timeout);
  }

  /// See SwapTicket::wait. For a swap_in, work that is queued afterwards on
  /// the stream current now sees the bytes.
  void wait(Timeout timeout = std::nullopt) const {
    ticket_.wait(timeout);
    if (!result_.defined() || result_.is_cpu()) return;
    // The current stream need not be the one that the memory was allocated
    // on: it may not be given away before that is through.
    const c10::impl::VirtualGuardImpl guard(result_.device().type());
    result_.record_stream(guard.getStream(result_.device()));
  }

  /// Whether wait() and wait_source() would return or throw now, after
  /// waiting for at most `timeout`.
  bool wait_for(std::chrono::nanoseconds timeout) const {
    return ticket_.wait_for(timeout);
  }
  bool wait_source_for(std::chrono::nanoseconds timeout) const {
    return ticket_.wait_source_for(timeout);
  }

  /// See SwapTicket::timed_out.
  TimeoutError timed_out(std::chrono::nanoseconds timeout) const {
    return ticket_.timed_out(timeout);
  }

  /// True once the bytes are on disk or in the destination, or it failed.
  bool done() const { return ticket_.done(); }

  /// wait(), then the tensor of a swap_in; undefined for a swap_out.
  at::Tensor result(Timeout timeout = std::nullopt) const {
    wait(timeout);
    return result_;
  }

 private:
  friend class TensorSwapper;

  explicit TensorTicket(SwapTicket ticket, at::Tensor result = {})
      : ticket_(std::move(ticket)), result_(std::move(result)) {}

  SwapTicket ticket_;
  at::Tensor result_;
};

/// A Swapper for tensors: any dense strided tensor on the CPU or an
/// accelerator, of any dtype, in any shape; a view is stored as exactly its
/// elements, packed. See Swapper for ordering, errors and threads.
class TensorSwapper {
 public:
  explicit TensorSwapper(const SwapperOptions& options) : swapper_(options) {}

  /// Stores the tensor's elements under `key` and returns at once.
  /// Errors here: TypeError for a tensor that has no plain memory (sparse,
  /// meta, quantized, nested, a Python subclass), and those of
  /// Swapper::swap_out.
  TensorTicket swap_out(const std::string& key, const at::Tensor& tensor) {
    check_has_plain_memory(tensor, "swap_out");
    c10::NoGradGuard no_grad;
    // detach(): a tensor that Python knows could not be dropped without the
    // GIL by whoever holds it last.
    const at::Tensor packed =
        tensor.detach().resolve_conj().resolve_neg().contiguous();
    auto meta = std::make_shared<const Meta>(
        Meta{tensor.sizes().vec(), tensor.scalar_type(), tensor.device()});
    return TensorTicket(swapper_.swap_out(
        key, bytes_of(packed, Direction::kOut), std::move(meta)));
  }

  /// Brings the key's tensor back, into `out` or a new tensor on `device`
  /// (none: where it came from), and returns at once. `out` may be any view
  /// with the stored shape and dtype whose elements do not overlap, but on a
  /// device no lazily conjugate or negative one; it is written in place,
  /// outside autograd.
  /// Errors here: KeyError; std::invalid_argument for another shape, dtype
  /// or device than asked for; TypeError as swap_out.
  TensorTicket swap_in(const std::string& key,
                       const std::optional<at::Tensor>& out = std::nullopt,
                       std::optional<c10::Device> device = std::nullopt) {
    const Swapper::Entry entry = swapper_.entry(key);
    const Meta& meta = *static_cast<const Meta*>(entry.tag().get());
    c10::NoGradGuard no_grad;
    at::Tensor result;
    if (out) {
      check_destination(key, *out, meta, device);
      result = *out;
      if (!out->is_inference()) out->unsafeGetTensorImpl()->bump_version();
    } else {
      result = empty(meta, device.value_or(meta.device));
      check_has_plain_memory(result, "swap_in");
    }
    const at::Tensor plain = result.detach();
    if (plain.is_contiguous() && !plain.is_conj() && !plain.is_neg()) {
      return TensorTicket(
          swapper_.swap_in(entry, bytes_of(plain, Direction::kIn)), result);
    }
    const at::Tensor packed = empty(meta, plain.device());
    check_has_plain_memory(packed, "swap_in");
    DeviceBytes bytes = bytes_of(packed, Direction::kIn);
    auto kept =
        std::make_shared<std::pair<at::Tensor, at::Tensor>>(plain, packed);
    bytes.on_arrival = [pair = kept.get()](Device& on) {
      unpack(pair->first, pair->second, on);
    };
    bytes.keep_alive = std::move(kept);
    return TensorTicket(swapper_.swap_in(entry, std::move(bytes)), result);
  }

  /// Forgets the key. Errors: KeyError; an unreported error of the key.
  void remove(const std::string& key) { swapper_.remove(key); }
  std::vector<std::string> keys() { return swapper_.keys(); }
  SwapperStats stats() const { return swapper_.stats(); }
  std::vector<std::string> notes() const { return swapper_.notes(); }
  const std::string& engine() const noexcept { return swapper_.engine(); }
  /// See Swapper::close.
  void close() { swapper_.close(); }

 private:
  struct Meta {
    std::vector<std::int64_t> sizes;
    c10::ScalarType dtype;
    c10::Device device;
  };
  enum class Direction { kOut, kIn };

  static at::Tensor empty(const Meta& meta, c10::Device device) {
    return at::empty(meta.sizes,
                     at::TensorOptions().dtype(meta.dtype).device(device));
  }

  static void unpack(const at::Tensor& to, const at::Tensor& packed,
                     Device& device) {
    const c10::NoGradGuard no_grad;
    // The destination was checked by the caller, in whose mode it was allowed.
    const at::AutoDispatchBelowADInplaceOrView plain;
    if (to.is_cpu()) {
      copy_in_pieces(to, packed);
    } else {
      static_cast<C10Device&>(device).copy(to, packed);
    }
  }

  static void check_destination(const std::string& key, const at::Tensor& out,
                                const Meta& meta,
                                const std::optional<c10::Device>& device) {
    check_has_plain_memory(out, "swap_in");
    const auto fail = [&](const auto& what, const auto& stored,
                          const auto& given) {
      std::ostringstream text;
      text << "swap_in of '" << key << "': " << what << " " << stored
           << ", out has " << given;
      throw std::invalid_argument(text.str());
    };
    if (out.sizes() != at::IntArrayRef(meta.sizes)) {
      fail("the stored shape is", at::IntArrayRef(meta.sizes), out.sizes());
    }
    if (out.scalar_type() != meta.dtype) {
      fail("the stored dtype is", meta.dtype, out.scalar_type());
    }
    if (device && *device != out.device()) {
      fail("the device asked for is", *device, out.device());
    }
    if (!out.is_cpu() && (out.is_conj() || out.is_neg())) {
      throw std::invalid_argument(
          "swap_in of '" + key +
          "': out is lazily conjugate or negative (as after .conj()), which "
          "is supported on the CPU only");
    }
    if (at::has_internal_overlap(out) == at::MemOverlap::Yes) {
      throw std::invalid_argument(
          "swap_in of '" + key +
          "': elements of out share memory (an expanded tensor?)");
    }
  }

  // Two devices, so two copy streams: a swap-out that waits for a long kernel
  // must not hold up the swap-ins behind it.
  std::shared_ptr<Device> device_of(const at::Tensor& tensor,
                                    Direction direction) {
    if (tensor.is_cpu()) return host_device();
    std::lock_guard lock(mutex_);
    auto& device = devices_[{tensor.device(), direction}];
    if (device == nullptr) device = device_for(tensor.device());
    return device;
  }

  DeviceBytes bytes_of(const at::Tensor& contiguous, Direction direction) {
    return {.device = device_of(contiguous, direction),
            .data = static_cast<std::byte*>(
                const_cast<void*>(contiguous.const_data_ptr())),
            .size = static_cast<std::uint64_t>(contiguous.nbytes()),
            .keep_alive = std::make_shared<at::Tensor>(contiguous)};
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

  std::mutex mutex_;
  std::map<Less::Key, std::shared_ptr<Device>, Less> devices_;
  Swapper swapper_;  // Last: its threads use what stands above.
};

}  // namespace torch_ext
