#include "torch_ext/config/aio_config.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torch_ext {
namespace {

using std::string_literals::operator""s;

AioConfig parse(std::string_view json) { return parse_aio_config(json).config; }

// {"aio": {KEY: VALUE}}, with VALUE in JSON.
std::string with(std::string_view key, std::string_view value) {
  return "{\"aio\": {\"" + std::string(key) + "\": " + std::string(value) +
         "}}";
}

std::vector<std::string> warnings_of(std::string_view json) {
  return parse_aio_config(json).warnings;
}

// The message with which a text is refused; empty if it is not.
std::string refusal_of(std::string_view json) {
  try {
    parse_aio_config(json);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return {};
}

std::string refusal_of(const ConfigItems& section) {
  try {
    read_aio_section(section);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return {};
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != text.npos;
}

TEST(AioConfigTest, DefaultsAreThoseOfDeepSpeed) {
  const AioConfig config;
  EXPECT_EQ(config.block_size, 1048576u);
  EXPECT_EQ(config.queue_depth, 8);
  EXPECT_EQ(config.thread_count, 1);
  EXPECT_FALSE(config.single_submit);
  EXPECT_TRUE(config.overlap_events);
}

TEST(AioConfigTest, MissingOrNullSectionOrKeyHasTheDefault) {
  for (const char* json :
       {"{}", "{\"aio\": null}", "{\"aio\": {}}", "{\"train_batch_size\": 8}",
        "\xef\xbb\xbf {\"aio\": {}}", " \t\r\n{} \n"}) {
    EXPECT_EQ(parse(json), AioConfig()) << json;
  }
  for (const std::string_view key : aio_keys()) {
    for (const char* value : {"null", "\"auto\"", "\"Auto\""}) {
      EXPECT_EQ(parse(with(key, value)), AioConfig()) << key << value;
    }
  }
}

TEST(AioConfigTest, ReadsAllKnobs) {
  const AioConfig config = parse(
      R"({"zero": {"aio": {"queue_depth": 9}},
          "aio": {"block_size": 4096, "queue_depth": 32, "thread_count": 2,
                  "single_submit": true, "overlap_events": false}})");
  EXPECT_EQ(config.block_size, 4096u);
  EXPECT_EQ(config.queue_depth, 32);
  EXPECT_EQ(config.thread_count, 2);
  EXPECT_TRUE(config.single_submit);
  EXPECT_FALSE(config.overlap_events);
  EXPECT_TRUE(
      parse_aio_config("{\"aio\": {\"queue_depth\": 1}}").warnings.empty());
}

TEST(AioConfigTest, ReadsOnlyTheSectionOfTheTopLevel) {
  EXPECT_EQ(parse(R"({"a": {"aio": {"queue_depth": 9}}, "queue_depth": 9})"),
            AioConfig());
  EXPECT_EQ(parse(R"({"aio": {"block_size": 4096}, "x": {"queue_depth": 0}})")
                .block_size,
            4096u);
  EXPECT_EQ(
      parse(R"({"a": [{"aio": 5}], "aio": {"queue_depth": 9}})").queue_depth,
      9);
}

TEST(AioConfigTest, OneKnobLeavesTheOthersAtTheirDefaults) {
  AioConfig expected;
  expected.queue_depth = 16;
  EXPECT_EQ(parse(with("queue_depth", "16")), expected);
}

TEST(AioConfigTest, LimitsAreAllowedAndOneBeyondIsNot) {
  EXPECT_EQ(parse(with("block_size", "1")).block_size, 1u);
  EXPECT_EQ(parse(with("block_size", "1073741824")).block_size,
            AioConfig::kMaxBlockSize);
  EXPECT_EQ(parse(with("queue_depth", "65536")).queue_depth, 65536);
  EXPECT_EQ(parse(with("thread_count", "256")).thread_count, 256);
  EXPECT_NE(refusal_of(with("block_size", "1073741825")), "");
  EXPECT_NE(refusal_of(with("queue_depth", "65537")), "");
  EXPECT_NE(refusal_of(with("thread_count", "257")), "");
}

TEST(AioConfigTest, IntegralFloatsAreIntegers) {
  EXPECT_EQ(parse(with("block_size", "1e6")).block_size, 1'000'000u);
  EXPECT_EQ(parse(with("block_size", "1048576.0")).block_size, 1048576u);
  EXPECT_EQ(parse(with("queue_depth", "8.0")).queue_depth, 8);
}

TEST(AioConfigTest, BlockSizeMayBeASizeAndCountsMayBeDigits) {
  EXPECT_EQ(parse(with("block_size", "\"1M\"")).block_size, 1u << 20);
  EXPECT_EQ(parse(with("block_size", "\"512 KiB\"")).block_size, 1u << 19);
  EXPECT_EQ(parse(with("block_size", "\"2MB\"")).block_size, 2'000'000u);
  EXPECT_EQ(parse(with("block_size", "\"1048576\"")).block_size, 1u << 20);
  EXPECT_EQ(parse(with("queue_depth", "\"8\"")).queue_depth, 8);
  EXPECT_EQ(parse(with("thread_count", "\"16\"")).thread_count, 16);
}

TEST(AioConfigTest, FlagsMayBeWordsInAnyCase) {
  for (const char* word : {"true", "\"true\"", "\"True\"", "\"TRUE\""}) {
    EXPECT_TRUE(parse(with("single_submit", word)).single_submit) << word;
  }
  for (const char* word : {"false", "\"false\"", "\"False\"", "\"FALSE\""}) {
    EXPECT_FALSE(parse(with("overlap_events", word)).overlap_events) << word;
  }
}

TEST(AioConfigTest, RefusalsNameKeyValueAndRange) {
  EXPECT_EQ(refusal_of(with("queue_depth", "0")),
            "aio.queue_depth is 0; allowed: an integer from 1 to 65536");
  EXPECT_EQ(refusal_of(with("block_size", "\"big\"")),
            "aio.block_size is \"big\"; allowed: an integer from 1 to "
            "1073741824, or a size such as \"1M\"");
  EXPECT_EQ(refusal_of(with("single_submit", "1")),
            "aio.single_submit is 1; allowed: true or false");
  EXPECT_EQ(refusal_of(with("queue_depth", "99999999999999999999999")),
            "aio.queue_depth is 99999999999999999999999; allowed: an integer "
            "from 1 to 65536");
  EXPECT_EQ(refusal_of(with("queue_depth", "1e400")),
            "aio.queue_depth is 1e400; allowed: an integer from 1 to 65536");
  EXPECT_EQ(refusal_of(with("num_threads", "-3")),
            "aio.num_threads is -3; allowed: an integer from 1 to 256");
}

class RefusedNumberTest : public testing::TestWithParam<const char*> {};

TEST_P(RefusedNumberTest, IsRefusedForEveryNumberAndShown) {
  for (const std::string_view key : aio_keys()) {
    if (key == "single_submit" || key == "overlap_events") continue;
    const std::string text = refusal_of(with(key, GetParam()));
    EXPECT_TRUE(contains(text, "aio." + std::string(key) + " is ")) << text;
    EXPECT_TRUE(contains(text, "allowed: an integer from 1 to ")) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Values, RefusedNumberTest,
    testing::Values("0", "-1", "0.0", "-0.0", "1.5", "-1e6", "true", "false",
                    "-2147483648", "2147483648", "4294967297",
                    "9223372036854775808", "18446744073709551615",
                    "18446744073709551617", "-9223372036854775809",
                    "99999999999999999999999999", "1e19", "1e300", "1e400",
                    "-1e400", "1e-400", "\"\"", "\"-1\"", "\"0\"", "\" 8\"",
                    "\"8 \"", "\"1.5\"", "\"true\"", "\"0x10\"", "\"1e3\"",
                    "\"18446744073709551617\"", "\"NaN\"", "[]", "[8]", "{}",
                    "{\"a\": 8}"));

class RefusedFlagTest : public testing::TestWithParam<const char*> {};

TEST_P(RefusedFlagTest, IsRefusedForEveryFlag) {
  for (const char* key : {"single_submit", "overlap_events"}) {
    const std::string text = refusal_of(with(key, GetParam()));
    EXPECT_TRUE(contains(text, "aio."s + key + " is ")) << text;
    EXPECT_TRUE(contains(text, "allowed: true or false")) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(Values, RefusedFlagTest,
                         testing::Values("0", "1", "1.0", "-1", "1e400", "\"\"",
                                         "\"1\"", "\"yes\"", "\" true\"", "[]",
                                         "[true]", "{}"));

TEST(AioConfigTest, CountsAreNotSizes) {
  EXPECT_NE(refusal_of(with("queue_depth", "\"1K\"")), "");
  EXPECT_NE(refusal_of(with("thread_count", "\"8B\"")), "");
}

TEST(AioConfigTest, TheOtherNamesOfThreadCountAreRead) {
  EXPECT_EQ(parse(with("intra_op_parallelism", "4")).thread_count, 4);
  EXPECT_EQ(parse(with("num_threads", "4")).thread_count, 4);
  EXPECT_TRUE(warnings_of(with("num_threads", "4")).empty());
}

TEST(AioConfigTest, NamesOfOneKnobMayAgreeButNotDiffer) {
  EXPECT_EQ(parse(R"({"aio": {"thread_count": 4, "num_threads": "4",
                              "intra_op_parallelism": 4.0}})")
                .thread_count,
            4);
  EXPECT_EQ(parse(R"({"aio": {"num_threads": 4, "thread_count": null}})")
                .thread_count,
            4);
  // One of them being the default makes no difference.
  const std::string text =
      refusal_of(R"({"aio": {"thread_count": 1, "intra_op_parallelism": 4}})");
  EXPECT_TRUE(contains(text, "aio.thread_count is 1")) << text;
  EXPECT_TRUE(contains(text, "aio.intra_op_parallelism")) << text;
  EXPECT_TRUE(contains(text, "is 4")) << text;
}

TEST(AioConfigTest, UnknownKeysWarnWithTheNearestKnownOne) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"queue_dept", "queue_depth"},     {"qeueu_depth", "queue_depth"},
      {"Block_Size", "block_size"},      {"blocksize", "block_size"},
      {"threads_count", "thread_count"}, {"nun_threads", "num_threads"},
      {"SINGLE_SUBMIT", "single_submit"}};
  for (const auto& [key, nearest] : cases) {
    const auto warnings = warnings_of(with(key, "[{\"queue_depth\": 3}]"));
    ASSERT_EQ(warnings.size(), 1u) << key;
    EXPECT_TRUE(contains(warnings[0], "aio."s + key)) << warnings[0];
    EXPECT_TRUE(contains(warnings[0], "did you mean "s + nearest + "?"))
        << warnings[0];
    EXPECT_EQ(parse(with(key, "3")), AioConfig());
  }
}

