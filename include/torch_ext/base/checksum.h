#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace torch_ext {

/// XXH3-64 of `bytes` with seed 0. Threads: any; never fails.
/// Format: https://github.com/Cyan4973/xxHash, "XXH3_64bits".
std::uint64_t checksum(std::span<const std::byte> bytes) noexcept;

}  // namespace torch_ext
