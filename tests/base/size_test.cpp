#include "torch_ext/base/size.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torch_ext {
namespace {

constexpr std::uint64_t kKi = 1024;
constexpr std::uint64_t kMi = kKi * 1024;
constexpr std::uint64_t kGi = kMi * 1024;
constexpr std::uint64_t kTi = kGi * 1024;

TEST(ParseSizeTest, ReadsEveryUnit) {
  const std::vector<std::pair<const char*, std::uint64_t>> cases = {
      {"0", 0},        {"4096", 4096},    {"4096B", 4096},
      {"3K", 3 * kKi}, {"3KiB", 3 * kKi}, {"3KB", 3'000},
      {"3M", 3 * kMi}, {"3MiB", 3 * kMi}, {"3MB", 3'000'000},
      {"3G", 3 * kGi}, {"3GiB", 3 * kGi}, {"3GB", 3'000'000'000},
      {"3T", 3 * kTi}, {"3TiB", 3 * kTi}, {"3TB", 3'000'000'000'000},
  };
  for (const auto& [text, bytes] : cases) {
    EXPECT_EQ(parse_size(text), bytes) << text;
  }
}

TEST(ParseSizeTest, ReadsUnitsInAnyCaseAndBehindOneSpace) {
  EXPECT_EQ(parse_size("1mIb"), kMi);
  EXPECT_EQ(parse_size("1gb"), 1'000'000'000u);
  EXPECT_EQ(parse_size("512 KB"), 512'000u);
  EXPECT_EQ(parse_size("8 b"), 8u);
}

TEST(ParseSizeTest, ReadsFractionsThatGiveWholeBytes) {
  EXPECT_EQ(parse_size("1.5G"), kGi + kGi / 2);
  EXPECT_EQ(parse_size("0.001KB"), 1u);
  EXPECT_EQ(parse_size("2.0"), 2u);
  EXPECT_EQ(parse_size("0.0009765625M"), 1024u);
  // 2^-40, in full: one byte.
  EXPECT_EQ(parse_size("0.0000000000009094947017729282379150390625T"), 1u);
  EXPECT_EQ(parse_size("1." + std::string(1000, '0') + "K"), kKi);
}

TEST(ParseSizeTest, RefusesFractionsOfBytes) {
  for (const char* text : {"0.5", "1.1K", "0.0001KB", "0.3G"}) {
    EXPECT_THROW(parse_size(text), std::invalid_argument) << text;
  }
}

TEST(ParseSizeTest, RefusesWhatReachesTwoToTheSixtyThree) {
  EXPECT_EQ(parse_size("9223372036854775807"), 9223372036854775807u);
  EXPECT_EQ(parse_size("8388607.5T"), (8388607 * kTi) + kTi / 2);
  for (const char* text :
       {"9223372036854775808", "18446744073709551616", "8388608T", "16777216T",
        "16777217T", "8589934592G", "99999999999999999999999999T",
        "9223372036854775807K", "9223372036854.775808MB"}) {
    EXPECT_THROW(parse_size(text), std::invalid_argument) << text;
  }
}

TEST(ParseSizeTest, RefusesEverythingElse) {
  const std::string nul("1\0K", 3);
  const std::vector<std::string> cases = {
      "",    " ",    "K",     "B",    "-1",  "-1K", "+1",   " 1",
      "1 ",  "1K ",  "1  K",  "1.",   ".5G", "1.K", "1..5", "1.5.5",
      "1e6", "0x10", "1_000", "1,5G", "1Ki", "1P",  "1KBB", "1bit",
      "NaN", "inf",  "auto",  "1\tK", "1\n", nul,   "१K",   "1K\xff"};
  for (const std::string& text : cases) {
    EXPECT_THROW(parse_size(text), std::invalid_argument) << text;
  }
}

TEST(ParseSizeTest, SaysWhatWasGivenAndWhatIsAllowed) {
  try {
    parse_size("12 parsecs");
    FAIL();
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("\"12 parsecs\""), text.npos) << text;
    EXPECT_NE(text.find("allowed: "), text.npos) << text;
  }
}

TEST(ParseSizeTest, SaysSoBehindANulToo) {
  try {
    parse_size(std::string_view("1\0\n", 3));
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_TRUE(std::string(error.what()).starts_with("\"1  \" is not a size"));
  }
}

TEST(ParseSizeTest, KeepsTheMessageOfALongTextShort) {
  try {
    parse_size(std::string(1'000'000, 'x'));
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_LT(std::string(error.what()).size(), 300u);
  }
}

TEST(FormatSizeTest, ShowsAtMostTwoDecimals) {
  const std::vector<std::pair<std::uint64_t, const char*>> cases = {
      {0, "0 B"},
      {1, "1 B"},
      {1023, "1023 B"},
      {kKi, "1 KiB"},
      {kKi + kKi / 2, "1.5 KiB"},
      {kMi + kMi / 100, "1.01 MiB"},
      {kGi * 3 / 4, "768 MiB"},
      {kGi + kGi / 2, "1.5 GiB"},
      {kTi * 2048, "2048 TiB"},
      {UINT64_MAX, "16777216 TiB"},
  };
  for (const auto& [bytes, text] : cases) {
    EXPECT_EQ(format_size(bytes), text) << bytes;
  }
}

TEST(FormatSizeTest, RoundsUpIntoTheNextUnit) {
  EXPECT_EQ(format_size(kMi - 1), "1 MiB");
  EXPECT_EQ(format_size(kGi - 1), "1 GiB");
}

TEST(FormatSizeTest, IsReadBackByParseSizeWhereItIsExact) {
  for (const std::uint64_t bytes :
       {std::uint64_t{0}, std::uint64_t{17}, kKi, kMi * 5 / 4, kGi * 7 / 2}) {
    EXPECT_EQ(parse_size(format_size(bytes)), bytes);
  }
}

}  // namespace
}  // namespace torch_ext
