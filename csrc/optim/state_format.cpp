#include "torch_ext/optim/state_format.h"

#include <stdexcept>

namespace torch_ext {
namespace {

constexpr std::uint32_t kCut = StateFields::kCut;
constexpr std::array<std::string_view, 3> kNames = {"exact", "bf16", "int8"};

}  // namespace

StateFields StateFields::floats(std::size_t count) {
  StateFields fields;
  for (std::size_t i = 0; i < count; ++i) fields.bytes_per_cut.at(i) = 4 * kCut;
  return fields;
}

StateFields adamw_fields(StateFormat format, MasterFormat master) {
  StateFields fields;
  auto& bytes = fields.bytes_per_cut;
  const std::uint32_t moment = format == StateFormat::kExact  ? 4
                               : format == StateFormat::kBf16 ? 2
                                                              : 1;
  bytes[AdamWFields::kExpAvg] = moment * kCut;
  bytes[AdamWFields::kExpAvgSq] = moment * kCut;
  if (format == StateFormat::kInt8) {
    bytes[AdamWFields::kExpAvgScale] = 1;
    bytes[AdamWFields::kExpAvgSqScale] = 1;
  }
  if (master == MasterFormat::kLow16) bytes[AdamWFields::kMaster] = 2 * kCut;
  if (master == MasterFormat::kFloat) bytes[AdamWFields::kMaster] = 4 * kCut;
  return fields;
}

StateFormat parse_state_format(std::string_view name) {
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<StateFormat>(i);
  }
  throw std::invalid_argument(
      "state_format must be \"exact\", \"bf16\" or \"int8\", got \"" +
      std::string(name) + "\"");
}

std::string state_format_name(StateFormat format) {
  return std::string(kNames.at(static_cast<std::size_t>(format)));
}

}  // namespace torch_ext
