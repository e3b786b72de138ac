#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "support/adamw_moments.h"
#include "torch_ext/optim/adamw_update.h"

namespace torch_ext {
namespace {

using test::all_loops;
using test::bits_of;
using test::float_of;
using test::kBlock;
using test::kM;
using test::kV;
using test::Memory;
using test::numbers;

// ---- Noise -----------------------------------------------------------------

TEST(AdamWFormatsTest, ThreefryGivesThePublishedNumbers) {
  struct {
    std::uint32_t counter[4], key[4], out[4];
  } known[] = {
      {{}, {}, {0x9c6ca96a, 0xe17eae66, 0xfc10ecd4, 0x5256a7d8}},
      {{~0u, ~0u, ~0u, ~0u},
       {~0u, ~0u, ~0u, ~0u},
       {0x2a881696, 0x57012287, 0xf6c7446e, 0xa16a6732}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0, 0x082efa98, 0xec4e6c89},
       {0x59cd1dbb, 0xb8879579, 0x86b5d00c, 0xac8b6d84}},
  };
  for (const auto& test : known) {
    std::uint32_t out[4];
    threefry(test.counter, test.key, out);
    EXPECT_TRUE(std::equal(out, out + 4, test.out));
  }
}

TEST(AdamWFormatsTest, NoiseIsThatOfItsSeedStepParameterFieldAndElement) {
  const RoundingNoise noise{0x123456789, 0xabcdef0123, 77};
  const std::uint64_t far = (std::uint64_t{1} << 40) + 64 * 5;
  for (const std::uint64_t first : {std::uint64_t{0}, far}) {
    for (std::uint64_t i = 0; i < 64; ++i) {
      const std::uint64_t counter = first / 64 * 8 + i % 8;
      std::uint32_t words[4];
      threefry({static_cast<std::uint32_t>(counter),
                static_cast<std::uint32_t>(counter >> 32), 77, kV},
               {0x23456789, 0x1, 0xcdef0123, 0xab}, words);
      const std::uint32_t word = words[i / 16];
      EXPECT_EQ(noise_of(noise, kV, first + i),
                i / 8 % 2 == 0 ? word & 0xffff : word >> 16);
    }
  }
}

// ---- The master of a bfloat16 parameter -------------------------------------

TEST(AdamWFormatsTest, EveryMasterComesBackFromItsParameterAndLowHalf) {
  for (const AdamWLoops* loops : all_loops()) {
    std::vector<float> masters(1 << 16), back(1 << 16);
    std::vector<std::uint16_t> parameter(1 << 16), low(1 << 16);
    // All upper halves, with low halves around the tie and at the ends.
    for (const std::uint32_t half :
         {0u, 1u, 0x7ffeu, 0x7fffu, 0x8000u, 0x8001u, 0xfffeu, 0xffffu}) {
      for (std::uint32_t i = 0; i < masters.size(); ++i) {
        masters[i] = float_of(i << 16 | half);
      }
      loops->split(masters.data(), parameter.data(), low.data(),
                   masters.size());
      loops->join(parameter.data(), low.data(), back.data(), masters.size());
      for (std::size_t i = 0; i < masters.size(); ++i) {
        const std::uint32_t was = bits_of(masters[i]);
        if (std::isnan(masters[i])) {
          ASSERT_EQ(parameter[i], 0x7fc0);
          ASSERT_EQ(bits_of(back[i]), 0x7fc00000u);
          continue;
        }
        ASSERT_EQ(bits_of(back[i]), was);
        // To nearest, ties away from zero; beyond the largest to infinity.
        const std::uint32_t up = (was & 0xffff) >= 0x8000 ? 1 : 0;
        ASSERT_EQ(parameter[i], (was >> 16) + up);
      }
    }
  }
}

TEST(AdamWFormatsTest, WhateverTheLowHalfTheMasterRoundsToTheParameter) {
  for (const AdamWLoops* loops : all_loops()) {
    std::vector<std::uint16_t> parameter(1 << 16), low(1 << 16), again(1 << 16),
        rest(1 << 16);
    std::vector<float> master(1 << 16);
    for (std::uint32_t i = 0; i < parameter.size(); ++i) {
      parameter[i] = static_cast<std::uint16_t>(i);
    }
    for (const std::uint32_t half :
         {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      std::fill(low.begin(), low.end(), static_cast<std::uint16_t>(half));
      loops->join(parameter.data(), low.data(), master.data(), master.size());
      loops->split(master.data(), again.data(), rest.data(), master.size());
      for (std::uint32_t i = 0; i < parameter.size(); ++i) {
        const bool nan = (i & 0x7fff) > 0x7f80;
        ASSERT_EQ(std::isnan(master[i]), nan) << i << " " << half;
        ASSERT_EQ(again[i], nan ? 0x7fc0 : i) << half;
      }
    }
  }
}

TEST(AdamWFormatsTest, MastersOfAnyNumberAreConverted) {
  for (std::size_t count = 0; count < 40; ++count) {
    const std::vector<float> masters = numbers(count, 3);
    std::vector<std::uint16_t> parameter(count + 1, 7), low(count + 1, 7);
    std::vector<float> back(count + 1, 7);
    split_master(masters.data(), parameter.data(), low.data(), count);
    join_master(parameter.data(), low.data(), back.data(), count);
    EXPECT_TRUE(std::equal(masters.begin(), masters.end(), back.begin()));
    EXPECT_EQ(back[count], 7);
    EXPECT_EQ(parameter[count], 7);
    EXPECT_EQ(low[count], 7);
    split_master(masters.data(), nullptr, low.data(), count);
  }
}

// ---- Moments ----------------------------------------------------------------

/// What pack_moment() must make of an element, in plain arithmetic. It is one
/// of the two neighbours that the format has. It is the upper one if the noise
/// is larger than the distance to it in units of 1/65536.
float expected_bf16(float x, std::uint32_t noise) {
  if (std::isnan(x) || std::isinf(x)) return x;
  const std::uint32_t magnitude = bits_of(std::fabs(x));
  const std::uint32_t below = magnitude & 0xffff0000;
  std::uint32_t rounded =
      (magnitude & 0xffff) + noise > 0xffff ? below + 0x10000 : below;
  if (rounded == 0x7f800000) rounded = 0x7f7f0000;
  return std::copysign(float_of(rounded), x);
}

/// `power` is that of the block, as docs/formats.md has it.
double expected_int8(double x, std::uint32_t noise, int power, bool is_signed) {
  if (x == 0) return 0;
  int exponent = 0;
  std::frexp(x, &exponent);
  const bool no_float = std::fabs(x) < std::ldexp(1, -126);
  const int least = power - (is_signed ? 14 : 30);
  const int of_unit = no_float ? least : std::max(exponent - 1, least);
  const double unit = std::ldexp(1, of_unit - 3);
  const double units = std::floor(std::fabs(x) / unit * 65536);
  double rounded = std::floor((units + noise) / 65536);
  if (no_float) rounded = 0;
  if (!is_signed) rounded = std::max(rounded, 1.0);
  return std::copysign(rounded * unit, x);
}

int power_of_block(const std::vector<float>& block) {
  float largest = 0;
  for (const float x : block) largest = std::max(largest, std::fabs(x));
  int exponent = 0;
  const float fraction = std::frexp(largest, &exponent);
  return std::max(fraction > 0.875f ? exponent : exponent - 1, -125);
}

TEST(AdamWFormatsTest, Bf16MomentsAreRoundedToANeighbourByTheNoise) {
  const RoundingNoise noise{5, 6, 7};
  const std::size_t count = 5 * kBlock + 77;
  const std::uint64_t first = 3 * kBlock;
  for (const std::size_t field : {kM, kV}) {
    std::vector<float> values = numbers(count, 1, field == kV);
    values[1] = std::numeric_limits<float>::max();
    values[2] = std::numeric_limits<float>::infinity();
    values[4] = std::numeric_limits<float>::denorm_min();
    for (const AdamWLoops* loops : all_loops()) {
      Memory memory(StateFormat::kBf16, count);
      std::vector<float> back(count);
      loops->pack(StateFormat::kBf16, field, values.data(), memory.moment(),
                  first, count, noise);
      loops->unpack(StateFormat::kBf16, field, memory.moment(), back.data(),
                    count);
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t drawn =
            noise_of(noise, static_cast<std::uint32_t>(field), first + i);
        ASSERT_EQ(bits_of(back[i]), bits_of(expected_bf16(values[i], drawn)))
            << values[i];
      }
    }
  }
}

TEST(AdamWFormatsTest, Int8MomentsAreRoundedToANeighbourByTheNoise) {
  const RoundingNoise noise{8, 9, 10};
  const std::size_t count = 6 * kBlock + 100;
  const std::uint64_t first = 2 * kBlock;
  std::mt19937 random(4);
  for (const std::size_t field : {kM, kV}) {
    // Blocks of different size, elements of any size within them.
    std::vector<float> values(count);
    const int sizes[] = {0, -20, 100, 127, -110, -140, 3};
    for (std::size_t i = 0; i < count; ++i) {
      const auto fraction = static_cast<float>(random() % 65536) / 65536;
      const int less = static_cast<int>(random() % 40);
      values[i] = std::ldexp(fraction, sizes[i / kBlock] - less);
      if (field == kM && random() % 2 == 0) values[i] = -values[i];
    }
    for (const AdamWLoops* loops : all_loops()) {
      Memory memory(StateFormat::kInt8, count);
      std::vector<float> back(count);
      loops->pack(StateFormat::kInt8, field, values.data(), memory.moment(),
                  first, count, noise);
      loops->unpack(StateFormat::kInt8, field, memory.moment(), back.data(),
                    count);
      for (std::size_t at = 0; at < count; at += kBlock) {
        const std::size_t end = std::min(count, at + kBlock);
        const std::vector<float> block(
            values.begin() + static_cast<std::ptrdiff_t>(at),
            values.begin() + static_cast<std::ptrdiff_t>(end));
        const int power = power_of_block(block);
        for (std::size_t i = at; i < end; ++i) {
          const std::uint32_t drawn =
              noise_of(noise, static_cast<std::uint32_t>(field), first + i);
          // Where a float is as coarse as that, it is rounded once more.
          const auto expected = static_cast<float>(
              expected_int8(values[i], drawn, power, field == kM));
          ASSERT_EQ(back[i], expected) << values[i] << " of 2^" << power;
        }
      }
    }
  }
}

TEST(AdamWFormatsTest, RoundingIsRightOnAverage) {
  const std::size_t count = 64 * kBlock;
  for (const StateFormat format : {StateFormat::kBf16, StateFormat::kInt8}) {
    for (const std::size_t field : {kM, kV}) {
      // Between two numbers of either format; one that sets the scale.
      std::vector<float> values(count, 0.001234f);
      for (std::size_t i = 0; i < count; i += kBlock) values[i] = 1;
      Memory memory(format, count);
      std::vector<float> back(count);
      double sum = 0;
      for (std::uint64_t step = 0; step < 16; ++step) {
        pack_moment(format, field, values.data(), memory.moment(), 0, count,
                    {1, step, 0});
        unpack_moment(format, field, memory.moment(), back.data(), count);
        for (const float x : back) sum += x != 1 ? x : 0;
      }
      const double mean = sum / (16.0 * static_cast<double>(count) * 255 / 256);
      // Four standard deviations of a mean of 261,120 coins.
      const double unit = format == StateFormat::kBf16 ? 7.7e-6 : 1.3e-4;
      EXPECT_NEAR(mean, 0.001234, 4 * unit / 2 / 511);
    }
  }
}

TEST(AdamWFormatsTest, WhatAFormatHoldsIsPackedWithoutLoss) {
  const std::size_t count = 4 * kBlock + 9;
  for (const StateFormat format : {StateFormat::kBf16, StateFormat::kInt8}) {
    for (const std::size_t field : {kM, kV}) {
      std::vector<float> values = numbers(count, 6, field == kV);
      for (float& x : values) x = std::clamp(x, -1e30f, 1e30f);
      Memory memory(format, count);
      std::vector<float> once(count), twice(count);
      pack_moment(format, field, values.data(), memory.moment(), 0, count, {});
      unpack_moment(format, field, memory.moment(), once.data(), count);
      pack_moment(format, field, once.data(), memory.moment(), 0, count,
                  {9, 9, 9});
      unpack_moment(format, field, memory.moment(), twice.data(), count);
      EXPECT_EQ(once, twice);
    }
  }
}

TEST(AdamWFormatsTest, BytesThatAreZeroAreZeroState) {
  for (const StateFormat format : {StateFormat::kBf16, StateFormat::kInt8}) {
    for (const std::size_t field : {kM, kV}) {
      Memory memory(format, kBlock);
      std::vector<float> back(kBlock, 1);
      unpack_moment(format, field, memory.moment(), back.data(), kBlock);
      EXPECT_EQ(back, std::vector<float>(kBlock, 0));
    }
  }
}

TEST(AdamWFormatsTest, NaNStaysWhereItIs) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const AdamWLoops* loops : all_loops()) {
    for (const StateFormat format : {StateFormat::kBf16, StateFormat::kInt8}) {
      for (const std::size_t field : {kM, kV}) {
        std::vector<float> values(2 * kBlock, 1.0f), back(2 * kBlock);
        values[3] = nan;
        values[4] = inf;
        values[kBlock + 1] = float_of(0x7fffffff);
        if (field == kV) values[5] = -1;
        Memory memory(format, values.size());
        loops->pack(format, field, values.data(), memory.moment(), 0,
                    values.size(), {});
        loops->unpack(format, field, memory.moment(), back.data(),
                      values.size());
        EXPECT_TRUE(std::isnan(back[3]) && std::isnan(back[kBlock + 1]));
        // Eight bits have no infinity, and no sign for a square.
        EXPECT_EQ(std::isnan(back[4]), format == StateFormat::kInt8);
        const bool no_sign = format == StateFormat::kInt8 && field == kV;
        EXPECT_EQ(std::isnan(back[5]), no_sign);
        EXPECT_EQ(back[6], 1.0f);
        EXPECT_EQ(back[kBlock], 1.0f);
      }
    }
  }
}

TEST(AdamWFormatsTest, ASquareThatIsNotZeroStaysSo) {
  std::vector<float> values(kBlock, 1e-30f), back(kBlock);
  values[0] = 1;
  values[1] = 0;
  Memory memory(StateFormat::kInt8, kBlock);
  pack_moment(StateFormat::kInt8, kV, values.data(), memory.moment(), 0, kBlock,
              {});
  unpack_moment(StateFormat::kInt8, kV, memory.moment(), back.data(), kBlock);
  EXPECT_EQ(back[1], 0);
  for (std::size_t i = 2; i < kBlock; ++i) {
    EXPECT_EQ(back[i], std::ldexp(1.0f, -33));
  }
}

}  // namespace
}  // namespace torch_ext
