// Included by a source file for each instruction set, inside a namespace of its
// own and after the headers: the linker keeps one copy of an inline function,
// which must run everywhere. So nothing of the standard library is called.
//
// Vectors of eight are written in the compiler's own terms, which become one
// instruction with AVX2 and several without; all arithmetic is exact or rounds
// as IEEE 754 says, so results do not depend on that.

using F32 = float __attribute__((vector_size(32)));
using U32 = std::uint32_t __attribute__((vector_size(32)));
using I32 = std::int32_t __attribute__((vector_size(32)));
using U16 = std::uint16_t __attribute__((vector_size(16)));
using U8 = std::uint8_t __attribute__((vector_size(8)));

constexpr std::size_t kLanes = 8;
constexpr std::size_t kGroup = 64;  // Elements that one run of noise serves.
constexpr std::size_t kBlock = StateFields::kCut;

constexpr std::uint32_t kMagnitude = 0x7fffffff;
constexpr std::int32_t kInfinity = 0x7f800000;
constexpr std::uint32_t kNaN = 0x7fc00000;

#define TORCH_EXT_INLINE inline __attribute__((always_inline))

template <typename To, typename From>
TORCH_EXT_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector>
TORCH_EXT_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector>
TORCH_EXT_INLINE void store(void* to, const Vector& vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

TORCH_EXT_INLINE U32 all(std::uint32_t value) { return U32{} + value; }

TORCH_EXT_INLINE F32 all(float value) { return F32{} + value; }

TORCH_EXT_INLINE U32 select(const I32& mask, const U32& yes, const U32& no) {
  const U32 bits = as<U32>(mask);
  return (yes & bits) | (no & ~bits);
}

TORCH_EXT_INLINE I32 at_least(const I32& value, std::int32_t least) {
  const I32 small = value < least;
  return (value & ~small) | (small & least);
}

TORCH_EXT_INLINE F32 square_root(const F32& x) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  return as<F32>(_mm256_sqrt_ps(as<__m256>(x)));
#elif defined(__SSE2__)
  __m128 half[2];
  __builtin_memcpy(half, &x, sizeof x);
  half[0] = _mm_sqrt_ps(half[0]);
  half[1] = _mm_sqrt_ps(half[1]);
  return load<F32>(half);
#else
  F32 root;
  for (std::size_t i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}

TORCH_EXT_INLINE U32 load_u16(const void* from) {
  return __builtin_convertvector(load<U16>(from), U32);
}

// Where GCC 12 does not find the instructions on its own, they are named.
TORCH_EXT_INLINE U32 load_u8(const void* from) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  return as<U32>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<U8>(from), U32);
#endif
}

TORCH_EXT_INLINE void store_u16(void* to, const U32& from) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  __m128i half[2];
  __builtin_memcpy(half, &from, sizeof from);
  store(to, _mm_packus_epi32(half[0], half[1]));
#else
  store(to, __builtin_convertvector(from, U16));
#endif
}

TORCH_EXT_INLINE void store_u8(void* to, const U32& from) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  __m128i half[2];
  __builtin_memcpy(half, &from, sizeof from);
  const __m128i words = _mm_packus_epi32(half[0], half[1]);
  const __m128i bytes = _mm_packus_epi16(words, words);
  __builtin_memcpy(to, &bytes, kLanes);
#else
  store(to, __builtin_convertvector(from, U8));
#endif
}

// ---- Noise -----------------------------------------------------------------

template <typename Word>
TORCH_EXT_INLINE Word rotate(const Word& x, int by) {
  return (x << by) | (x >> (32 - by));
}

