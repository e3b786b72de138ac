#include "torch_ext/config/aio_config.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <type_traits>
#include <unordered_set>
#include <utility>

#include "torch_ext/base/size.h"

namespace torch_ext {
namespace {

enum class Kind { kSize, kCount, kFlag };

struct Knob {
  std::string_view name;
  Kind kind;
  std::uint64_t max;  // The least is 1, or 0 for a flag.
  ConfigValue (*get)(const AioConfig&);
  void (*set)(AioConfig&, std::uint64_t);
};

template <auto kMember>
constexpr Knob make_knob(std::string_view name, Kind kind, std::uint64_t max) {
  using Member = std::remove_cvref_t<decltype(AioConfig().*kMember)>;
  using Wide =
      std::conditional_t<std::is_same_v<Member, int>, std::int64_t, Member>;
  return {name, kind, max,
          [](const AioConfig& config) {
            return ConfigValue(static_cast<Wide>(config.*kMember));
          },
          [](AioConfig& config, std::uint64_t value) {
            config.*kMember = static_cast<Member>(value);
          }};
}

constexpr std::array kKnobs = {
    make_knob<&AioConfig::block_size>("block_size", Kind::kSize,
                                      AioConfig::kMaxBlockSize),
    make_knob<&AioConfig::queue_depth>("queue_depth", Kind::kCount,
                                       AioConfig::kMaxQueueDepth),
    make_knob<&AioConfig::thread_count>("thread_count", Kind::kCount,
                                        AioConfig::kMaxThreadCount),
    make_knob<&AioConfig::single_submit>("single_submit", Kind::kFlag, 1),
    make_knob<&AioConfig::overlap_events>("overlap_events", Kind::kFlag, 1),
};

// The names of the knobs, then two other names of thread_count: DeepSpeed
// renamed it, and its tuner prints yet another name.
constexpr std::array<std::string_view, kKnobs.size() + 2> kKeys = [] {
  std::array<std::string_view, kKnobs.size() + 2> keys;
  std::ranges::transform(kKnobs, keys.begin(), &Knob::name);
  keys[kKnobs.size()] = "intra_op_parallelism";
  keys[kKnobs.size() + 1] = "num_threads";
  return keys;
}();

const Knob* find_knob(std::string_view key) {
  const auto found = std::ranges::find(kKeys, key);
  if (found == kKeys.end()) return nullptr;
  const bool alias = found - kKeys.begin() >= std::ssize(kKnobs);
  return std::ranges::find(kKnobs, alias ? "thread_count" : key, &Knob::name);
}

std::string known_keys() {
  std::string text;
  for (const std::string_view key : kKeys) {
    text += text.empty() ? "" : ", ";
    text += key;
  }
  return text;
}

// Messages ----------------------------------------------------------------

std::string shorten(std::string_view text, std::size_t limit = 80) {
  std::string shown(text.substr(0, limit));
  if (text.size() > limit) shown += "...";
  for (char& c : shown) {
    if (c >= 0 && c < ' ') c = ' ';  // A NUL would end the message.
  }
  return shown;
}

std::string to_text(const ConfigValue& value) {
  struct Visitor {
    std::string operator()(std::nullptr_t) const { return "null"; }
    std::string operator()(bool flag) const { return flag ? "true" : "false"; }
    std::string operator()(std::int64_t number) const {
      return std::to_string(number);
    }
    std::string operator()(std::uint64_t number) const {
      return std::to_string(number);
    }
    std::string operator()(double number) const {
      std::array<char, 32> text{};
      const auto end =
          std::to_chars(text.data(), text.data() + text.size(), number).ptr;
      return {text.data(), end};
    }
    std::string operator()(const std::string& text) const {
      return '"' + shorten(text) + '"';
    }
    std::string operator()(const OtherValue& other) const {
      return shorten(other.text);
    }
  };
  return std::visit(Visitor{}, value);
}

std::string allowed(const Knob& knob) {
  if (knob.kind == Kind::kFlag) return "true or false";
  std::string text = "an integer from 1 to " + std::to_string(knob.max);
  if (knob.kind == Kind::kSize) text += ", or a size such as \"1M\"";
  return text;
}

std::string refusal(const Knob& knob, std::string_view key,
                    const ConfigValue& value) {
  return "aio." + shorten(key) + " is " + to_text(value) +
         "; allowed: " + allowed(knob);
}

// How many insertions, deletions and replacements turn one word into the other.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({diagonal + 1, row[j] + 1, replaced});
    }
  }
  return row.back();
}

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return result;
}

std::string unknown_key_warning(std::string_view key) {
  const std::string name = lower(shorten(key));
  if (name == "use_gds") {
    return "aio." + shorten(key) +
           " is ignored: GPUDirect storage is not used; known keys: " +
           known_keys();
  }
  const auto distance = [&name](std::string_view known) {
    return edit_distance(name, known);
  };
  const std::string_view nearest =
      *std::ranges::min_element(kKeys, {}, distance);
  std::string text = "aio." + shorten(key) + " is unknown and ignored; ";
  if (distance(nearest) * 2 > nearest.size())
    return text + "known keys: " + known_keys();
  return text + "did you mean " + std::string(nearest) + "?";
}

