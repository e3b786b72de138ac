#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "optim/adamw_dispatch.h"
#include "torch_ext/optim/adamw_update.h"

namespace torch_ext::test {

inline constexpr std::size_t kBlock = StateFields::kCut;
inline constexpr std::size_t kM = AdamWFields::kExpAvg;
inline constexpr std::size_t kV = AdamWFields::kExpAvgSq;

inline std::uint32_t bits_of(float x) {
  return std::bit_cast<std::uint32_t>(x);
}
inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

/// For each instruction set that this processor has.
inline std::vector<const AdamWLoops*> all_loops() {
  std::vector<const AdamWLoops*> all = {&plain_adamw_loops()};
  if (avx2_adamw_loops() != nullptr) all.push_back(avx2_adamw_loops());
  return all;
}

/// Numbers of all magnitudes, with zeros, denormals and the largest.
inline std::vector<float> numbers(std::size_t count, std::uint32_t seed,
                                  bool positive = false) {
  std::mt19937 random(seed);
  std::vector<float> out(count);
  for (float& x : out) {
    do {
      x = float_of(random() & (positive ? 0x7fffffff : 0xffffffff));
    } while (!std::isfinite(x));
    if (random() % 8 == 0) x = 0;
  }
  return out;
}

/// A parameter's moment in memory of its own.
struct Memory {
  explicit Memory(StateFormat format, std::size_t count)
      : values(count * (format == StateFormat::kBf16 ? 2 : 1)),
        scales((count + kBlock - 1) / kBlock) {}
  Moment moment(std::size_t element = 0, std::size_t bytes = 1) {
    return {values.data() + element * bytes, scales.data() + element / kBlock};
  }
  bool operator==(const Memory&) const = default;
  std::vector<std::byte> values, scales;
};

}  // namespace torch_ext::test
