#include "checksum_avx2.h"

#if defined(__x86_64__)

// These stand outside the part that is compiled for AVX2. The linker keeps one
// copy of each inline function, and that copy must run on every processor.
#include <immintrin.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#define XXH_PREFETCH_DIST 1536
#include <xxhash.h>

namespace torch_ext {

std::uint64_t checksum_avx2(std::span<const std::byte> bytes) noexcept {
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace torch_ext

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torch_ext {

bool have_avx2() noexcept { return __builtin_cpu_supports("avx2") != 0; }

}  // namespace torch_ext

#endif