TEST(AioConfigTest, UnknownKeysUnlikeAnyKnownOneWarnWithAllOfThem) {
  const auto warnings = warnings_of(with("pin_memory", "true"));
  ASSERT_EQ(warnings.size(), 1u);
  for (const std::string_view key : aio_keys()) {
    EXPECT_TRUE(contains(warnings[0], key)) << warnings[0];
  }
}

TEST(AioConfigTest, AKnobOutsideOfTheSectionWarns) {
  for (const auto* json :
       {R"({"queue_depth": 3, "x": 1})",
        R"({"queue_depth": -3, "aio": {"thread_count": 2}})"}) {
    EXPECT_EQ(warnings_of(json),
              std::vector<std::string>{
                  "queue_depth is not in the aio section and is ignored"});
  }
  EXPECT_EQ(parse_aio_settings(R"({"aio": {}, "block_size": 1})").warnings,
            std::vector<std::string>{
                "block_size is not in the aio section and is ignored"});
}

TEST(AioConfigTest, UseGdsWarnsThatGpuDirectIsNotUsed) {
  const auto warnings = warnings_of(with("use_gds", "false"));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_TRUE(contains(warnings[0], "GPUDirect storage is not used"));
}

TEST(AioConfigTest, ManyUnknownKeysGiveFewWarnings) {
  std::string json = "{\"aio\": {\"queue_depth\": 3";
  for (int i = 0; i < 1000; ++i) {
    json += ", \"" + std::to_string(i) + "\": 1";
  }
  const ParsedAioConfig parsed = parse_aio_config(json + "}}");
  EXPECT_EQ(parsed.config.queue_depth, 3);
  EXPECT_EQ(parsed.warnings.size(), 9u);
  EXPECT_TRUE(contains(parsed.warnings.back(), "992 more"))
      << parsed.warnings.back();
}

