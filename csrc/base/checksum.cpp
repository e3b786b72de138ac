#include "torch_ext/base/checksum.h"

#include "checksum_avx2.h"

// xxhash is compiled in, so there is no library to find at run time, and only
// this file pays for it.
#define XXH_INLINE_ALL
// The bytes to be hashed have mostly left the caches. This distance takes a
// quarter less time than the header's 384 bytes. Anything from 1 to 2 KiB does
// as well.
#define XXH_PREFETCH_DIST 1536
#include <xxhash.h>

namespace torch_ext {

std::uint64_t checksum(std::span<const std::byte> bytes) noexcept {
#if defined(__x86_64__)
  static const bool use_avx2 = have_avx2();
  if (use_avx2) return checksum_avx2(bytes);
#endif
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace torch_ext