// Values ------------------------------------------------------------------

std::optional<std::uint64_t> from_text(const Knob& knob,
                                       const std::string& text) {
  if (knob.kind == Kind::kFlag) {
    const std::string word = lower(text);
    if (word != "true" && word != "false") return std::nullopt;
    return word == "true" ? 1 : 0;
  }
  if (knob.kind == Kind::kSize) {
    try {
      return parse_size(text);
    } catch (const std::invalid_argument&) {
      return std::nullopt;
    }
  }
  std::uint64_t number = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, number);
  if (error != std::errc() || end != last) return std::nullopt;
  return number;
}

// The value as an unsigned integer. None if this knob cannot take it as one.
std::optional<std::uint64_t> to_number(const Knob& knob,
                                       const ConfigValue& value) {
  const bool flag = knob.kind == Kind::kFlag;
  if (const bool* truth = std::get_if<bool>(&value); truth && flag) {
    return *truth ? 1 : 0;
  }
  if (const auto* text = std::get_if<std::string>(&value)) {
    return from_text(knob, *text);
  }
  if (flag) return std::nullopt;
  if (const auto* number = std::get_if<std::uint64_t>(&value)) return *number;
  if (const auto* number = std::get_if<std::int64_t>(&value)) {
    if (*number >= 0) return static_cast<std::uint64_t>(*number);
  }
  if (const double* number = std::get_if<double>(&value)) {
    // Compare before casting: a cast of more than 2^64 is undefined.
    if (*number >= 0 && *number <= static_cast<double>(knob.max) &&
        std::trunc(*number) == *number) {
      return static_cast<std::uint64_t>(*number);
    }
  }
  return std::nullopt;
}

std::uint64_t checked(const Knob& knob, std::string_view key,
                      const ConfigValue& value) {
  const auto number = to_number(knob, value);
  const std::uint64_t least = knob.kind == Kind::kFlag ? 0 : 1;
  if (!number || *number < least || *number > knob.max) {
    throw std::invalid_argument(refusal(knob, key, value));
  }
  return *number;
}

bool means_default(const ConfigValue& value) {
  const auto* text = std::get_if<std::string>(&value);
  return std::holds_alternative<std::nullptr_t>(value) ||
         (text != nullptr && lower(*text) == "auto");
}

}  // namespace

void AioConfig::validate() const {
  for (const Knob& knob : kKnobs) checked(knob, knob.name, knob.get(*this));
}

std::span<const std::string_view> aio_keys() noexcept { return kKeys; }

ParsedAioConfig read_aio_section(const ConfigItems& section) {
  constexpr std::size_t kMaxWarnings = 8;
  ParsedAioConfig parsed;
  std::size_t unknown = 0;
  std::unordered_set<std::string_view> seen;
  std::array<const std::pair<std::string, ConfigValue>*, kKnobs.size()> given{};
  for (const auto& item : section) {
    const auto& [key, value] = item;
    if (!seen.insert(key).second) {
      throw std::invalid_argument("aio." + shorten(key) + " is given twice");
    }
    const Knob* const knob = find_knob(key);
    if (knob == nullptr) {
      if (++unknown <= kMaxWarnings) {
        parsed.warnings.push_back(unknown_key_warning(key));
      }
      continue;
    }
    if (means_default(value)) continue;
    const std::uint64_t number = checked(*knob, key, value);
    auto& first = given[static_cast<std::size_t>(knob - kKnobs.data())];
    if (first != nullptr &&
        checked(*knob, first->first, first->second) != number) {
      throw std::invalid_argument(
          "aio." + first->first + " is " + to_text(first->second) +
          " but aio." + key + ", another name for it, is " + to_text(value) +
          "; allowed: one of them, " + allowed(*knob));
    }
    first = &item;
    knob->set(parsed.config, number);
  }
  if (unknown > kMaxWarnings) {
    parsed.warnings.push_back(std::to_string(unknown - kMaxWarnings) +
                              " more keys of aio are unknown and ignored");
  }
  return parsed;
}

namespace {

// Listens to the parser, and notes the items of the top-level object and of its
// "aio". The parser keeps no document and does not recurse, so text of any
// length and nesting is safe.
class SectionReader {
 public:
  const ConfigItems& top() const { return top_items_; }
  /// The items of "aio". Null if there is none.
  const ConfigItems* section() const {
    return top_level_.contains("aio") ? &items_ : nullptr;
  }

