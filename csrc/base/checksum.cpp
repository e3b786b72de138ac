#include "torch_ext/base/checksum.h"

// Compiled in: no run-time library to find, and one translation unit pays.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace torch_ext {

std::uint64_t checksum(std::span<const std::byte> bytes) noexcept {
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace torch_ext
