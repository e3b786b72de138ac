#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace torch_ext {

/// How a parameter's state lies in memory and on disk: fields, one after the
/// other. Each is an array with something for every element.
struct StateFields {
  static constexpr std::size_t kMax = 5;
  /// Parameters are cut only at multiples of this many elements, for two
  /// reasons. torch's fused kernels round the last elements of a tensor, if
  /// they do not fill a vector, differently from the others. And so many 8-bit
  /// moments share a scale.
  static constexpr std::uint64_t kCut = 256;

  /// Bytes of a field for kCut elements. 0 means that there is no such field.
  std::array<std::uint32_t, kMax> bytes_per_cut = {};

  /// `count` fields of float.
  static StateFields floats(std::size_t count);

  /// Bytes of a field of `elements` elements, the first of which is at a
  /// multiple of kCut.
  std::uint64_t bytes(std::size_t field, std::uint64_t elements) const {
    return (elements * bytes_per_cut[field] + kCut - 1) / kCut;
  }

  bool operator==(const StateFields&) const = default;
};

/// The form in which AdamW keeps its moments. docs/formats.md has the bits.
enum class StateFormat {
  kExact,  ///< float: nothing is lost.
  kBf16,   ///< bfloat16, rounded stochastically.
  kInt8,   ///< 8 bits and a scale for each 256 elements, rounded likewise.
};

/// What the state keeps of the parameter itself.
enum class MasterFormat {
  kNone,   ///< For float: the parameter is its own master.
  kLow16,  ///< For bfloat16: the 16 bits of the master that it lacks.
  kFloat,  ///< For float16: the whole master.
};

/// The fields of AdamW.
struct AdamWFields {
  enum : std::size_t {
    kExpAvg,
    kExpAvgSq,
    kMaster,
    kExpAvgScale,
    kExpAvgSqScale,
  };
};

StateFields adamw_fields(StateFormat format, MasterFormat master);

/// Reads "exact", "bf16" or "int8". Errors: std::invalid_argument.
StateFormat parse_state_format(std::string_view name);
std::string state_format_name(StateFormat format);

}  // namespace torch_ext
