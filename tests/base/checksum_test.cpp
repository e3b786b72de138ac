#include "torch_ext/base/checksum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "support/pattern.h"

// The reference: what the published header computes one word at a time.
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_SCALAR
#include <xxhash.h>

namespace torch_ext {
namespace {

std::uint64_t checksum_of(std::string_view text) {
  return checksum(std::as_bytes(std::span(text)));
}

// The values that the published xxhash tool prints (xxhsum -H3), so that sums
// stay comparable between versions and machines.
TEST(ChecksumTest, IsXxh3OfSixtyFourBits) {
  EXPECT_EQ(checksum_of(""), 0x2d06800538d394c2u);
  EXPECT_EQ(checksum_of("a"), 0xe6c632b61e964e1fu);
  EXPECT_EQ(checksum_of("abc"), 0x78af5f94892f3950u);
}

TEST(ChecksumTest, IsTheSameByWhateverInstructions) {
  std::vector<std::byte> memory(70000);
  test::fill_pattern(memory, /*seed=*/4);
  std::vector<std::size_t> lengths = {4096, 65535, 65536, 65537, 70000};
  for (std::size_t length = 0; length < 2100; ++length) {
    lengths.push_back(length);
  }
  for (const std::size_t length : lengths) {
    ASSERT_EQ(checksum(std::span(memory).first(length)),
              XXH3_64bits(memory.data(), length))
        << length << " bytes";
  }
}

TEST(ChecksumTest, ChangesWithEveryBitOfABlock) {
  std::vector<std::byte> block(4096);
  test::fill_pattern(block, /*seed=*/1);
  const std::uint64_t before = checksum(block);
  for (std::size_t bit = 0; bit < block.size() * 8; ++bit) {
    const auto mask = static_cast<std::byte>(1u << (bit % 8));
    block[bit / 8] ^= mask;
    ASSERT_NE(checksum(block), before) << "bit " << bit;
    block[bit / 8] ^= mask;
  }
  EXPECT_EQ(checksum(block), before);
}

TEST(ChecksumTest, ChangesWithLengthAndOrder) {
  std::vector<std::byte> block(8192);
  test::fill_pattern(block, /*seed=*/2);
  const std::span<const std::byte> bytes(block);
  EXPECT_NE(checksum(bytes), checksum(bytes.first(8191)));
  const std::uint64_t before = checksum(bytes);
  std::ranges::rotate(block, block.begin() + 4096);
  EXPECT_NE(checksum(bytes), before);
}

TEST(ChecksumTest, DoesNotDependOnTheAddress) {
  std::vector<std::byte> memory(5000);
  test::fill_pattern(memory, /*seed=*/3);
  const std::uint64_t expected = checksum(std::span(memory).first(4097));
  for (std::size_t shift = 1; shift < 64; ++shift) {
    std::ranges::copy_backward(
        std::span(memory).subspan(shift - 1, 4097),
        memory.begin() + static_cast<std::ptrdiff_t>(shift + 4097));
    EXPECT_EQ(checksum(std::span(memory).subspan(shift, 4097)), expected);
  }
}

}  // namespace
}  // namespace torch_ext
