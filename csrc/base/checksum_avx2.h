#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace torch_ext {

/// checksum() with AVX2 instructions. Call it only where have_avx2() is true.
#if defined(__x86_64__)
bool have_avx2() noexcept;
std::uint64_t checksum_avx2(std::span<const std::byte> bytes) noexcept;
#endif

}  // namespace torch_ext
