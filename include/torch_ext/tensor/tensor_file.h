#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {

/// Tensors by name, in an order that a file keeps.
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;
/// Text by key, likewise.
using FileMetadata = std::vector<std::pair<std::string, std::string>>;

/// How to save or load a file of tensors.
struct TensorFileOptions {
  AioConfig aio = {.queue_depth = 32};
  /// "auto" or one of engine_names(); see make_queue().
  std::string engine = "auto";
  /// Bytes of page-locked buffers, for tensors on a device, or whose memory
  /// direct I/O cannot take. Also of the buffers for a load on the CPU of more
  /// than 16 MiB, which takes at least 32 MiB of them.
  std::uint64_t host_memory = std::uint64_t{64} << 20;
  /// Overrides `engine` if it is set. Tests put a faulty engine in here.
  IoEngineFactory engine_factory = {};
  /// Called about 20 times a second on the calling thread, while it waits. What
  /// it throws ends the call.
  std::function<void()> interrupt = {};
};

/// Writes a safetensors file. It takes the path's name when it is complete: see
/// NewFile. When this returns, it survives a power cut. Tensors have any
/// strides, and lie on any device. They may not change meanwhile. No two may
/// share memory.
/// Errors: TypeError for a tensor without plain memory, or of a dtype that
/// safetensors has not; std::invalid_argument for tensors that share memory,
/// and those of encode_safetensors(); IoError. The old file is then as it was.
void save_tensors(const std::filesystem::path& path,
                  const NamedTensors& tensors, const FileMetadata& metadata,
                  const TensorFileOptions& options = {});

/// Where the tensors of a file come to lie.
struct LoadTarget {
  c10::Device device = c10::Device(c10::kCPU);
  /// The tensors are a private mapping of the file, which is read when they are
  /// used. Only for the CPU.
  bool mapped = false;
};

/// Reads a safetensors file, whoever wrote it. On the CPU all tensors lie in
/// one block of memory. Each has a storage of its own, and its whole pages go
/// back when it ends. On "meta" nothing is read but the header.
/// Errors: std::invalid_argument, with the path first, for a file that is no
/// whole safetensors file, or whose dtype torch lacks. IoError; it is ENOMEM
/// where there is no memory for the tensors.
NamedTensors load_tensors(const std::filesystem::path& path,
                          const LoadTarget& target = {},
                          const TensorFileOptions& options = {});

/// The metadata of a safetensors file. Errors: as load_tensors().
FileMetadata load_metadata(const std::filesystem::path& path);

}  // namespace torch_ext
