#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// The tensors of a model that lie in safetensors files, and where. Their bytes
/// are not read. Threads: const members from any.
class SafetensorsCheckpoint {
 public:
  struct Tensor {
    std::shared_ptr<const File> file = nullptr;
    std::uint64_t offset = 0;  ///< Bytes, in the file.
    std::uint64_t bytes = 0;
    std::string dtype = {};  ///< As in SafetensorsHeader.
    std::vector<std::uint64_t> shape = {};
  };

  /// `path` is a safetensors file, an index ("weight_map" says in which file
  /// beside it a tensor is), or a directory. A directory has an index named
  /// *.safetensors.index.json, or else all its files *.safetensors count. Links
  /// are followed. Errors: IoError; std::invalid_argument, with the path, for
  /// what is none of these or is damaged. The same for a tensor that an index
  /// promises and its file lacks, and for one that two files have.
  explicit SafetensorsCheckpoint(const std::filesystem::path& path);

  /// Null if there is none of this name.
  const Tensor* find(const std::string& name) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  /// The directory or file, with all links followed.
  const std::string& path() const { return path_; }

 private:
  void add_file(const std::filesystem::path& path);
  void add_index(const std::filesystem::path& path);
  void add_directory(const std::filesystem::path& path);

  std::string path_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace torch_ext
