#include "torch_ext/memory/host_block.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "support/temp_dir.h"
#include "torch_ext/base/align.h"

namespace torch_ext {
namespace {

bool is_mapped(const std::byte* page) {
  unsigned char there = 0;
  return mincore(const_cast<std::byte*>(page), page_size(), &there) == 0;
}

TEST(HostBlockTest, ABlockLivesAsLongAsItsParts) {
  const std::size_t page = page_size();
  auto block = allocate_block(4 * page);
  std::byte* const data = block.get();
  EXPECT_TRUE(is_aligned(data, page));
  auto part = part_of(block, page, page);
  block.reset();
  std::memset(part.get(), 7, page);
  EXPECT_TRUE(is_mapped(data));
  part.reset();
  EXPECT_FALSE(is_mapped(data));
}

TEST(HostBlockTest, APartThatEndsGivesBackItsWholePagesAndNoOthers) {
  const std::size_t page = page_size();
  const auto block = allocate_block(6 * page);
  std::memset(block.get(), 7, 6 * page);
  auto part = part_of(block, page / 2, 3 * page);
  part.reset();
  std::vector<std::byte> expected(6 * page, std::byte{7});
  std::memset(expected.data() + page, 0, 2 * page);  // Taken anew, they are 0.
  EXPECT_EQ(std::memcmp(block.get(), expected.data(), expected.size()), 0);
}

TEST(HostBlockTest, AMappedFileIsPrivate) {
  const test::TempDir directory;
  std::ofstream(directory / "x") << "content";
  const File file = File::open(directory / "x", File::Mode::kRead);
  const auto block = map_block(file);
  EXPECT_EQ(std::memcmp(block.get(), "content", 7), 0);
  block.get()[0] = std::byte{'k'};
  EXPECT_EQ(std::memcmp(map_block(file).get(), "content", 7), 0);
}

TEST(HostBlockTest, NothingIsNull) {
  const test::TempDir directory;
  std::ofstream(directory / "x").flush();
  EXPECT_EQ(allocate_block(0), nullptr);
  EXPECT_EQ(map_block(File::open(directory / "x", File::Mode::kRead)), nullptr);
}

}  // namespace
}  // namespace torch_ext
