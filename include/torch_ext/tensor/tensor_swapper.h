#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/swap/swapper.h"
#include "torch_ext/tensor/plain_modes.h"
#include "torch_ext/tensor/tensor_bytes.h"
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
  friend class TensorFileSwapper;
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
    DeviceBytes bytes = bytes_.source(tensor, "swap_out");
    auto meta = std::make_shared<const Meta>(
        Meta{tensor.sizes().vec(), tensor.scalar_type(), tensor.device()});
    return TensorTicket(
        swapper_.swap_out(key, std::move(bytes), std::move(meta)));
  }

  /// Brings the key's tensor back, into `out` or a new tensor on `device`
  /// (none: where it came from), and returns at once. `out` may be any view
  /// with the stored shape and dtype whose elements do not overlap, but on a
  /// device no lazily conjugate or negative one; it is written in place,
  /// outside autograd. For `priority` see Swapper::swap_in.
  /// Errors here: KeyError; std::invalid_argument for another shape, dtype
  /// or device than asked for; TypeError as swap_out.
  TensorTicket swap_in(const std::string& key,
                       const std::optional<at::Tensor>& out = std::nullopt,
                       std::optional<c10::Device> device = std::nullopt,
                       IoPriority priority = IoPriority::kNow) {
    const Swapper::Entry entry = swapper_.entry(key);
    const Meta& meta = *static_cast<const Meta*>(entry.tag().get());
    const PlainModes plain;
    at::Tensor result;
    if (out) {
      check_destination(key, *out, meta, device);
      result = *out;
      if (!out->is_inference()) out->unsafeGetTensorImpl()->bump_version();
    } else {
      result = empty(meta, device.value_or(meta.device));
      check_has_plain_memory(result, "swap_in");
    }
    return TensorTicket(
        swapper_.swap_in(entry, bytes_.destination(result, "swap_in"),
                         priority),
        result);
  }

  /// Forgets the key at once; see Swapper::remove. Errors: KeyError.
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

  static at::Tensor empty(const Meta& meta, c10::Device device) {
    return at::empty(meta.sizes,
                     at::TensorOptions().dtype(meta.dtype).device(device));
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
    check_is_destination(out, "swap_in of '" + key + "'");
  }

  TensorBytes bytes_;
  Swapper swapper_;  // Last: its threads use what stands above.
};

}  // namespace torch_ext
