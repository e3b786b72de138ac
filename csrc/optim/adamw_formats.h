// Part of adamw_loops.h, which says how it is compiled: numbers of
// fewer than 32 bits.

#include "adamw_noise.h"

// ---- bfloat16 --------------------------------------------------------------

TORCH_EXT_INLINE U32 join(const U32& parameter, const U32& low) {
  const U32 own = parameter << 16;
  const U32 joined = ((parameter - (low >> 15)) << 16) | low;
  const I32 magnitude = as<I32>(parameter & 0x7fff);
  const I32 ends = as<I32>(low);
  const I32 impossible = ((magnitude == 0) & (ends >= 0x8000)) |
                         ((magnitude == 0x7f80) & (ends > 0) & (ends < 0x8000));
  return select(magnitude > 0x7f80, all(kNaN), select(impossible, own, joined));
}

TORCH_EXT_INLINE void split(const U32& master, U32& parameter, U32& low) {
  const U32 magnitude = master & kMagnitude;
  const I32 is_nan = as<I32>(magnitude) > kInfinity;
  const U32 sign = (master & ~kMagnitude) >> 16;
  parameter =
      select(is_nan, all(kNaN >> 16), ((magnitude + 0x8000) >> 16) | sign);
  low = select(is_nan, all(0u), master & 0xffff);
}

/// To the next bfloat16 up or down in magnitude, the likelier the nearer.
TORCH_EXT_INLINE U32 round_bf16(const U32& bits, const U32& noise) {
  const U32 magnitude = bits & kMagnitude;
  U32 rounded = magnitude + noise;
  const I32 overflow =
      (as<I32>(magnitude) < kInfinity) & (as<I32>(rounded) >= kInfinity);
  rounded = select(overflow, all(0x7f7f0000u), rounded);
  return select(as<I32>(magnitude) > kInfinity, all(kNaN),
                rounded | (bits & ~kMagnitude)) >>
         16;
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
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kGroup / kLanes; ++i) {
      const std::size_t at = group + i * kLanes;
      store_u16(to + 2 * at,
                round_bf16(load<U32>(from + at), half_of(words, i)));
    }
  }
}

// ---- 8 bits ----------------------------------------------------------------
// A code is a small float: 3 bits of mantissa under 4 bits of exponent and a
// sign (exp_avg), or under 5 bits of exponent (exp_avg_sq). Its highest
// exponent, kTop, stands for the block's power of two; exponent 0 means a
// mantissa without the leading one; the highest code is NaN. The scale is the
// biased exponent of that power.

template <bool kSigned>
struct Code {
  static constexpr std::int32_t kTop = kSigned ? 15 : 31;
  static constexpr std::uint32_t kNaNCode = kSigned ? 0x7f : 0xff;
  /// Of the biased exponent, so that the scale's powers are normal floats.
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
    // As a number, -x is below 0 in integers too.
    const I32 usable = (kSigned ? magnitude : bits) & (magnitude < kInfinity);
    const I32 more = usable > most;
    most = (usable & more) | (most & ~more);
  }
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < kLanes; ++i) {
    if (most[i] > largest) largest = most[i];
  }
  if (largest == 0) return 0;
  // Above 1.75 it could be rounded up to the code of NaN.
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
      // Below the smallest exponent the mantissa moves to the right.
      I32 shift = at_least(1 - of_code, 0);
      shift = 31 - at_least(31 - shift, 0);
      // Three bits and the leading one, above 16 that the noise may carry.
      const U32 fixed = ((mantissa >> 4) >> as<U32>(shift)) + half_of(words, i);
      U32 code = (as<U32>(at_least(of_code, 1) - 1) << 3) + (fixed >> 16);
      // A float without a leading one is too small for any code but 0.
      code &= as<U32>(exponent > 0);
      I32 bad = as<I32>(magnitude) >= kInfinity;
      if (!kSigned) {
        // Never 0 for what is not: the update divides by its root.
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
