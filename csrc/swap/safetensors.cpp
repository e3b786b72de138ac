// The header of safetensors files, in both directions.
//
// A reader may be given anything. So the JSON is read event by event, and only
// what a tensor needs is kept: memory is in proportion to the text, and depth
// costs none. What is complete is then checked as a whole, in this order:
//
// 1. Each tensor has a known dtype, a shape that counts, and as many bytes.
// 2. No two tensors have the same name.
// 3. Sorted by where they begin, each begins where the one before ends; the
//    first begins at 0, and the last ends with the file.

#include "torch_ext/swap/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <stdexcept>
#include <unordered_set>

#include "torch_ext/base/align.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::size_t kMostDimensions = 64;
constexpr int kMostDepth = 16;
constexpr std::string_view kMetadata = "__metadata__";

struct Dtype {
  std::string_view name;
  unsigned bits;
};

constexpr std::array kDtypes = {
    Dtype{"F4", 4},          Dtype{"F6_E2M3", 6},     Dtype{"F6_E3M2", 6},
    Dtype{"BOOL", 8},        Dtype{"U8", 8},          Dtype{"I8", 8},
    Dtype{"F8_E5M2", 8},     Dtype{"F8_E4M3", 8},     Dtype{"F8_E8M0", 8},
    Dtype{"F8_E4M3FNUZ", 8}, Dtype{"F8_E5M2FNUZ", 8}, Dtype{"I16", 16},
    Dtype{"U16", 16},        Dtype{"F16", 16},        Dtype{"BF16", 16},
    Dtype{"I32", 32},        Dtype{"U32", 32},        Dtype{"F32", 32},
    Dtype{"C64", 64},        Dtype{"F64", 64},        Dtype{"I64", 64},
    Dtype{"U64", 64},
};

[[noreturn]] void refuse(const std::string& text) {
  throw std::invalid_argument(text);
}

/// A name as messages show it.
std::string in_quotes(std::string_view name) {
  constexpr std::size_t kLongest = 80;
  std::string shown(name.substr(0, kLongest));
  if (name.size() > kLongest) shown += "...";
  for (char& c : shown) {
    if (c >= 0 && c < ' ') c = ' ';  // A NUL would end the message.
  }
  return "'" + shown + "'";
}

/// Takes the events of the JSON parser and keeps tensors and metadata.
class HeaderReader {
 public:
  SafetensorsHeader header;

  bool null() {
    // The library takes it for no metadata.
    if (depth_ == 1 && in_metadata_) return true;
    return scalar("null");
  }
  bool boolean(bool) { return scalar("a boolean"); }
  bool number_integer(std::int64_t) { return scalar("a negative number"); }
  bool number_float(double, const std::string&) {
    return scalar("a number that is no 64-bit integer");
  }
  bool number_unsigned(std::uint64_t value) {
    if (!in_list_) return scalar("a number");
    std::vector<std::uint64_t>& list =
        field_ == Field::kShape ? header.tensors.back().shape : offsets_;
    if (list.size() == kMostDimensions) {
      refuse(where() + " has more than 64 numbers");
    }
    list.push_back(value);
    return true;
  }
  bool string(std::string& value) {
    if (depth_ == 2 && in_metadata_) {
      header.metadata.emplace_back(std::move(key_), std::move(value));
    } else if (depth_ == 2 && field_ == Field::kDtype) {
      header.tensors.back().dtype = std::move(value);
      seen(1);
    } else {
      scalar("text");
    }
    return true;
  }
  bool binary(std::vector<std::uint8_t>&) { return true; }  // Not in JSON.

  bool start_object(std::size_t) {
    if (depth_ >= 2) scalar("an object");
    if (depth_ == 1 && !in_metadata_) {
      header.tensors.push_back({.name = std::move(key_)});
      offsets_.clear();
      seen_ = 0;
    }
    return deeper();
  }
  bool end_object() {
    --depth_;
    if (depth_ == 1 && !in_metadata_) take_tensor();
    return true;
  }
  bool start_array(std::size_t) {
    const bool list = depth_ == 2 && !in_metadata_ &&
                      (field_ == Field::kShape || field_ == Field::kOffsets);
    if (!list) {
      scalar("a list");
    } else {
      in_list_ = true;
    }
    return deeper();
  }
  bool end_array() {
    --depth_;
    if (std::exchange(in_list_, false)) {
      seen(field_ == Field::kShape ? 2 : 4);
    }
    return true;
  }

  bool key(std::string& name) {
    if (depth_ == 1) {
      in_metadata_ = name == kMetadata;
      if (in_metadata_ && std::exchange(has_metadata_, true)) {
        refuse("the header has '__metadata__' twice");
      }
    }
    if (depth_ == 2 && !in_metadata_) {
      field_ = name == "dtype"          ? Field::kDtype
               : name == "shape"        ? Field::kShape
               : name == "data_offsets" ? Field::kOffsets
                                        : Field::kOther;
    }
    // What an unknown field holds may have keys of its own.
    if (depth_ == 1 || (depth_ == 2 && in_metadata_)) key_ = std::move(name);
    return true;
  }

