#include "torch_ext/tensor/tensor_file_transfer.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstddef>
#include <limits>
#include <stdexcept>
#include <utility>

#include "dense_tensor.h"
#include "plain_modes.h"
#include "tensor_bytes.h"
#include "tensor_check.h"
#include "torch_ext/device/cuda_runtime.h"
#include "torch_ext/memory/pinned_memory.h"

namespace torch_ext {

class TensorFileTransfer::Impl {
 public:
  explicit Impl(const FileTransferOptions& options) : swapper(options) {}

  DeviceBytes destination(const at::Tensor& tensor) {
    check_has_plain_memory(tensor, "read");
    check_is_destination(tensor, "read");
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    return bytes.destination(tensor, "read");
  }

  TensorBytes bytes;
  FileTransfer swapper;  // Last: its threads use what stands above.
};

TensorFileTransfer::TensorFileTransfer(const FileTransferOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

TensorFileTransfer::~TensorFileTransfer() = default;

TensorTicket TensorFileTransfer::write(const std::filesystem::path& path,
                                       std::uint64_t offset,
                                       const at::Tensor& tensor) {
  return TensorTicket(
      impl_->swapper.write(path, offset, impl_->bytes.source(tensor, "write")));
}

TensorTicket TensorFileTransfer::write(int fd, std::uint64_t offset,
                                       const at::Tensor& tensor) {
  return TensorTicket(
      impl_->swapper.write(fd, offset, impl_->bytes.source(tensor, "write")));
}

TensorTicket TensorFileTransfer::read(const std::filesystem::path& path,
                                      std::uint64_t offset,
                                      const at::Tensor& tensor) {
  return TensorTicket(
      impl_->swapper.read(path, offset, impl_->destination(tensor)), tensor);
}

TensorTicket TensorFileTransfer::read(int fd, std::uint64_t offset,
                                      const at::Tensor& tensor) {
  return TensorTicket(
      impl_->swapper.read(fd, offset, impl_->destination(tensor)), tensor);
}

void TensorFileTransfer::drop_deleted() { impl_->swapper.drop_deleted(); }

FileTransferStats TensorFileTransfer::stats() const {
  return impl_->swapper.stats();
}

std::vector<std::string> TensorFileTransfer::notes() const {
  return impl_->swapper.notes();
}

void TensorFileTransfer::close() { impl_->swapper.close(); }

at::Tensor pinned_zeros(std::int64_t count, c10::ScalarType dtype) {
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