TEST(AioConfigTest, DuplicateKeysAreRefused) {
  for (const char* json : {
           R"({"aio": {"queue_depth": 1, "queue_depth": 1}})",
           R"({"aio": {"queue_depth": 1, "queue_d\u0065pth": 2}})",
           R"({"aio": {"other": 1, "other": 2}})",
           R"({"aio": {}, "aio": {}})",
           R"({"aio": {}, "aio": null})",
           R"({"x": 1, "aio": {}, "x": 1})",
       }) {
    EXPECT_TRUE(contains(refusal_of(json), "is given twice")) << json;
  }
  // Not ours to judge: other sections.
  EXPECT_EQ(refusal_of(R"({"x": {"a": 1, "a": 2}})"), "");
}

TEST(AioConfigTest, SectionOfAnotherKindIsRefused) {
  for (const char* value : {"[]", "[{}]", "\"x\"", "\"auto\"", "5", "-5", "1.5",
                            "true", "18446744073709551617"}) {
    const std::string text =
        refusal_of("{\"aio\": " + std::string(value) + "}");
    EXPECT_TRUE(text.starts_with("aio is ")) << value << ": " << text;
    EXPECT_TRUE(contains(text, "allowed: an object or null")) << text;
  }
}

TEST(AioConfigTest, ConfigurationOfAnotherKindIsRefused) {
  for (const char* json :
       {"[]", "[{\"aio\": {}}]", "5", "null", "\"aio\"", "true", "1e3"}) {
    EXPECT_TRUE(contains(refusal_of(json), "allowed: an object")) << json;
  }
}

