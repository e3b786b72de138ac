#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/tensor/tensor_swapper.h"

namespace torch_ext {

/// A FileTransfer for tensors. Any dense strided tensor on the CPU or an
/// accelerator moves as exactly its elements, packed. See FileTransfer for
/// files, errors and threads, and TensorTicket for the waits.
class TensorFileTransfer {
 public:
  explicit TensorFileTransfer(const FileTransferOptions& options);
  ~TensorFileTransfer();  ///< See FileTransfer::~FileTransfer.
  TensorFileTransfer(const TensorFileTransfer&) = delete;
  TensorFileTransfer& operator=(const TensorFileTransfer&) = delete;

  /// Writes the tensor's elements at byte `offset` of the file.
  /// Errors of this call: TypeError for a tensor without plain memory; those of
  /// FileTransfer::write.
  TensorTicket write(const std::filesystem::path& path, std::uint64_t offset,
                     const at::Tensor& tensor);
  TensorTicket write(int fd, std::uint64_t offset, const at::Tensor& tensor);

  /// Reads the elements from byte `offset` on into the tensor, outside
  /// autograd.
  /// Errors of this call: TypeError for a tensor without plain memory; those of
  /// FileTransfer::read. std::invalid_argument for a tensor whose elements
  /// share memory or interleave, or that is lazily conjugate or negative on a
  /// device.
  TensorTicket read(const std::filesystem::path& path, std::uint64_t offset,
                    const at::Tensor& tensor);
  TensorTicket read(int fd, std::uint64_t offset, const at::Tensor& tensor);

  /// See FileTransfer::drop_deleted.
  void drop_deleted();
  FileTransferStats stats() const;
  std::vector<std::string> notes() const;
  /// See FileTransfer::close.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// A 1-D CPU tensor of `count` zeros in memory of its own, aligned to a page.
/// It is page-locked where there is a GPU. is_pinned() and disown_pinned() know
/// it.
/// Errors: TypeError for a quantized dtype; std::invalid_argument for a
/// negative or too large count; IoError ("mmap").
at::Tensor pinned_zeros(std::int64_t count, c10::ScalarType dtype);

}  // namespace torch_ext
