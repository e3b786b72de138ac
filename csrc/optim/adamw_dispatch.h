#pragma once

#include <cstddef>
#include <cstdint>

#include "torch_ext/optim/adamw_update.h"

namespace torch_ext {

/// The functions of adamw_loops.h, compiled for an instruction set.
struct AdamWLoops {
  void (*join)(const std::uint16_t* parameter, const std::uint16_t* low,
               float* master, std::size_t count);
  void (*split)(const float* master, std::uint16_t* parameter,
                std::uint16_t* low, std::size_t count);
  void (*unpack)(StateFormat format, std::size_t field, const Moment& from,
                 float* to, std::uint64_t count);
  void (*pack)(StateFormat format, std::size_t field, const float* from,
               const Moment& to, std::uint64_t first, std::uint64_t count,
               const RoundingNoise& noise);
  void (*update)(StateFormat format, const AdamWRun& run,
                 const AdamWCoefficients& with, const RoundingNoise& noise);
};

/// The loops for any processor.
const AdamWLoops& plain_adamw_loops() noexcept;
/// The loops for AVX2. Null if this processor does not have it.
const AdamWLoops* avx2_adamw_loops() noexcept;

}  // namespace torch_ext
