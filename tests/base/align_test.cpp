#include "torch_ext/base/align.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace torch_ext {
namespace {

TEST(AlignTest, UpGivesTheNextMultipleAndKeepsMultiples) {
  EXPECT_EQ(align_up(0, 4096), 0u);
  EXPECT_EQ(align_up(1, 4096), 4096u);
  EXPECT_EQ(align_up(4096, 4096), 4096u);
  EXPECT_EQ(align_up(4097, 4096), 8192u);
  EXPECT_EQ(align_up(7, 3), 9u);  // Not only powers of two.
}

TEST(AlignTest, DownGivesThePreviousMultipleAndKeepsMultiples) {
  EXPECT_EQ(align_down(0, 4096), 0u);
  EXPECT_EQ(align_down(4095, 4096), 0u);
  EXPECT_EQ(align_down(4096, 4096), 4096u);
  EXPECT_EQ(align_down(8, 3), 6u);
}

TEST(AlignTest, HoldsBeyondFourGigabytes) {
  constexpr std::uint64_t kBig = std::uint64_t{1} << 40;
  EXPECT_EQ(align_up(kBig + 1, 4096), kBig + 4096);
  EXPECT_EQ(align_down(kBig + 4095, 4096), kBig);
}

TEST(AlignTest, TellsAlignedNumbersAndAddresses) {
  alignas(64) const std::array<std::byte, 65> bytes{};
  EXPECT_TRUE(is_aligned(std::uint64_t{8192}, 4096));
  EXPECT_FALSE(is_aligned(std::uint64_t{4608}, 4096));
  EXPECT_TRUE(is_aligned(bytes.data(), 64));
  EXPECT_FALSE(is_aligned(bytes.data() + 1, 64));
}

}  // namespace
}  // namespace torch_ext