TEST(AioConfigTest, BadJsonIsRefusedWithItsPosition) {
  const std::vector<std::pair<std::string, int>> cases = {
      {"", 1},
      {"   ", 4},
      {"{", 2},
      {"{\"aio\": {}", 11},
      {"{\"aio\": {}}}", 12},
      {"{\"aio\": {}} x", 13},
      {"{'aio': {}}", 2},
      {"{\"aio\": {\"queue_depth\": 8,}}", 27},
      {"{\"aio\": {\"queue_depth\": NaN}}", 25},
      {"{\"aio\": {\"queue_depth\": Infinity}}", 25},
      {"{\"aio\": {\"queue_depth\": 08}}", 26},
      {"{\"aio\": {\"queue_depth\": +8}}", 25},
      {"{} // comment", 4},
      {"/* comment */ {}", 1},
      {"{\"a\": \"\xff\"}", 8},
      {"{\"a\": \"\\ud800\"}", 14},
      {"{\"a\": \"line\nbreak\"}", 12},
      {"\xff\xfe{", 1},
      {"{}\0x"s, 3},
      {"{\"aio\0\": {}}"s, 6},
  };
  for (const auto& [json, position] : cases) {
    const std::string text = refusal_of(json);
    const std::string start = "bad JSON at byte " + std::to_string(position);
    EXPECT_TRUE(text.starts_with(start + ": ") ||
                text.starts_with(start + " (at "))
        << json << ": " << text;
    EXPECT_FALSE(contains(text, "json.exception")) << text;
  }
}

TEST(AioConfigTest, BadJsonInAKnobNamesTheKnob) {
  EXPECT_TRUE(
      contains(refusal_of(with("queue_depth", "NaN")), "(at aio.queue_depth)"));
}

TEST(AioConfigTest, NumberBeyondDoubleElsewhereIsBadJson) {
  EXPECT_TRUE(contains(refusal_of("{\"lr\": 1e400}"), "bad JSON at byte "));
}

TEST(AioConfigTest, DeepNestingNeitherOverflowsNorMatters) {
  constexpr std::size_t kDepth = 1'000'000;
  const std::string lists = std::string(kDepth, '[') + std::string(kDepth, ']');
  EXPECT_EQ(parse("{\"x\": " + lists + ", \"aio\": {\"queue_depth\": 3}}")
                .queue_depth,
            3);
  EXPECT_TRUE(contains(refusal_of(with("queue_depth", lists)),
                       "aio.queue_depth is a list"));
  EXPECT_TRUE(contains(refusal_of(with("x", std::string(kDepth, '['))),
                       "bad JSON at byte"));
  std::string objects;
  for (std::size_t i = 0; i < kDepth; ++i) objects += "{\"aio\":";
  EXPECT_TRUE(contains(refusal_of(objects), "bad JSON at byte"));
}