/// Threefry of one counter, or of eight.
template <typename Word>
TORCH_EXT_INLINE void threefry_rounds(Word (&x)[4],
                                      const std::uint32_t (&key)[4]) {
  constexpr int kTurns[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                {6, 20},  {17, 11}, {25, 10}, {18, 20}};
  const std::uint32_t keys[5] = {
      key[0], key[1], key[2], key[3],
      0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
  for (std::size_t i = 0; i < 4; ++i) x[i] += keys[i];
#pragma GCC unroll 5
  for (std::uint32_t four = 0; four < 5; ++four) {
#pragma GCC unroll 4
    for (std::uint32_t round = 0; round < 4; ++round) {
      const int(&turn)[2] = kTurns[(4 * four + round) % 8];
      const std::size_t second = round % 2 == 0 ? 1 : 3;
      const std::size_t fourth = 4 - second;
      x[0] += x[second];
      x[second] = rotate(x[second], turn[0]) ^ x[0];
      x[2] += x[fourth];
      x[fourth] = rotate(x[fourth], turn[1]) ^ x[2];
    }
    for (std::uint32_t i = 0; i < 4; ++i) x[i] += keys[(four + 1 + i) % 5];
    x[3] += four + 1;
  }
}

/// Where the noise of a field's elements comes from.
struct Source {
  std::uint32_t key[4];
  std::uint32_t parameter;
  std::uint32_t field;
};

TORCH_EXT_INLINE Source source_of(const RoundingNoise& noise,
                                  std::uint32_t field) {
  return {{static_cast<std::uint32_t>(noise.seed),
           static_cast<std::uint32_t>(noise.seed >> 32),
           static_cast<std::uint32_t>(noise.step),
           static_cast<std::uint32_t>(noise.step >> 32)},
          noise.parameter,
          field};
}

/// Of 64 elements from a multiple of 64 on. Element 8 * i + lane has half i % 2
/// of the lane's word i / 2; a lane is a counter.
TORCH_EXT_INLINE void draw(const Source& source, std::uint64_t first,
                           U32 (&words)[4]) {
  const std::uint64_t counter = first / kGroup * kLanes;
  words[0] = U32{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<std::uint32_t>(counter);
  words[1] = all(static_cast<std::uint32_t>(counter >> 32));
  words[2] = all(source.parameter);
  words[3] = all(source.field);
  threefry_rounds(words, source.key);
}

TORCH_EXT_INLINE U32 half_of(const U32 (&words)[4], std::size_t i) {
  return i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16;
}

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

// ---- A block of kBlock elements --------------------------------------------

template <StateFormat kFormat, std::size_t kField>
TORCH_EXT_INLINE void unpack(const Moment& from, std::size_t block, float* to) {
  if constexpr (kFormat == StateFormat::kBf16) {
    unpack_bf16(from.values + 2 * kBlock * block, to);
  } else {
    unpack_int8<kField == AdamWFields::kExpAvg>(from.values + kBlock * block,
                                                from.scales[block], to);
  }
}

template <StateFormat kFormat, std::size_t kField>
TORCH_EXT_INLINE void pack(const float* from, const Moment& to,
                           std::size_t block, const Source& source,
                           std::uint64_t first) {
  if constexpr (kFormat == StateFormat::kBf16) {
    pack_bf16(from, to.values + 2 * kBlock * block, source, first);
  } else {
    pack_int8<kField == AdamWFields::kExpAvg>(from, to.values + kBlock * block,
                                              to.scales + block, source, first);
  }
}

TORCH_EXT_INLINE void step(float* exp_avg, float* exp_avg_sq, const F32& grad,
                           F32& master, const AdamWCoefficients& with) {
  const F32 m0 = load<F32>(exp_avg);
  const F32 m = m0 + (grad - m0) * with.exp_avg;
  const F32 v =
      load<F32>(exp_avg_sq) * with.beta2 + (grad * grad) * with.exp_avg_sq;
  const F32 root = square_root(v) * with.inverse_root + with.eps;
  master = master * with.decay - m * with.step_size / root;
  store(exp_avg, m);
  store(exp_avg_sq, v);
}

/// Pointers into a run are to its block, which is whole.
template <StateFormat kFormat>
inline void update_block(const AdamWRun& run, std::size_t block,
                         const AdamWCoefficients& with, const Source& exp_avg,
                         const Source& exp_avg_sq) {
  alignas(64) float m[kBlock];
  alignas(64) float v[kBlock];
  unpack<kFormat, AdamWFields::kExpAvg>(run.exp_avg, block, m);
  unpack<kFormat, AdamWFields::kExpAvgSq>(run.exp_avg_sq, block, v);
  const U32 sign = all(with.maximize ? ~kMagnitude : 0u);
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    const std::size_t at = block * kBlock + i;
    const U32 bits = run.gradient != nullptr
                         ? load<U32>(run.gradient + at)
                         : load_u16(run.gradient_bf16 + at) << 16;
    const F32 gradient = as<F32>(bits ^ sign);
    if (run.master != nullptr) {
      F32 master = load<F32>(run.master + at);
      step(m + i, v + i, gradient, master, with);
      store(run.master + at, master);
    } else {
      F32 master = as<F32>(
          join(load_u16(run.parameter_bf16 + at), load_u16(run.low + at)));
      step(m + i, v + i, gradient, master, with);
      U32 parameter, low;
      split(as<U32>(master), parameter, low);
      store_u16(run.parameter_bf16 + at, parameter);
      store_u16(run.low + at, low);
    }
  }
  const std::uint64_t first = run.first + block * kBlock;
  pack<kFormat, AdamWFields::kExpAvg>(m, run.exp_avg, block, exp_avg, first);
  pack<kFormat, AdamWFields::kExpAvgSq>(v, run.exp_avg_sq, block, exp_avg_sq,
                                        first);
}

/// The last elements of a run, fewer than a block, in memory for a whole one.
struct Tail {
  float gradient[kBlock] = {};
  std::uint16_t gradient_bf16[kBlock] = {};
  float master[kBlock] = {};
  std::uint16_t parameter_bf16[kBlock] = {};
  std::uint16_t low[kBlock] = {};
  std::byte exp_avg[2 * kBlock] = {};
  std::byte exp_avg_sq[2 * kBlock] = {};
};

TORCH_EXT_INLINE void copy_bytes(void* to, const void* from,
                                 std::size_t bytes) {
  if (from != nullptr && to != nullptr) __builtin_memcpy(to, from, bytes);
}

template <StateFormat kFormat>
inline void update(const AdamWRun& run, const AdamWCoefficients& with,
                   const RoundingNoise& noise) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const Source exp_avg = source_of(noise, AdamWFields::kExpAvg);
  const Source exp_avg_sq = source_of(noise, AdamWFields::kExpAvgSq);
  const std::size_t whole = run.count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    update_block<kFormat>(run, block, with, exp_avg, exp_avg_sq);
  }
  const std::size_t left = run.count % kBlock;
  if (left == 0) return;
  Tail tail;
  const std::size_t at = whole * kBlock;
  // Advances a pointer that may be null.
  const auto end_of = [at](auto* pointer) {
    return pointer != nullptr ? pointer + at : nullptr;
  };
  std::byte* const m = run.exp_avg.values + at * kBytes;
  std::byte* const v = run.exp_avg_sq.values + at * kBytes;
  copy_bytes(tail.gradient, end_of(run.gradient), 4 * left);
  copy_bytes(tail.gradient_bf16, end_of(run.gradient_bf16), 2 * left);
  copy_bytes(tail.master, end_of(run.master), 4 * left);
  copy_bytes(tail.parameter_bf16, end_of(run.parameter_bf16), 2 * left);
  copy_bytes(tail.low, end_of(run.low), 2 * left);
  copy_bytes(tail.exp_avg, m, kBytes * left);
  copy_bytes(tail.exp_avg_sq, v, kBytes * left);
  std::byte* const m_scale = run.exp_avg.scales;
  std::byte* const v_scale = run.exp_avg_sq.scales;
  update_block<kFormat>(
      {run.first + at,
       kBlock,
       {tail.exp_avg, m_scale != nullptr ? m_scale + whole : nullptr},
       {tail.exp_avg_sq, v_scale != nullptr ? v_scale + whole : nullptr},
       run.gradient != nullptr ? tail.gradient : nullptr,
       tail.gradient_bf16,
       run.master != nullptr ? tail.master : nullptr,
       tail.parameter_bf16,
       tail.low},
      0, with, exp_avg, exp_avg_sq);
  copy_bytes(end_of(run.master), tail.master, 4 * left);
  copy_bytes(end_of(run.parameter_bf16), tail.parameter_bf16, 2 * left);
  copy_bytes(end_of(run.low), tail.low, 2 * left);
  copy_bytes(m, tail.exp_avg, kBytes * left);
  copy_bytes(v, tail.exp_avg_sq, kBytes * left);
}

