// Part of adamw_loops.h, which says how it is compiled. This part converts
// numbers of fewer than 32 bits.

#include "adamw_noise.h"

// ---- bfloat16 --------------------------------------------------------------

constexpr std::uint16_t kInfinity16 = 0x7f80;  // Upper halves.
constexpr std::uint16_t kNaN16 = 0x7fc0;

TORCH_EXT_INLINE Pair join(const Wide16& parameter, const Wide16& low) {
  const auto magnitude = as<Mask16>(parameter & 0x7fff);
  const auto infinity = as<Mask16>(all16(kInfinity16));
  const auto ends = as<Mask16>(low);  // From 0x8000 on they are negative.
  const Mask16 impossible =
      ((magnitude == 0) & (ends < 0)) | ((magnitude == infinity) & (ends > 0));
  const Mask16 is_nan = magnitude > infinity;
  const Wide16 upper =
      select16(is_nan, all16(kNaN16),
               select16(impossible, parameter, parameter - (low >> 15)));
  return join_halves(low & ~as<Wide16>(is_nan | impossible), upper);
}

/// Which floats are NaN, by their upper and lower halves.
TORCH_EXT_INLINE Mask16 are_nan(const Wide16& magnitude, const Wide16& low) {
  const auto upper = as<Mask16>(magnitude);
  const auto infinity = as<Mask16>(all16(kInfinity16));
  return (upper > infinity) | ((upper == infinity) & (as<Mask16>(low) != 0));
}

TORCH_EXT_INLINE void split(const Pair& master, Wide16& parameter,
                            Wide16& low) {
  const Wide16 upper = high_halves(master);
  const Wide16 lower = low_halves(master);
  const Mask16 is_nan = are_nan(upper & 0x7fff, lower);
  // A carry goes away from zero, and no further than to infinity.
  parameter = select16(is_nan, all16(kNaN16), upper + (lower >> 15));
  low = lower & ~as<Wide16>(is_nan);
}

/// Rounds to the next bfloat16 up or down in magnitude. The nearer one is the
/// likelier one.
TORCH_EXT_INLINE Wide16 round_bf16(const Pair& numbers, const Wide16& noise) {
  const Wide16 upper = high_halves(numbers);
  const Wide16 lower = low_halves(numbers);
  const Wide16 magnitude = upper & 0x7fff;
  const Wide16 sum = lower + noise;
  const Wide16 rounded =
      magnitude - as<Wide16>(sum < lower);  // Carried: -(-1).
  const auto infinity = as<Mask16>(all16(kInfinity16));
  const Mask16 overflow =
      (as<Mask16>(magnitude) < infinity) & (as<Mask16>(rounded) >= infinity);
  return select16(
      are_nan(magnitude, lower), all16(kNaN16),
      select16(overflow, all16(kInfinity16 - 1), rounded) | (upper & 0x8000));
}

TORCH_EXT_INLINE void unpack_bf16(const std::byte* from, float* to) {
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    store(to + i, load_u16(from + 2 * i) << 16);
  }
}

TORCH_EXT_INLINE void pack_bf16(const float* from, std::byte* to,
                                const Source& source, std::uint64_t first) {
  for (std::size_t group = 0; group < kBlock; group += kGroup) {
    U32 words[4];
    draw(source, first + group, words);
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      const std::size_t at = group + 2 * i * kLanes;
      const Pair noise =
          pair_of(half_of(words, 2 * i), half_of(words, 2 * i + 1));
      store(to + 2 * at, round_bf16(load_pair(from + at),
                                    narrow(noise.first, noise.second)));
    }
  }
}

// ---- 8 bits ----------------------------------------------------------------
// A code is a small float. It has 3 bits of mantissa under 4 bits of exponent
// and a sign (exp_avg), or under 5 bits of exponent (exp_avg_sq). Its highest
// exponent, kTop, stands for the block's power of two. Exponent 0 means a
// mantissa without the leading one. The highest code is NaN. The scale is the
// biased exponent of the block's power of two.

template <bool kSigned>
struct Code {
  static constexpr std::int32_t kTop = kSigned ? 15 : 31;
  static constexpr std::uint32_t kNaNCode = kSigned ? 0x7f : 0xff;
  /// The least biased exponent that keeps the scale's powers normal floats.
  static constexpr std::int32_t kLeastScale = 2;
};