TEST(AioConfigTest, LongTextGivesShortMessages) {
  const std::string huge(300'000, 'x');
  for (const std::string& json :
       {with("queue_depth", '"' + huge + '"'), with("queue_depth", huge),
        with("queue_depth", '"' + huge),
        with("queue_depth", "1" + std::string(300'000, '0')),
        "{\"aio\": \"" + huge + "\"}",
        "{\"" + huge + "\": 1, \"" + huge + "\": 1}"}) {
    const std::string text = refusal_of(json);
    EXPECT_NE(text, "");
    EXPECT_LT(text.size(), 400u);
  }
  const auto warnings = warnings_of(with(huge, "1"));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_LT(warnings[0].size(), 400u);
}

TEST(AioConfigTest, RandomBytesAreReadOrRefusedAndNothingElse) {
  const std::string seed_text =
      R"({"a": [1, {"aio": null}], "aio": {"block_size": "1M", )"
      R"("queue_depth": 8, "num_threads": 2.0, "single_submit": "true", )"
      R"("use_gds": false, "x": [[]]}})";
  std::mt19937 random(20261122);
  const auto below = [&random](std::size_t limit) {
    return static_cast<std::size_t>(random()) % limit;
  };
  constexpr std::string_view kBytes =
      "{}[]\",:0123456789eE.-+ntfu\\ \0\x80\xff";
  int read = 0;
  for (int round = 0; round < 6'000; ++round) {
    std::string json = seed_text;
    for (std::size_t change = below(4); change-- > 0;) {
      const std::size_t place = below(json.size());
      switch (below(3)) {
        case 0:
          json[place] = kBytes[below(kBytes.size())];
          break;
        case 1:
          json.erase(place, below(6));
          break;
        default:
          json.insert(place, json.substr(below(json.size()), below(12)));
      }
    }
    try {
      parse_aio_config(json).config.validate();
      ++read;
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT_GT(read, 1'200);  // The unchanged text, at least.
  EXPECT_LT(read, 4'800);
}

TEST(ReadAioSectionTest, TakesEveryKindOfValue) {
  const AioConfig config =
      read_aio_section({{"block_size", std::uint64_t{4096}},
                        {"queue_depth", std::int64_t{3}},
                        {"thread_count", 2.0},
                        {"single_submit", true},
                        {"overlap_events", "False"s}})
          .config;
  EXPECT_EQ(config.block_size, 4096u);
  EXPECT_EQ(config.queue_depth, 3);
  EXPECT_EQ(config.thread_count, 2);
  EXPECT_TRUE(config.single_submit);
  EXPECT_FALSE(config.overlap_events);
}

TEST(ReadAioSectionTest, RefusesNumbersThatAreNone) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_TRUE(
      contains(refusal_of(ConfigItems{
                   {"queue_depth", std::numeric_limits<double>::quiet_NaN()}}),
               "aio.queue_depth is nan; allowed: an integer from 1 to 65536"));
  EXPECT_TRUE(contains(refusal_of(ConfigItems{{"block_size", kInfinity}}),
                       "aio.block_size is inf; "));
  EXPECT_TRUE(contains(refusal_of(ConfigItems{{"block_size", -kInfinity}}),
                       "aio.block_size is -inf; "));
}

TEST(ReadAioSectionTest, ShowsOtherValuesAsTheirText) {
  EXPECT_TRUE(contains(
      refusal_of(ConfigItems{{"thread_count", OtherValue{"<object>"}}}),
      "aio.thread_count is <object>; "));
}

TEST(ReadAioSectionTest, KeepsMessagesOnOneLine) {
  EXPECT_TRUE(contains(refusal_of(ConfigItems{{"queue_depth", "a\nb\0"s}}),
                       "is \"a b \"; "));
}

TEST(AioConfigValidateTest, RefusesWhatTheParserRefuses) {
  AioConfig config;
  config.validate();
  const auto refused = [](AioConfig bad) -> std::string {
    try {
      bad.validate();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return {};
  };
  config.block_size = 0;
  EXPECT_TRUE(contains(refused(config), "aio.block_size is 0; allowed: "));
  config.block_size = UINT64_MAX;
  EXPECT_TRUE(contains(refused(config), "is 18446744073709551615; "));
  config = {};
  config.queue_depth = -1;
  EXPECT_TRUE(contains(refused(config), "aio.queue_depth is -1; "));
  config = {};
  config.queue_depth = AioConfig::kMaxQueueDepth + 1;
  EXPECT_TRUE(contains(refused(config), "aio.queue_depth is 65537; "));
  config = {};
  config.thread_count = std::numeric_limits<int>::min();
  EXPECT_TRUE(contains(refused(config), "aio.thread_count is -2147483648; "));
}

}  // namespace
}  // namespace torch_ext
