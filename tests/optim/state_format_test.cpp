#include "torch_ext/optim/state_format.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace torch_ext {
namespace {

TEST(StateFormatTest, BytesOfAParameterAreThoseOfTheTable) {
  const auto bytes = [](StateFormat format, MasterFormat master) {
    const StateFields fields = adamw_fields(format, master);
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      sum += fields.bytes(i, 256);
    }
    return static_cast<double>(sum) / 256;
  };
  EXPECT_EQ(bytes(StateFormat::kExact, MasterFormat::kNone), 8);
  EXPECT_EQ(bytes(StateFormat::kExact, MasterFormat::kLow16), 10);
  EXPECT_EQ(bytes(StateFormat::kExact, MasterFormat::kFloat), 12);
  EXPECT_EQ(bytes(StateFormat::kBf16, MasterFormat::kNone), 4);
  EXPECT_EQ(bytes(StateFormat::kBf16, MasterFormat::kLow16), 6);
  EXPECT_EQ(bytes(StateFormat::kInt8, MasterFormat::kLow16), 4 + 2.0 / 256);
}

TEST(StateFormatTest, TailsOfEveryLengthHaveTheirBytes) {
  const StateFields fields =
      adamw_fields(StateFormat::kInt8, MasterFormat::kLow16);
  for (std::uint64_t n = 0; n < 600; ++n) {
    EXPECT_EQ(fields.bytes(AdamWFields::kExpAvg, n), n);
    EXPECT_EQ(fields.bytes(AdamWFields::kMaster, n), 2 * n);
    EXPECT_EQ(fields.bytes(AdamWFields::kExpAvgScale, n), (n + 255) / 256);
  }
}

TEST(StateFormatTest, NamesAreThoseOfTheDocumentation) {
  for (const char* name : {"exact", "bf16", "int8"}) {
    EXPECT_EQ(state_format_name(parse_state_format(name)), name);
  }
  try {
    parse_state_format("fp8");
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("\"fp8\""), std::string::npos);
  }
}

}  // namespace
}  // namespace torch_ext