template <bool kSigned>
TORCH_EXT_INLINE void unpack_int8(const std::byte* from, std::byte scale_byte,
                                  float* to) {
  using C = Code<kSigned>;
  auto scale = static_cast<std::int32_t>(scale_byte);
  if (scale < C::kLeastScale) scale = C::kLeastScale;
  const F32 power = as<F32>(all(static_cast<std::uint32_t>(scale - 1) << 23));
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    const U32 code = load_u8(from + i);
    const U32 magnitude = code & C::kNaNCode;
    const I32 exponent = as<I32>(magnitude >> 3);
    const I32 normal = exponent > 0;
    const I32 mantissa = as<I32>((magnitude & 7) | (as<U32>(normal) & 8));
    // 2^(exponent - kTop - 3 + 1), and 2^(scale - 127 - 1) in `power`.
    const I32 unit = at_least(exponent, 1) + (127 - C::kTop - 2);
    const F32 value = __builtin_convertvector(mantissa, F32) *
                      as<F32>(as<U32>(unit) << 23) * power;
    U32 bits = select(as<I32>(magnitude) == as<I32>(all(C::kNaNCode)),
                      all(kNaN), as<U32>(value));
    if (kSigned) bits |= (code & 0x80) << 24;
    store(to + i, bits);
  }
}

template <bool kSigned>
TORCH_EXT_INLINE std::int32_t scale_of(const float* from) {
  I32 most = {};
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    const I32 bits = load<I32>(from + i);
    const I32 magnitude = bits & static_cast<std::int32_t>(kMagnitude);
    // The bits of a negative float are below 0 as an integer too.
    const I32 usable = (kSigned ? magnitude : bits) & (magnitude < kInfinity);
    const I32 more = usable > most;
    most = (usable & more) | (most & ~more);
  }
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < kLanes; ++i) {
    if (most[i] > largest) largest = most[i];
  }
  if (largest == 0) return 0;
  // A mantissa above 1.75 could be rounded up to the code of NaN.
  const std::int32_t scale =
      (largest >> 23) + ((largest & 0x7fffff) > 0x600000 ? 1 : 0);
  return scale < Code<kSigned>::kLeastScale ? Code<kSigned>::kLeastScale
                                            : scale;
}

template <bool kSigned>
TORCH_EXT_INLINE void pack_int8(const float* from, std::byte* to,
                                std::byte* scale_byte, const Source& source,
                                std::uint64_t first) {
  using C = Code<kSigned>;
  std::int32_t scale = scale_of<kSigned>(from);
  *scale_byte = static_cast<std::byte>(scale);
  if (scale == 0) scale = C::kLeastScale;
  for (std::size_t group = 0; group < kBlock; group += kGroup) {
    U32 words[4];
    draw(source, first + group, words);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kGroup / kLanes; ++i) {
      const std::size_t at = group + i * kLanes;
      const U32 bits = load<U32>(from + at);
      const U32 magnitude = bits & kMagnitude;
      const I32 exponent = as<I32>(magnitude >> 23);
      const U32 mantissa = (magnitude & 0x7fffff) | (1u << 23);
      const I32 of_code = exponent + (C::kTop - scale);
      // Below the smallest exponent, the mantissa moves to the right.
      I32 shift = at_least(1 - of_code, 0);
      shift = 31 - at_least(31 - shift, 0);
      // Three bits and the leading one stand above 16 bits, out of which the
      // noise may carry.
      const U32 fixed = ((mantissa >> 4) >> as<U32>(shift)) + half_of(words, i);
      U32 code = (as<U32>(at_least(of_code, 1) - 1) << 3) + (fixed >> 16);
      // A float without a leading one is too small for any code but 0.
      code &= as<U32>(exponent > 0);
      I32 bad = as<I32>(magnitude) >= kInfinity;
      if (!kSigned) {
        // A value above 0 never gets code 0: the update divides by its root.
        code = select((as<I32>(code) == 0) & (as<I32>(magnitude) > 0), all(1u),
                      code);
        bad |= (as<I32>(bits) < 0) & (as<I32>(magnitude) > 0);
      }
      code = select(bad, all(C::kNaNCode), code);
      if (kSigned) code |= (bits & ~kMagnitude) >> 24;
      store_u8(to + at, code);
    }
  }
}
