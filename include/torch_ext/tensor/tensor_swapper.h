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

/// An operation of a TensorSwapper or TensorFileTransfer. Copies share it.
/// Dropping it, and the tensor, is always safe. Threads: any.
class TensorTicket {
 public:
  using Timeout = SwapTicket::Timeout;

  /// See SwapTicket::wait_source. After it, work on the current stream may
  /// overwrite the tensor that was swapped out.
  void wait_source(Timeout timeout = std::nullopt) const;

  /// See SwapTicket::wait. For a swap_in, work that is queued afterwards on the
  /// stream that is current now sees the bytes.
  void wait(Timeout timeout = std::nullopt) const;

  /// Wait for at most `timeout`. Return whether wait() and wait_source() would
  /// now return or throw.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  bool wait_source_for(std::chrono::nanoseconds timeout) const;

  /// See SwapTicket::timed_out.
  TimeoutError timed_out(std::chrono::nanoseconds timeout) const;

  /// True once the bytes are on disk or in the destination, or the operation
  /// has failed. Never blocks.
  bool done() const;

  /// Calls wait(), then returns the tensor of a swap_in. It is undefined for a
  /// swap_out.
  at::Tensor result(Timeout timeout = std::nullopt) const;

 private:
  friend class TensorFileTransfer;
  friend class TensorSwapper;

  explicit TensorTicket(SwapTicket ticket, at::Tensor result = {});

  SwapTicket ticket_;
  at::Tensor result_;
};

/// A Swapper for tensors. It takes any dense strided tensor on the CPU or an
/// accelerator, of any dtype, in any shape. A view is stored as exactly its
/// elements, packed. See Swapper for ordering, errors and threads.
class TensorSwapper {
 public:
  explicit TensorSwapper(const SwapperOptions& options);
  ~TensorSwapper();  ///< See Swapper::~Swapper.
  TensorSwapper(const TensorSwapper&) = delete;
  TensorSwapper& operator=(const TensorSwapper&) = delete;

  /// Stores the tensor's elements under `key`. Returns at once.
  /// Errors of this call: TypeError for a tensor that has no plain memory
  /// (sparse, meta, quantized, nested, a Python subclass); those of
  /// Swapper::swap_out.
  TensorTicket swap_out(const std::string& key, const at::Tensor& tensor);

  /// Brings the key's tensor back, into `out` or a new tensor on `device`
  /// (none: where it came from). Returns at once. `out` may be any view with
  /// the stored shape and dtype whose elements do not overlap. On a device it
  /// may not be lazily conjugate or negative. It is written in place, outside
  /// autograd. For `priority` see Swapper::swap_in.
  /// Errors of this call: KeyError; std::invalid_argument for another shape,
  /// dtype or device than asked for; TypeError as swap_out.
  TensorTicket swap_in(const std::string& key,
                       const std::optional<at::Tensor>& out = std::nullopt,
                       std::optional<c10::Device> device = std::nullopt,
                       IoPriority priority = IoPriority::kNow);

  /// Forgets the key at once. See Swapper::remove. Errors: KeyError.
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
