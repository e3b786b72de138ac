#include "adamw_dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#define TORCH_EXT_LOOPS_AVX2

namespace torch_ext {
namespace {
#include "adamw_loops.h"
}  // namespace
}  // namespace torch_ext

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torch_ext {

const AdamWLoops* avx2_adamw_loops() noexcept {
  static const bool available = __builtin_cpu_supports("avx2") != 0;
  return available ? &kLoops : nullptr;
}

}  // namespace torch_ext

#else

namespace torch_ext {

const AdamWLoops* avx2_adamw_loops() noexcept { return nullptr; }

}  // namespace torch_ext

#endif