template <StateFormat kFormat, std::size_t kField>
inline void unpack_all(const Moment& from, float* to, std::uint64_t count) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const std::size_t whole = count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    unpack<kFormat, kField>(from, block, to + block * kBlock);
  }
  const std::size_t left = count % kBlock;
  if (left == 0) return;
  std::byte in[kBytes * kBlock] = {};
  float out[kBlock];
  __builtin_memcpy(in, from.values + kBytes * kBlock * whole, kBytes * left);
  unpack<kFormat, kField>(
      {in, from.scales != nullptr ? from.scales + whole : nullptr}, 0, out);
  __builtin_memcpy(to + whole * kBlock, out, 4 * left);
}

template <StateFormat kFormat, std::size_t kField>
inline void pack_all(const float* from, const Moment& to, std::uint64_t first,
                     std::uint64_t count, const RoundingNoise& noise) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const Source source = source_of(noise, kField);
  const std::size_t whole = count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    pack<kFormat, kField>(from + block * kBlock, to, block, source,
                          first + block * kBlock);
  }
  const std::size_t left = count % kBlock;
  if (left == 0) return;
  float in[kBlock] = {};
  std::byte out[kBytes * kBlock];
  __builtin_memcpy(in, from + whole * kBlock, 4 * left);
  pack<kFormat, kField>(
      in, {out, to.scales != nullptr ? to.scales + whole : nullptr}, 0, source,
      first + whole * kBlock);
  __builtin_memcpy(to.values + kBytes * kBlock * whole, out, kBytes * left);
}

