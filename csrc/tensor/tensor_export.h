#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "dense_tensor.h"
#include "torch_ext/tensor/tensor_file.h"

namespace torch_ext {

/// A tensor whose elements come while the file is written.
struct StreamedTensor {
  std::string name;
  c10::ScalarType dtype = at::kFloat;
  std::vector<std::int64_t> sizes;
  /// Gives elements in row-major order, each once, from the first to the last.
  ReadElements read;
  /// Tensors of one group are read side by side: they come from one place.
  std::uint64_t group = 0;
};

/// Called with the bytes written so far and all bytes. What it throws ends the
/// export.
using ExportProgress = std::function<void(std::uint64_t, std::uint64_t)>;

/// Writes a safetensors file as save_tensors() does, of tensors that are never
/// in memory as a whole. The data lie in the order that is given; elements of
/// larger size come first. tensor_export.cpp tells how.
/// Memory: about 8 MiB for each run of tensors with ascending groups.
/// Errors: those of save_tensors() and of `read`. The old file is then as it
/// was.
void export_tensors(const std::filesystem::path& path,
                    std::vector<StreamedTensor> tensors,
                    const FileMetadata& metadata,
                    const TensorFileOptions& options = {},
                    const ExportProgress& progress = {});

}  // namespace torch_ext
