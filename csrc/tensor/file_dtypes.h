#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>

namespace torch_ext {

/// The names that safetensors has for torch's dtypes.
inline constexpr std::array kFileDtypes = {
    std::pair{std::string_view("BOOL"), c10::kBool},
    std::pair{std::string_view("U8"), c10::kByte},
    std::pair{std::string_view("I8"), c10::kChar},
    std::pair{std::string_view("U16"), c10::kUInt16},
    std::pair{std::string_view("I16"), c10::kShort},
    std::pair{std::string_view("U32"), c10::kUInt32},
    std::pair{std::string_view("I32"), c10::kInt},
    std::pair{std::string_view("U64"), c10::kUInt64},
    std::pair{std::string_view("I64"), c10::kLong},
    std::pair{std::string_view("F16"), c10::kHalf},
    std::pair{std::string_view("BF16"), c10::kBFloat16},
    std::pair{std::string_view("F32"), c10::kFloat},
    std::pair{std::string_view("F64"), c10::kDouble},
    std::pair{std::string_view("C64"), c10::kComplexFloat},
    std::pair{std::string_view("F8_E4M3"), c10::kFloat8_e4m3fn},
    std::pair{std::string_view("F8_E4M3FNUZ"), c10::kFloat8_e4m3fnuz},
    std::pair{std::string_view("F8_E5M2"), c10::kFloat8_e5m2},
    std::pair{std::string_view("F8_E5M2FNUZ"), c10::kFloat8_e5m2fnuz},
    std::pair{std::string_view("F8_E8M0"), c10::kFloat8_e8m0fnu},
    std::pair{std::string_view("F4"), c10::kFloat4_e2m1fn_x2},
};

/// Elements of the file in one of torch: two 4-bit numbers are one there. They
/// lie side by side in the last dimension.
constexpr std::uint64_t packed_in_one(c10::ScalarType dtype) {
  return dtype == c10::kFloat4_e2m1fn_x2 ? 2 : 1;
}

inline std::optional<std::string_view> file_dtype_of(c10::ScalarType dtype) {
  const auto found = std::ranges::find(
      kFileDtypes, dtype, [](const auto& each) { return each.second; });
  if (found == kFileDtypes.end()) return std::nullopt;
  return found->first;
}

inline std::optional<c10::ScalarType> torch_dtype_of(std::string_view name) {
  const auto found = std::ranges::find(
      kFileDtypes, name, [](const auto& each) { return each.first; });
  if (found == kFileDtypes.end()) return std::nullopt;
  return found->second;
}

}  // namespace torch_ext
