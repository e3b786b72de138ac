// The text of configurations: any bytes are read or refused with
// std::invalid_argument, and what is read is in range.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "targets.h"
#include "torch_ext/base/size.h"
#include "torch_ext/config/aio_config.h"

namespace {

using torch_ext::ParsedAioConfig;
using torch_ext::fuzz::check;
using torch_ext::fuzz::kLongestMessage;

constexpr std::size_t kMostWarnings = 100;

template <typename Parse>
bool read_or_refuse(Parse parse) {
  try {
    const ParsedAioConfig parsed = parse();
    parsed.config.validate();
    check(parsed.warnings.size() <= kMostWarnings);
    for (const auto& text : parsed.warnings) {
      check(text.size() <= kLongestMessage);
    }
    return true;
  } catch (const std::invalid_argument& error) {
    const std::size_t length = std::strlen(error.what());
    check(length > 0 && length <= kLongestMessage);
    return false;
  }
}

}  // namespace

bool fuzz_config(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const bool read =
      read_or_refuse([&] { return torch_ext::parse_aio_config(text); });
  read_or_refuse([&] { return torch_ext::parse_aio_settings(text); });
  try {
    torch_ext::parse_size(text);
  } catch (const std::invalid_argument&) {
  }
  return read;
}