  [[noreturn]] bool parse_error(std::size_t position, const std::string&,
                                const nlohmann::detail::exception&) {
    refuse("bad JSON at byte " + std::to_string(position) + " of the header");
  }

 private:
  enum class Field { kDtype, kShape, kOffsets, kOther };

  /// Where the parser is, for messages.
  std::string where() const {
    if (depth_ < 2) return "the header";
    if (in_metadata_) return "its metadata";
    constexpr std::array kNames = {"dtype", "shape", "data_offsets", ""};
    return std::string(kNames[static_cast<std::size_t>(field_)]) +
           " of tensor " + in_quotes(header.tensors.back().name);
  }

  /// Something that does not stand for itself. Only fields that nobody knows
  /// may have it.
  bool scalar(const char* what) const {
    if (depth_ >= 2 && !in_metadata_ && field_ == Field::kOther) return true;
    refuse(where() + " has " + what + " where it should not");
  }

  bool deeper() {
    if (++depth_ > kMostDepth) refuse("the header is nested too deep");
    return true;
  }

  void seen(unsigned bit) {
    if ((seen_ & bit) != 0) refuse(where() + " is given twice");
    seen_ |= bit;
  }

  void take_tensor() {
    SafetensorsHeader::Tensor& tensor = header.tensors.back();
    if (seen_ != 7) {
      refuse("tensor " + in_quotes(tensor.name) +
             " lacks dtype, shape or data_offsets");
    }
    if (offsets_.size() != 2) {
      refuse("data_offsets of tensor " + in_quotes(tensor.name) +
             " are not two numbers");
    }
    tensor.begin = offsets_[0];
    tensor.end = offsets_[1];
  }

  int depth_ = 0;
  bool in_metadata_ = false;
  bool has_metadata_ = false;
  bool in_list_ = false;
  Field field_ = Field::kOther;
  unsigned seen_ = 0;  ///< Fields of the tensor: dtype 1, shape 2, offsets 4.
  std::string key_;
  std::vector<std::uint64_t> offsets_;
};

/// How many bytes a tensor must have.
std::uint64_t bytes_of(const SafetensorsHeader::Tensor& tensor) {
  const std::optional<unsigned> bits = safetensors_bits(tensor.dtype);
  if (!bits) {
    refuse("tensor " + in_quotes(tensor.name) + " has the unknown dtype " +
           in_quotes(tensor.dtype));
  }
  // Dimensions of 0 count as 1 here: strides are computed from the others.
  constexpr auto kMost =
      static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::uint64_t reach = *bits;
  bool empty = false;
  for (const std::uint64_t size : tensor.shape) {
    empty = empty || size == 0;
    if (__builtin_mul_overflow(reach, std::max<std::uint64_t>(size, 1),
                               &reach) ||
        reach > kMost) {
      refuse("the shape of tensor " + in_quotes(tensor.name) +
             " counts to more bytes than a file can have");
    }
  }
  if (empty) return 0;
  if (reach % 8 != 0) {
    refuse("tensor " + in_quotes(tensor.name) +
           " does not end with a whole byte");
  }
  return reach / 8;
}

template <typename Names>
void check_unique(const Names& names, const std::string& what) {
  std::unordered_set<std::string_view> seen;
  seen.reserve(names.size());
  for (const auto& name : names) {
    if (!seen.insert(name).second) {
      refuse("the header has the " + what + " " + in_quotes(name) + " twice");
    }
  }
}

void check_unique(const SafetensorsHeader& header) {
  std::vector<std::string_view> names;
  for (const auto& tensor : header.tensors) names.push_back(tensor.name);
  check_unique(names, "tensor");
  names.clear();
  for (const auto& [key, value] : header.metadata) names.push_back(key);
  check_unique(names, "metadata key");
}

void check_layout(const SafetensorsHeader& header, std::uint64_t data_bytes) {
  std::vector<const SafetensorsHeader::Tensor*> order;
  order.reserve(header.tensors.size());
  for (const auto& tensor : header.tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](const SafetensorsHeader::Tensor* tensor) {
    return std::pair(tensor->begin, tensor->end);
  });
  std::uint64_t end = 0;
  for (const SafetensorsHeader::Tensor* tensor : order) {
    const std::string name = "tensor " + in_quotes(tensor->name);
    if (tensor->begin != end) {
      refuse(name + " begins at byte " + std::to_string(tensor->begin) +
             " of the data, but those before it end at byte " +
             std::to_string(end));
    }
    if (tensor->end < tensor->begin || tensor->end > data_bytes) {
      refuse(name + " ends at byte " + std::to_string(tensor->end) +
             " of the data, of which there are " + std::to_string(data_bytes));
    }
    const std::uint64_t bytes = bytes_of(*tensor);
    if (tensor->end - tensor->begin != bytes) {
      refuse(name + " has " + std::to_string(tensor->end - tensor->begin) +
             " bytes, but dtype and shape make " + std::to_string(bytes));
    }
    end = tensor->end;
  }
  if (end != data_bytes) {
    refuse("the tensors end at byte " + std::to_string(end) +
           " of the data, of which there are " + std::to_string(data_bytes));
  }
}