  bool null() { return scalar(nullptr); }
  bool boolean(bool value) { return scalar(value); }
  bool number_integer(std::int64_t value) { return scalar(value); }
  bool number_unsigned(std::uint64_t value) { return scalar(value); }
  bool number_float(double value, const std::string& text) {
    // An integer of more than 64 bits comes as a double, too.
    const bool integer = text.find_first_of(".eE") == std::string::npos;
    return integer ? scalar(OtherValue{text}) : scalar(value);
  }
  bool string(std::string& value) { return scalar(std::move(value)); }
  bool binary(std::vector<std::uint8_t>&) { return true; }  // Not in JSON.
  bool start_object(std::size_t) { return open(true); }
  bool end_object() { return close(); }
  bool start_array(std::size_t) { return open(false); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    if (depth_ == 1) {
      if (!top_level_.insert(name).second) {
        throw std::invalid_argument("the key " + shorten(name) +
                                    " is given twice");
      }
      at_section_ = name == "aio";
    }
    if (depth_ == 1 || (in_section_ && depth_ == 2)) key_ = std::move(name);
    return true;
  }

  [[noreturn]] bool parse_error(std::size_t position, const std::string& token,
                                const nlohmann::detail::exception& error) {
    constexpr int kNumberOverflow = 406;
    const Knob* const knob =
        in_section_ && depth_ == 2 ? find_knob(key_) : nullptr;
    if (error.id == kNumberOverflow && knob != nullptr) {
      throw std::invalid_argument(refusal(*knob, key_, OtherValue{token}));
    }
    std::string_view text = error.what();
    if (const auto column = text.find("column "); column != text.npos) {
      text.remove_prefix(text.find(": ", column) + 2);
    } else {
      text.remove_prefix(text.find("] ") + 2);
    }
    throw std::invalid_argument(
        "bad JSON at byte " + std::to_string(position) +
        (knob != nullptr ? " (at aio." + key_ + ")" : "") + ": " +
        shorten(text, 200));
  }

 private:
  bool scalar(ConfigValue value) {
    if (depth_ == 0) refuse_document(to_text(value));
    if (depth_ == 1 && at_section_ &&
        !std::holds_alternative<std::nullptr_t>(value)) {
      refuse_section(to_text(value));
    }
    note(std::move(value));
    return true;
  }

  bool open(bool object) {
    if (depth_ == 0 && !object) refuse_document("a list");
    if (depth_ == 1 && at_section_) {
      if (!object) refuse_section("a list");
      in_section_ = true;
    } else {
      note(OtherValue{object ? "an object" : "a list"});
    }
    ++depth_;
    return true;
  }

  void note(ConfigValue value) {
    if (depth_ == 1) {
      top_items_.emplace_back(std::move(key_), std::move(value));
    } else if (in_section_ && depth_ == 2) {
      items_.emplace_back(std::move(key_), std::move(value));
    }
  }

  bool close() {
    if (--depth_ == 1) in_section_ = false;
    return true;
  }

  [[noreturn]] static void refuse_document(const std::string& what) {
    throw std::invalid_argument("the configuration is " + what +
                                "; allowed: an object");
  }
  [[noreturn]] static void refuse_section(const std::string& what) {
    throw std::invalid_argument("aio is " + what +
                                "; allowed: an object or null");
  }

  std::size_t depth_ = 0;
  bool at_section_ = false;  // The last key of the top level was "aio".
  bool in_section_ = false;
  std::string key_;
  std::unordered_set<std::string> top_level_;
  ConfigItems top_items_;
  ConfigItems items_;
};

SectionReader read_json(std::string_view json) {
  // The parser takes a NUL for the end of the text, and would not look behind
  // it.
  if (const auto nul = json.find('\0'); nul != json.npos) {
    throw std::invalid_argument("bad JSON at byte " + std::to_string(nul + 1) +
                                ": a NUL byte");
  }
  SectionReader reader;
  nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
  return reader;
}

}  // namespace

ParsedAioConfig read_aio_config(const ConfigItems& top,
                                const ConfigItems* section, bool bare) {
  const auto known = [](const auto& item) {
    return find_knob(item.first) != nullptr;
  };
  if (bare && section == nullptr && std::ranges::any_of(top, known)) {
    return read_aio_section(top);
  }
  ParsedAioConfig parsed;
  if (section != nullptr) parsed = read_aio_section(*section);
  for (const auto& item : top) {
    if (!known(item)) continue;
    parsed.warnings.push_back(item.first +
                              " is not in the aio section and is ignored");
  }
  if (bare && section == nullptr && !top.empty()) {
    parsed.warnings.emplace_back(
        "the configuration has neither an aio section nor a key of one; the "
        "defaults are used");
  }
  return parsed;
}

ParsedAioConfig parse_aio_config(std::string_view json) {
  const SectionReader reader = read_json(json);
  return read_aio_config(reader.top(), reader.section(), /*bare=*/false);
}

ParsedAioConfig parse_aio_settings(std::string_view json) {
  const SectionReader reader = read_json(json);
  return read_aio_config(reader.top(), reader.section(), /*bare=*/true);
}

}  // namespace torch_ext
