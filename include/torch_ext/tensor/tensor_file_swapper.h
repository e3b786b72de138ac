#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/device/cuda_runtime.h"
#include "torch_ext/memory/pinned_memory.h"
#include "torch_ext/swap/file_swapper.h"
#include "torch_ext/tensor/dense_tensor.h"
#include "torch_ext/tensor/plain_modes.h"
#include "torch_ext/tensor/tensor_bytes.h"
#include "torch_ext/tensor/tensor_check.h"
#include "torch_ext/tensor/tensor_swapper.h"

namespace torch_ext {

/// A FileSwapper for tensors: any dense strided tensor on the CPU or an
/// accelerator moves as exactly its elements, packed. See FileSwapper for
/// files, errors and threads, TensorTicket for the waits.
class TensorFileSwapper {
 public:
  explicit TensorFileSwapper(const FileSwapperOptions& options)
      : swapper_(options) {}

  /// Writes the tensor's elements at byte `offset` of the file.
  /// Errors here: TypeError for a tensor without plain memory, and those of
  /// FileSwapper::write.
  TensorTicket write(const std::filesystem::path& path, std::uint64_t offset,
                     const at::Tensor& tensor) {
    return TensorTicket(
        swapper_.write(path, offset, bytes_.source(tensor, "write")));
  }
  TensorTicket write(int fd, std::uint64_t offset, const at::Tensor& tensor) {
    return TensorTicket(
        swapper_.write(fd, offset, bytes_.source(tensor, "write")));
  }

  /// Reads them from byte `offset` on into the tensor, outside autograd.
  /// Errors here: TypeError and std::invalid_argument (see
  /// check_is_destination()), and those of FileSwapper::read.
  TensorTicket read(const std::filesystem::path& path, std::uint64_t offset,
                    const at::Tensor& tensor) {
    check_has_plain_memory(tensor, "read");
    check_is_destination(tensor, "read");
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    return TensorTicket(
        swapper_.read(path, offset, bytes_.destination(tensor, "read")),
        tensor);
  }

  /// See FileSwapper::drop_deleted.
  void drop_deleted() { swapper_.drop_deleted(); }
  FileSwapperStats stats() const { return swapper_.stats(); }
  std::vector<std::string> notes() const { return swapper_.notes(); }
  /// See FileSwapper::close.
  void close() { swapper_.close(); }

 private:
  TensorBytes bytes_;
  FileSwapper swapper_;  // Last: its threads use what stands above.
};

/// A 1-D CPU tensor of zeros in memory of its own, page aligned and, where
/// there is a GPU, page-locked. `is_pinned()` and `disown_pinned()` know it.
/// Errors: TypeError for a quantized dtype; std::invalid_argument for a
/// negative or too large count; IoError ("mmap").
inline at::Tensor pinned_zeros(std::int64_t count, c10::ScalarType dtype) {
  if (c10::isQIntType(dtype)) {
    throw TypeError(
        std::string("a page-locked tensor of the quantized dtype ") +
        c10::toString(dtype));
  }
  const auto item = static_cast<std::int64_t>(c10::elementSize(dtype));
  if (count < 0 || count > std::numeric_limits<std::int64_t>::max() / item) {
    throw std::invalid_argument("a tensor of " + std::to_string(count) +
                                " elements");
  }
  const PlainModes plain;
  std::shared_ptr<CudaRuntime> cuda;
  if (c10::impl::hasDeviceGuardImpl(c10::kCUDA) &&
      c10::impl::getDeviceGuardImpl(c10::kCUDA)->deviceCount() > 0) {
    cuda = CudaRuntime::open();
  }
  auto memory =
      allocate_pinned(static_cast<std::size_t>(count * item), std::move(cuda));
  return at::from_blob(
      memory.get(), {count}, [memory](void*) mutable { memory.reset(); },
      host_options(dtype));
}

}  // namespace torch_ext