[[noreturn]] void refuse_file(const File& file, const std::string& why) {
  refuse(file.path() + " is no whole safetensors file: " + why);
}

std::string json_text(const std::string& text, const char* what) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    refuse("the " + std::string(what) + " " + in_quotes(text) +
           " is not UTF-8");
  }
}

}  // namespace

std::optional<unsigned> safetensors_bits(std::string_view dtype) noexcept {
  const auto found = std::ranges::find(kDtypes, dtype, &Dtype::name);
  if (found == kDtypes.end()) return std::nullopt;
  return found->bits;
}

std::string encode_safetensors(const SafetensorsHeader& header,
                               std::uint64_t alignment) {
  check_unique(header);
  std::string text(kLengthBytes, '\0');
  const char* comma = "{";
  if (!header.metadata.empty()) {
    text += "{\"__metadata__\":";
    for (const auto& [key, value] : header.metadata) {
      text += std::exchange(comma, ",");
      text += json_text(key, "metadata key") + ":" +
              json_text(value, "metadata value");
    }
    text += "}";
  }
  for (const SafetensorsHeader::Tensor& tensor : header.tensors) {
    if (tensor.name == kMetadata) {
      refuse(
          "no tensor can have the name '__metadata__', under which the file "
          "keeps its metadata");
    }
    text += std::exchange(comma, ",");
    text += json_text(tensor.name, "name") + ":{\"dtype\":\"" + tensor.dtype +
            "\",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      if (i > 0) text += ',';
      text += std::to_string(tensor.shape[i]);
    }
    text += "],\"data_offsets\":[" + std::to_string(tensor.begin) + "," +
            std::to_string(tensor.end) + "]}";
  }
  text += comma[0] == '{' ? "{}" : "}";
  text.resize(align_up(text.size(), alignment), ' ');
  std::uint64_t length = text.size() - kLengthBytes;
  if (length > kMostSafetensorsJson) {
    refuse("names, shapes and metadata take " + std::to_string(length) +
           " bytes of header, and readers of safetensors take no more than " +
           std::to_string(kMostSafetensorsJson));
  }
  for (std::size_t i = 0; i < kLengthBytes; ++i, length >>= 8) {
    text[i] = static_cast<char>(length & 0xff);
  }
  return text;
}

SafetensorsHeader decode_safetensors(std::string_view json,
                                     std::uint64_t data_bytes) {
  // The parser takes a NUL for the end of the text, and would not look behind
  // it.
  if (const auto nul = json.find('\0'); nul != json.npos) {
    refuse("bad JSON at byte " + std::to_string(nul + 1) +
           " of the header: a NUL byte");
  }
  // The parser leaves out a byte order mark, which JSON does not allow here.
  if (json.starts_with("\xef\xbb\xbf")) {
    refuse("bad JSON at byte 1 of the header: a byte order mark");
  }
  HeaderReader reader;
  nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
  SafetensorsHeader header = std::move(reader.header);
  check_unique(header);
  check_layout(header, data_bytes);
  header.bytes = kLengthBytes + json.size();
  return header;
}

SafetensorsHeader read_safetensors_header(const File& file) {
  const std::uint64_t size = file.size();
  if (size < kLengthBytes) {
    refuse_file(file, "it has " + std::to_string(size) +
                          " bytes, and the length of the header alone takes 8");
  }
  const std::size_t granule = file.granule();
  const auto read = [&](std::uint64_t bytes) {
    const std::size_t room = align_up(bytes, granule);
    std::unique_ptr<std::byte, decltype(&std::free)> memory(
        static_cast<std::byte*>(std::aligned_alloc(granule, room)), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
    // The rest is only missing if somebody has just cut the file.
    const std::size_t got = file.read(0, {memory.get(), room});
    if (got < bytes)
      refuse_file(file, "it ends at byte " + std::to_string(got));
    return memory;
  };
  auto memory = read(kLengthBytes);
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | std::to_integer<std::uint64_t>(memory.get()[i]);
  }
  if (length > size - kLengthBytes) {
    refuse_file(file, "its header says that it has " + std::to_string(length) +
                          " bytes, and the file has " + std::to_string(size));
  }
  if (length > kMostSafetensorsJson) {
    refuse_file(file, "its header of " + std::to_string(length) +
                          " bytes is longer than the format's limit of " +
                          std::to_string(kMostSafetensorsJson));
  }
  if (kLengthBytes + length > granule) memory = read(kLengthBytes + length);
  const std::string_view json(
      reinterpret_cast<const char*>(memory.get()) + kLengthBytes, length);
  try {
    return decode_safetensors(json, size - kLengthBytes - length);
  } catch (const std::invalid_argument& error) {
    refuse_file(file, error.what());
  }
}

}  // namespace torch_ext