inline void join_all(const std::uint16_t* parameter, const std::uint16_t* low,
                     float* master, std::size_t count) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(master + i, join(load_u16(parameter + i), load_u16(low + i)));
  }
  if (i == count) return;
  std::uint16_t ends[2][kLanes] = {};
  float out[kLanes];
  __builtin_memcpy(ends[0], parameter + i, 2 * (count - i));
  __builtin_memcpy(ends[1], low + i, 2 * (count - i));
  store(out, join(load_u16(ends[0]), load_u16(ends[1])));
  __builtin_memcpy(master + i, out, 4 * (count - i));
}

inline void split_all(const float* master, std::uint16_t* parameter,
                      std::uint16_t* low, std::size_t count) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    U32 rounded, rest;
    split(load<U32>(master + i), rounded, rest);
    if (parameter != nullptr) store_u16(parameter + i, rounded);
    store_u16(low + i, rest);
  }
  if (i == count) return;
  float in[kLanes] = {};
  std::uint16_t out[2][kLanes];
  __builtin_memcpy(in, master + i, 4 * (count - i));
  U32 rounded, rest;
  split(load<U32>(in), rounded, rest);
  store_u16(out[0], rounded);
  store_u16(out[1], rest);
  if (parameter != nullptr) copy_bytes(parameter + i, out[0], 2 * (count - i));
  copy_bytes(low + i, out[1], 2 * (count - i));
}

inline void unpack_any(StateFormat format, std::size_t field,
                       const Moment& from, float* to, std::uint64_t count) {
  const bool is_signed = field == AdamWFields::kExpAvg;
  if (format == StateFormat::kBf16) {
    unpack_all<StateFormat::kBf16, 0>(from, to, count);
  } else if (is_signed) {
    unpack_all<StateFormat::kInt8, AdamWFields::kExpAvg>(from, to, count);
  } else {
    unpack_all<StateFormat::kInt8, AdamWFields::kExpAvgSq>(from, to, count);
  }
}

inline void pack_any(StateFormat format, std::size_t field, const float* from,
                     const Moment& to, std::uint64_t first, std::uint64_t count,
                     const RoundingNoise& noise) {
  constexpr std::size_t kExpAvg = AdamWFields::kExpAvg;
  constexpr std::size_t kExpAvgSq = AdamWFields::kExpAvgSq;
  const bool is_signed = field == kExpAvg;
  if (format == StateFormat::kBf16) {
    if (is_signed) {
      pack_all<StateFormat::kBf16, kExpAvg>(from, to, first, count, noise);
    } else {
      pack_all<StateFormat::kBf16, kExpAvgSq>(from, to, first, count, noise);
    }
  } else if (is_signed) {
    pack_all<StateFormat::kInt8, kExpAvg>(from, to, first, count, noise);
  } else {
    pack_all<StateFormat::kInt8, kExpAvgSq>(from, to, first, count, noise);
  }
}

inline void update_any(StateFormat format, const AdamWRun& run,
                       const AdamWCoefficients& with,
                       const RoundingNoise& noise) {
  if (format == StateFormat::kBf16) {
    update<StateFormat::kBf16>(run, with, noise);
  } else {
    update<StateFormat::kInt8>(run, with, noise);
  }
}

constexpr AdamWLoops kLoops = {join_all, split_all, unpack_any, pack_any,
                               update_any};
