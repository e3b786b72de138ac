#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "fuzz/targets.h"

namespace torch_ext::test {

/// Names and bytes of the inputs that are kept for a fuzzer.
inline std::vector<std::pair<std::string, std::vector<std::uint8_t>>> corpus(
    const std::string& fuzzer) {
  std::vector<std::pair<std::string, std::vector<std::uint8_t>>> inputs;
  const auto folder = std::filesystem::path(TORCH_EXT_FUZZ_CORPUS) / fuzzer;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    inputs.emplace_back(
        entry.path().filename().string(),
        std::vector<std::uint8_t>{std::istreambuf_iterator<char>(file), {}});
  }
  return inputs;
}

}  // namespace torch_ext::test
