#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace torch_ext::test {

/// Bytes 8 * index to 8 * index + 7 of pattern `seed`. Any two places or seeds
/// differ as random bytes do, so swapped or stale blocks show.
inline std::array<std::byte, 8> pattern_word(std::uint64_t seed,
                                             std::uint64_t index) {
  std::uint64_t word =
      (index + 1) * 0x9e3779b97f4a7c15u + (seed + 1) * 0xd1b54a32d192ed03u;
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
  word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
  return std::bit_cast<std::array<std::byte, 8>>(word ^ (word >> 31));
}

/// Fills `bytes` with what pattern `seed` has from `offset` on.
inline void fill_pattern(std::span<std::byte> bytes, std::uint64_t seed,
                         std::uint64_t offset = 0) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::size_t skip = (offset + done) % 8;
    const std::size_t count = std::min(8 - skip, bytes.size() - done);
    const auto word = pattern_word(seed, (offset + done) / 8);
    std::copy_n(word.data() + skip, count, bytes.data() + done);
    done += count;
  }
}

/// Index of the first byte that is not the pattern's; bytes.size() if none.
inline std::size_t pattern_mismatch(std::span<const std::byte> bytes,
                                    std::uint64_t seed,
                                    std::uint64_t offset = 0) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::size_t skip = (offset + done) % 8;
    const std::size_t count = std::min(8 - skip, bytes.size() - done);
    const auto word = pattern_word(seed, (offset + done) / 8);
    for (std::size_t i = 0; i < count; ++i) {
      if (bytes[done + i] != word[skip + i]) return done + i;
    }
    done += count;
  }
  return done;
}

inline bool holds_pattern(std::span<const std::byte> bytes, std::uint64_t seed,
                          std::uint64_t offset = 0) {
  return pattern_mismatch(bytes, seed, offset) == bytes.size();
}

}  // namespace torch_ext::test
