#pragma once

#include <concepts>
#include <filesystem>
#include <utility>
#include <vector>

namespace torch_ext {

/// A directory of a store and its share of the bytes.
struct WeightedDirectory {
  std::filesystem::path path = {};
  /// How many blocks go here for each block that goes to a directory of weight
  /// 1: from 1 to 100. A drive that is twice as fast gets twice the weight.
  int weight = 1;
};

/// Where a store keeps its bytes: in one directory, or in several on drives
/// that share them. It is made from a path or from a list.
class DirectoryList {
 public:
  DirectoryList() = default;
  template <typename Path>
  requires std::convertible_to<Path, std::filesystem::path> DirectoryList(
      Path&& path)  // NOLINT(google-explicit-constructor)
      : all_{{std::forward<Path>(path)}} {}
  DirectoryList(  // NOLINT(google-explicit-constructor)
      std::vector<WeightedDirectory> all)
      : all_(std::move(all)) {}

  const std::vector<WeightedDirectory>& all() const noexcept { return all_; }
  std::vector<WeightedDirectory>& all() noexcept { return all_; }

 private:
  std::vector<WeightedDirectory> all_;
};

}  // namespace torch_ext
