#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

/// What is fuzzed: any bytes are read, or refused with the error that the
/// reader promises. Returns whether they were read, and aborts where neither
/// holds.
bool fuzz_config(const std::uint8_t* data, std::size_t size);
bool fuzz_store(const std::uint8_t* data, std::size_t size);
bool fuzz_document(const std::uint8_t* data, std::size_t size);
bool fuzz_safetensors(const std::uint8_t* data, std::size_t size);

namespace torch_ext::fuzz {

inline void check(bool held) {
  if (!held) std::abort();
}

/// More than this is not for a log.
inline constexpr std::size_t kLongestMessage = 2000;

}  // namespace torch_ext::fuzz
