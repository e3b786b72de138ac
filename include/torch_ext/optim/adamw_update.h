#pragma once

#include <cstddef>
#include <cstdint>

#include "torch_ext/optim/state_format.h"

namespace torch_ext {

// Converts AdamW's state, and updates state that is not float. The bits are the
// same on every processor, and wherever a parameter is cut (at multiples of
// StateFields::kCut). Threads: any.

/// Selects the random bits that round an element's state. The bits depend only
/// on these numbers and on the element's index in its parameter. The generator
/// is Threefry 4x32 with 20 rounds; J. Salmon et al., "Parallel random numbers:
/// as easy as 1, 2, 3", 2011.
struct RoundingNoise {
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  std::uint32_t parameter = 0;
  /// Where the parameter is a shard: the index of its first element in the
  /// whole. It is rounded down to a multiple of 64.
  std::uint64_t first = 0;
};

/// The generator itself: gives four words for a counter and a key.
void threefry(const std::uint32_t (&counter)[4], const std::uint32_t (&key)[4],
              std::uint32_t (&out)[4]) noexcept;

/// The 16 bits that round the `field` (kExpAvg, kExpAvgSq) of an element.
std::uint32_t noise_of(const RoundingNoise& noise, std::uint32_t field,
                       std::uint64_t element) noexcept;

/// Makes `count` masters in float from bfloat16 parameters and the low halves
/// that split_master() kept. Whatever a low half is, the master rounds to the
/// parameter: where rounding cannot have produced the pair, the master is the
/// parameter. NaN becomes the canonical NaN.
void join_master(const std::uint16_t* parameter, const std::uint16_t* low,
                 float* master, std::size_t count) noexcept;

/// Splits `count` masters into bfloat16 parameters and low halves. A parameter
/// is rounded to nearest, ties away from zero. `parameter` may be null.
void split_master(const float* master, std::uint16_t* parameter,
                  std::uint16_t* low, std::size_t count) noexcept;

/// Where a moment lies: bfloat16, or 8 bits with scales.
struct Moment {
  std::byte* values = nullptr;
  std::byte* scales = nullptr;  ///< kInt8: one byte for 256 elements.
};

/// Converts `count` elements to float, exactly. `field` is kExpAvg (signed) or
/// kExpAvgSq.
void unpack_moment(StateFormat format, std::size_t field, const Moment& from,
                   float* to, std::uint64_t count) noexcept;

/// Converts `count` elements from float. The first one has index `first` in its
/// parameter, a multiple of kCut. A number that the format can hold exactly is
/// kept. NaN stays NaN.
void pack_moment(StateFormat format, std::size_t field, const float* from,
                 const Moment& to, std::uint64_t first, std::uint64_t count,
                 const RoundingNoise& noise) noexcept;

/// The numbers of a step. They are the same for all elements of a parameter.
struct AdamWCoefficients {
  float decay = 1;    ///< 1 - lr * weight_decay
  float exp_avg = 0;  ///< 1 - beta1
  float beta2 = 0;
  float exp_avg_sq = 0;    ///< 1 - beta2
  float inverse_root = 1;  ///< 1 / sqrt(1 - beta2^step)
  float eps = 0;
  float step_size = 0;  ///< lr / (1 - beta1^step)
  bool maximize = false;
};

/// A run of a parameter's elements, in host memory.
struct AdamWRun {
  std::uint64_t first = 0;  ///< A multiple of kCut.
  std::uint64_t count = 0;
  Moment exp_avg;
  Moment exp_avg_sq;
  const float* gradient = nullptr;               ///< Either this ...
  const std::uint16_t* gradient_bf16 = nullptr;  ///< ... or this.
  float* master = nullptr;                       ///< Either this ...
  std::uint16_t* parameter_bf16 = nullptr;       ///< ... or these two.
  std::uint16_t* low = nullptr;
};

/// Makes a step of AdamW whose moments are kBf16 or kInt8, on the calling
/// thread.
void update_adamw(StateFormat format, const AdamWRun& run,
                  const AdamWCoefficients& with,
                  const RoundingNoise& noise) noexcept;

}  // namespace torch_ext
