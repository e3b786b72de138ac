// Part of adamw_loops.h, which says how it is compiled. This part has vectors
// of eight.

using F32 = float __attribute__((vector_size(32)));
using U32 = std::uint32_t __attribute__((vector_size(32)));
using I32 = std::int32_t __attribute__((vector_size(32)));
using U16 = std::uint16_t __attribute__((vector_size(16)));
using Wide16 = std::uint16_t __attribute__((vector_size(32)));
using Mask16 = std::int16_t __attribute__((vector_size(32)));
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

// GCC 12 does not find these instructions on its own, so they are named.
TORCH_EXT_INLINE U32 load_u8(const void* from) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  return as<U32>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load<U8>(from), U32);
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

/// Sixteen numbers of 32 bits, in the order in which their halves are cheapest
/// to take apart. Vectors of sixteen 16-bit numbers are in plain order.
struct Pair {
  U32 first, second;
};

/// Makes a Pair of two vectors that are in plain order.
TORCH_EXT_INLINE Pair pair_of(const U32& first, const U32& second) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  const auto a = as<__m256i>(first);
  const auto b = as<__m256i>(second);
  return {as<U32>(_mm256_permute2x128_si256(a, b, 0x20)),
          as<U32>(_mm256_permute2x128_si256(a, b, 0x31))};
#else
  return {first, second};
#endif
}

TORCH_EXT_INLINE Pair load_pair(const float* from) {
  return pair_of(load<U32>(from), load<U32>(from + kLanes));
}

TORCH_EXT_INLINE Pair join_halves(const Wide16& low, const Wide16& high) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  const auto a = as<__m256i>(low);
  const auto b = as<__m256i>(high);
  return {as<U32>(_mm256_unpacklo_epi16(a, b)),
          as<U32>(_mm256_unpackhi_epi16(a, b))};
#else
  U16 lows[2], highs[2];
  __builtin_memcpy(lows, &low, sizeof low);
  __builtin_memcpy(highs, &high, sizeof high);
  return {__builtin_convertvector(lows[0], U32) |
              __builtin_convertvector(highs[0], U32) << 16,
          __builtin_convertvector(lows[1], U32) |
              __builtin_convertvector(highs[1], U32) << 16};
#endif
}

/// Narrows numbers below 2^16.
TORCH_EXT_INLINE Wide16 narrow(const U32& first, const U32& second) {
#if defined(TORCH_EXT_LOOPS_AVX2)
  return as<Wide16>(
      _mm256_packus_epi32(as<__m256i>(first), as<__m256i>(second)));
#else
  const U16 halves[2] = {__builtin_convertvector(first, U16),
                         __builtin_convertvector(second, U16)};
  return load<Wide16>(halves);
#endif
}

TORCH_EXT_INLINE Wide16 low_halves(const Pair& pair) {
  return narrow(pair.first & 0xffff, pair.second & 0xffff);
}

TORCH_EXT_INLINE Wide16 high_halves(const Pair& pair) {
  return narrow(pair.first >> 16, pair.second >> 16);
}

TORCH_EXT_INLINE Wide16 all16(std::uint16_t value) { return Wide16{} + value; }

TORCH_EXT_INLINE Wide16 select16(const Mask16& mask, const Wide16& yes,
                                 const Wide16& no) {
  const auto bits = as<Wide16>(mask);
  return (yes & bits) | (no & ~bits);
}
