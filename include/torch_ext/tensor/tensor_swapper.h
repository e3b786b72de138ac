#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {

/// An operation of a TensorSwapper. Copies share it; dropping it, and the
/// tensor, is always safe. Threads: any.
class TensorTicket {
 public:
  using Timeout = SwapTicket::Timeout;

  /// See SwapTicket::wait_source: from then on the tensor that was swapped
  /// out may be overwritten by work on the current stream.
  void wait_source(Timeout timeout = std::nullopt) const;

  /// See SwapTicket::wait. For a swap_in, work that is queued afterwards on
  /// the stream current now sees the bytes.
  void wait(Timeout timeout = std::nullopt) const;

  /// Whether wait() and wait_source() would return or throw now, after
  /// waiting for at most `timeout`.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  bool wait_source_for(std::chrono::nanoseconds timeout) const;

  /// See SwapTicket::timed_out.
  TimeoutError timed_out(std::chrono::nanoseconds timeout) const;

  /// True once the bytes are on disk or in the destination, or it failed.
  bool done() const;

  /// wait(), then the tensor of a swap_in; undefined for a swap_out.
  at::Tensor result(Timeout timeout = std::nullopt) const;

 private:
  friend class TensorFileSwapper;
  friend class TensorSwapper;

  explicit TensorTicket(SwapTicket ticket, at::Tensor result = {});

  SwapTicket ticket_;
  at::Tensor result_;
};

/// A Swapper for tensors: any dense strided tensor on the CPU or an
/// accelerator, of any dtype, in any shape; a view is stored as exactly its
/// elements, packed. See Swapper for ordering, errors and threads.
class TensorSwapper {
 public:
  explicit TensorSwapper(const SwapperOptions& options);
  ~TensorSwapper();  ///< See Swapper::~Swapper.
  TensorSwapper(const TensorSwapper&) = delete;
  TensorSwapper& operator=(const TensorSwapper&) = delete;

  /// Stores the tensor's elements under `key` and returns at once.
  /// Errors here: TypeError for a tensor that has no plain memory (sparse,
  /// meta, quantized, nested, a Python subclass), and those of
  /// Swapper::swap_out.
  TensorTicket swap_out(const std::string& key, const at::Tensor& tensor);

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
                       IoPriority priority = IoPriority::kNow);

  /// Forgets the key at once; see Swapper::remove. Errors: KeyError.
  void remove(const std::string& key);
  std::vector<std::string> keys();
  SwapperStats stats() const;
  std::vector<std::string> notes() const;
  const std::string& engine() const noexcept;
  /// See Swapper::close.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
