#include "torch_ext/base/size.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <system_error>

namespace torch_ext {
namespace {

constexpr std::uint64_t kMaxSize = std::numeric_limits<std::int64_t>::max();
constexpr std::string_view kDigits = "0123456789";

struct Unit {
  std::string_view name;  // In lower case.
  std::uint64_t bytes;
};
constexpr std::array<Unit, 14> kUnits = {{
    {"", 1},
    {"b", 1},
    {"k", 1ull << 10},
    {"kib", 1ull << 10},
    {"kb", 1'000},
    {"m", 1ull << 20},
    {"mib", 1ull << 20},
    {"mb", 1'000'000},
    {"g", 1ull << 30},
    {"gib", 1ull << 30},
    {"gb", 1'000'000'000},
    {"t", 1ull << 40},
    {"tib", 1ull << 40},
    {"tb", 1'000'000'000'000},
}};

[[noreturn]] void refuse(std::string_view text, const char* why) {
  constexpr std::size_t kShown = 60;
  std::string shown(text.substr(0, kShown));
  if (text.size() > kShown) shown += "...";
  for (char& c : shown) {
    if (c >= 0 && c < ' ') c = ' ';  // A NUL would end the message.
  }
  throw std::invalid_argument("\"" + shown + "\" is not a size: " + why +
                              "; allowed: bytes below 2^63, as 4096, 512K, "
                              "\"1.5 GiB\" (powers of 1024) or 2GB (of 1000)");
}

// Takes the leading digits off `text`.
std::string_view take_digits(std::string_view& text) {
  const auto digits =
      text.substr(0, std::min(text.find_first_not_of(kDigits), text.size()));
  text.remove_prefix(digits.size());
  return digits;
}

const Unit* find_unit(std::string_view name) {
  const auto same = [name](const Unit& unit) {
    return std::ranges::equal(unit.name, name, {}, {}, [](char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
  };
  const auto found = std::ranges::find_if(kUnits, same);
  return found != kUnits.end() ? &*found : nullptr;
}

}  // namespace

std::uint64_t parse_size(std::string_view text) {
  std::string_view rest = text;
  const std::string_view whole = take_digits(rest);
  if (whole.empty()) refuse(text, "it does not begin with a digit");
  std::string_view fraction;
  if (rest.starts_with('.')) {
    rest.remove_prefix(1);
    fraction = take_digits(rest);
    if (fraction.empty()) refuse(text, "no digit follows the point");
  }
  if (rest.size() > 1 && rest.front() == ' ') rest.remove_prefix(1);
  const Unit* unit = find_unit(rest);
  if (unit == nullptr) refuse(text, "the unit is unknown");

  std::uint64_t count = 0;
  const auto [end, error] =
      std::from_chars(whole.data(), whole.data() + whole.size(), count);
  if (error != std::errc() || count > kMaxSize / unit->bytes) {
    refuse(text, "it is too large");
  }
  // Multiplies the fraction by the unit as on paper, from the last digit. What
  // is carried over the point are bytes. Only zeros may stay behind it.
  std::uint64_t carry = 0;
  for (; !fraction.empty(); fraction.remove_suffix(1)) {
    carry += static_cast<std::uint64_t>(fraction.back() - '0') * unit->bytes;
    if (carry % 10 != 0) refuse(text, "it is not a whole number of bytes");
    carry /= 10;
  }
  const std::uint64_t bytes = count * unit->bytes + carry;
  if (bytes > kMaxSize) refuse(text, "it is too large");
  return bytes;
}

std::string format_size(std::uint64_t bytes) {
  constexpr std::array kNames = {" B", " KiB", " MiB", " GiB", " TiB"};
  std::size_t power = 0;
  std::uint64_t unit = 1;
  std::uint64_t hundredths = 0;
  while (true) {
    const std::uint64_t part = (bytes % unit * 100 + unit / 2) / unit;
    const std::uint64_t whole = bytes / unit + part / 100;
    hundredths = part % 100;
    if (whole < 1024 || power + 1 == kNames.size()) {
      std::string text = std::to_string(whole);
      if (hundredths != 0) {
        text += hundredths < 10 ? ".0" : ".";
        text +=
            std::to_string(hundredths % 10 == 0 ? hundredths / 10 : hundredths);
      }
      return text + kNames[power];
    }
    ++power;
    unit *= 1024;
  }
}

}  // namespace torch_ext
