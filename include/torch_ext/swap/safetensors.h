#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// The header of a safetensors file: 8 bytes of length (little-endian), then
/// JSON. The tensors' bytes follow, without a gap.
struct SafetensorsHeader {
  struct Tensor {
    std::string name = {};
    std::string dtype = {};  ///< One that safetensors_bits() knows.
    std::vector<std::uint64_t> shape = {};
    std::uint64_t begin = 0;  ///< Bytes from the end of the header.
    std::uint64_t end = 0;
    bool operator==(const Tensor&) const = default;
  };
  std::vector<Tensor> tensors = {};  ///< In the header's order.
  std::vector<std::pair<std::string, std::string>> metadata = {};
  std::uint64_t bytes = 0;  ///< Where the data begin: length and JSON.
};

/// The most bytes of JSON that readers of safetensors take.
inline constexpr std::uint64_t kMostSafetensorsJson = 100'000'000;

/// Bits of an element, such as 32 for "F32"; none for an unknown dtype.
std::optional<unsigned> safetensors_bits(std::string_view dtype) noexcept;

/// Writes length and JSON, padded with spaces to a multiple of `alignment`.
/// `header.bytes` is not read. Errors: std::invalid_argument for a name or
/// metadata that is not UTF-8, for the name "__metadata__", for one that comes
/// twice, and for a header that readers refuse as too long.
std::string encode_safetensors(const SafetensorsHeader& header,
                               std::uint64_t alignment);

/// Reads the JSON of a file with so many bytes of data behind it. It takes what
/// the safetensors library takes, but no name twice: the tensors fill the data
/// without gap or overlap, each with as many bytes as dtype and shape say. No
/// shape has more than 64 dimensions, and none counts to 2^63 bytes. Memory is
/// in proportion to the text. Errors: std::invalid_argument.
SafetensorsHeader decode_safetensors(std::string_view json,
                                     std::uint64_t data_bytes);

/// Reads a file's header. Its length is compared with the file's size before
/// memory is taken. Errors: std::invalid_argument that begins with the path;
/// IoError.
SafetensorsHeader read_safetensors_header(const File& file);

}  // namespace torch_ext
