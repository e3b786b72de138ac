// Part of adamw_loops.h, which says how it is compiled: vectors of eight.

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
