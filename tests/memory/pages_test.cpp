#include "memory/pages.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <fstream>

namespace torch_ext {
namespace {

/// Bytes of this process's address space.
std::size_t mapped_bytes() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

TEST(PagesTest, WholePagesAreMappedAndGivenBackHoweverLargeAPageIs) {
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  mapped_bytes();  // What it needs is there from now on.
  for (const std::size_t page : {page_size(), std::size_t{64} << 10}) {
    for (const std::size_t bytes :
         {std::size_t{1}, std::size_t{4096}, std::size_t{68} << 10, 2 * kMiB,
          2 * kMiB + 4096, 7 * kMiB - 4096}) {
      const std::size_t before = mapped_bytes();
      std::byte* const data = map_pages(bytes, page);
      const std::size_t size = align_up(bytes, page);
      EXPECT_EQ(mapped_bytes() - before, size) << bytes << " in " << page;
      if (bytes >= 2 * kMiB) {
        EXPECT_TRUE(is_aligned(data, 2 * kMiB));
      }
      std::memset(data, 1, size);
      unmap_pages(data, bytes, page);
      EXPECT_EQ(mapped_bytes(), before) << bytes << " in " << page;
    }
  }
}

}  // namespace
}  // namespace torch_ext
