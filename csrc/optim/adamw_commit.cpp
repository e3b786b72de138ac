// The document of OffloadedAdamW's commits, as JSON.
//
// Python packs values of its own: a tuple is {"tuple": [...]}, a dict is
// {"dict": [[key, value], ...]}, and a learning rate that is a tensor has its
// bytes in base64. Here, what a step uses becomes numbers. What else Python has
// kept is said in notes and left out.
//
// `extra` of Python may be nested as deeply as its owner likes. What lies deep
// is dropped while the text is read. The parser does not recurse.

#include "torch_ext/optim/adamw_commit.h"

#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "store/store_format.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using Json = nlohmann::json;
using Numbers = AdamWCommit::Numbers;

constexpr const char* kClass = "OffloadedAdamW";
constexpr int kFormat = 1;

[[noreturn]] void damaged(const std::string& what) { throw FormatError(what); }

// Base64 ------------------------------------------------------------------

constexpr std::string_view kDigits =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

std::string to_base64(std::string_view bytes) {
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t three = 0;
    for (std::size_t j = i; j < i + 3; ++j) {
      three = three << 8 |
              (j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : kDigits[three >> (18 - 6 * j) & 63];
    }
  }
  return text;
}

std::string from_base64(std::string_view text) {
  std::size_t padding = 0;
  while (padding < 2 && padding < text.size() &&
         text[text.size() - 1 - padding] == '=') {
    ++padding;
  }
  if (text.size() % 4 != 0) damaged("it has bytes that are not in base64");
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool is_padding = i + padding >= text.size();
    const std::size_t digit = is_padding ? 0 : kDigits.find(text[i]);
    if (digit == std::string_view::npos) {
      damaged("it has bytes that are not in base64");
    }
    bits = bits << 6 | static_cast<std::uint32_t>(digit);
    if (i % 4 != 3) continue;
    for (const int shift : {16, 8, 0}) {
      bytes += static_cast<char>(bits >> shift & 255);
    }
    bits = 0;
  }
  bytes.resize(bytes.size() - padding);
  return bytes;
}

// JSON --------------------------------------------------------------------

/// The beginning of a value, for messages.
std::string shown(const Json& json) {
  const std::string text =
      json.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  return text.size() <= 40 ? text : text.substr(0, 40) + "...";
}

Json parse(std::string_view text) {
  constexpr int kMostDepth = 16;
  std::string section;
  std::set<std::string> names;
  const auto look = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::key && depth == 1) {
      section = parsed.get<std::string>();
    } else if (event == Json::parse_event_t::key && depth == 2 &&
               section == "parameters" &&
               !names.insert(parsed.get<std::string>()).second) {
      damaged("it has the parameter " + shown(parsed) + " twice");
    }
    return depth <= kMostDepth;
  };
  Json json = Json::parse(text, look, /*allow_exceptions=*/false);
  if (!json.is_object()) damaged("it is no object of JSON");
  return json;
}

const Json* find(const Json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found == object.end() ? nullptr : &*found;
}

const Json& at(const Json& object, const char* key) {
  const Json* const found = find(object, key);
  if (found == nullptr) damaged(std::string("it has no \"") + key + "\"");
  return *found;
}

const Json& array_at(const Json& object, const char* key) {
  const Json& array = at(object, key);
  if (!array.is_array()) {
    damaged(std::string("its \"") + key + "\" is no array: " + shown(array));
  }
  return array;
}

std::string text_of(const Json& json, const char* what) {
  if (!json.is_string()) {
    damaged(std::string("its \"") + what + "\" is no text: " + shown(json));
  }
  return json.get<std::string>();
}

std::uint64_t count_of(const Json& json, const char* what) {
  if (!json.is_number_unsigned()) {
    damaged(std::string("its \"") + what +
            "\" is no whole number: " + shown(json));
  }
  return json.get<std::uint64_t>();
}

std::vector<std::int64_t> sizes_of(const Json& object, const char* key) {
  std::vector<std::int64_t> sizes;
  for (const Json& each : array_at(object, key)) {
    const std::uint64_t size = count_of(each, key);
    if (size > std::numeric_limits<std::int64_t>::max()) {
      damaged(std::string("its \"") + key + "\" has " + shown(each));
    }
    sizes.push_back(static_cast<std::int64_t>(size));
  }
  return sizes;
}

// Numbers of Python -------------------------------------------------------

Json packed(double number) {
  if (std::isfinite(number)) return number;
  const char* const text = std::isnan(number) ? "nan"
                           : number > 0       ? "inf"
                                              : "-inf";
  return {{"float", text}};
}

double parse_double(const std::string& text) {
  double number = 0;
  const char* const end = text.data() + text.size();
  const auto done = std::from_chars(text.data(), end, number);
  if (done.ec != std::errc() || done.ptr != end) {
    damaged("it has something else for a number: " + shown(Json(text)));
  }
  return number;
}

template <typename Number>
Number bits_as(const std::string& bytes) {
  Number number;
  std::memcpy(&number, bytes.data(), sizeof(number));
  return number;
}

double half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity()
                         : std::numeric_limits<double>::quiet_NaN();
  }
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24)
                               : std::ldexp(mantissa + 1024, exponent - 25));
}

/// A dtype of numbers, and how to read one.
struct Dtype {
  std::string_view name;
  std::size_t bytes;
  double (*read)(const std::string& bytes);
};

template <typename Number>
constexpr Dtype plain(std::string_view name) {
  return {name, sizeof(Number), [](const std::string& bytes) {
            return static_cast<double>(bits_as<Number>(bytes));
          }};
}

constexpr std::array kDtypes = {
    plain<float>("float32"),
    plain<double>("float64"),
    plain<std::int64_t>("int64"),
    plain<std::int32_t>("int32"),
    plain<std::int16_t>("int16"),
    plain<std::int8_t>("int8"),
    plain<std::uint8_t>("uint8"),
    plain<std::uint8_t>("bool"),
    Dtype{"float16", 2,
          [](const std::string& bytes) {
            return half(bits_as<std::uint16_t>(bytes));
          }},
    Dtype{"bfloat16", 2,
          [](const std::string& bytes) {
            const std::uint32_t high = bits_as<std::uint16_t>(bytes);
            return static_cast<double>(std::bit_cast<float>(high << 16));
          }},
};

double of_small_tensor(const Json& tensor) {
  const std::string dtype = text_of(at(tensor, "dtype"), "dtype");
  const std::string bytes = from_base64(text_of(at(tensor, "small"), "small"));
  for (const std::int64_t size : sizes_of(tensor, "shape")) {
    if (size != 1) damaged("it has a tensor of many elements for a number");
  }
  for (const Dtype& known : kDtypes) {
    if (known.name == dtype && known.bytes == bytes.size()) {
      return known.read(bytes);
    }
  }
  damaged("it has a tensor that is no number: " + shown(tensor));
}

double unpacked(const Json& json) {
  if (json.is_boolean()) return json.get<bool>() ? 1 : 0;
  if (json.is_number()) return json.get<double>();
  for (const char* const kind : {"float", "int"}) {
    if (const Json* const text = find(json, kind)) {
      return parse_double(text_of(*text, kind));
    }
  }
  if (find(json, "small") != nullptr) return of_small_tensor(json);
  damaged("it has something else for a number: " + shown(json));
}

// Options -----------------------------------------------------------------

Json packed(const Numbers& numbers) {
  // All that torch.optim.AdamW has, with what OffloadedAdamW does.
  Json options = Json::array();
  const auto add = [&](const char* key, Json value) {
    options.push_back(Json::array({key, std::move(value)}));
  };
  add("lr", packed(numbers.lr));
  add("betas",
      {{"tuple", Json::array({packed(numbers.beta1), packed(numbers.beta2)})}});
  add("eps", packed(numbers.eps));
  add("weight_decay", packed(numbers.weight_decay));
  add("amsgrad", false);
  add("maximize", numbers.maximize);
  add("foreach", nullptr);
  add("capturable", false);
  add("differentiable", false);
  add("fused", true);
  add("decoupled_weight_decay", true);
  return {{"dict", std::move(options)}};
}

/// Options that say how torch computes, and not what.
bool is_way(const std::string& key) {
  return key == "foreach" || key == "capturable" || key == "differentiable" ||
         key == "fused";
}

/// Reads options. Adds the names of those that have no place here to `unknown`.
Numbers unpack_options(const Json& json, std::set<std::string>& unknown) {
  Numbers numbers;
  std::set<std::string> found;
  for (const Json& pair : array_at(json, "dict")) {
    if (!pair.is_array() || pair.size() != 2) {
      damaged("it has an option that is no pair: " + shown(pair));
    }
    const Json& value = pair[1];
    if (!pair[0].is_string()) {
      unknown.insert(shown(pair[0]));
      continue;
    }
    const auto key = pair[0].get<std::string>();
    if (!found.insert(key).second) damaged("it has an option twice: " + key);
    if (key == "lr") {
      numbers.lr = unpacked(value);
    } else if (key == "eps") {
      numbers.eps = unpacked(value);
    } else if (key == "weight_decay") {
      numbers.weight_decay = unpacked(value);
    } else if (key == "maximize") {
      numbers.maximize = unpacked(value) != 0;
    } else if (key == "betas") {
      const bool is_list = find(value, "list") != nullptr;
      const Json& both = array_at(value, is_list ? "list" : "tuple");
      if (both.size() != 2) damaged("it has betas that are not two");
      numbers.beta1 = unpacked(both[0]);
      numbers.beta2 = unpacked(both[1]);
    } else if (key == "amsgrad" || key == "decoupled_weight_decay") {
      if ((unpacked(value) != 0) == (key == "amsgrad")) {
        throw std::invalid_argument(std::string("the commit has ") + key + "=" +
                                    shown(value) +
                                    ", which OffloadedAdamW does not support");
      }
    } else if (!is_way(key)) {
      unknown.insert(key);
    }
  }
  for (const char* const key :
       {"lr", "betas", "eps", "weight_decay", "maximize"}) {
    if (!found.contains(key)) {
      damaged(std::string("it has options without \"") + key + "\"");
    }
  }
  return numbers;
}

// Parameters and groups ---------------------------------------------------

Json packed(const AdamWCommit::Parameter& parameter) {
  Json entry{
      {"slot", parameter.slot}, {"first", parameter.first}, {"value", nullptr}};
  if (parameter.kind) {
    entry["shape"] = parameter.kind->shape;
    entry["dtype"] = parameter.kind->dtype;
    entry["order"] = parameter.kind->order;
  }
  if (parameter.value) entry["value"] = *parameter.value;
  return entry;
}

AdamWCommit::Parameter unpack_parameter(const Json& entry) {
  AdamWCommit::Parameter parameter;
  parameter.slot = count_of(at(entry, "slot"), "slot");
  parameter.first = count_of(at(entry, "first"), "first");
  if (find(entry, "shape") != nullptr) {
    parameter.kind = {sizes_of(entry, "shape"),
                      text_of(at(entry, "dtype"), "dtype"),
                      sizes_of(entry, "order")};
  }
  if (const Json& value = at(entry, "value"); !value.is_null()) {
    parameter.value = count_of(value, "value");
    if (!parameter.kind) damaged("it has values of a frozen parameter");
  }
  return parameter;
}

void unpack_parameters(const Json& json, AdamWCommit& commit) {
  const Json& all = at(json, "parameters");
  if (!all.is_object()) damaged("its \"parameters\" are no object");
  std::set<std::size_t> slots, values;
  for (const auto& [name, entry] : all.items()) {
    const AdamWCommit::Parameter parameter = unpack_parameter(entry);
    if (!slots.insert(parameter.slot).second ||
        (parameter.value && !values.insert(*parameter.value).second)) {
      damaged("two of its parameters share a slot or a value");
    }
    commit.parameters.emplace(name, parameter);
  }
}

void unpack_groups(const Json& json, AdamWCommit& commit,
                   std::set<std::string>& unknown) {
  std::set<std::string> in_groups;
  for (const Json& each : array_at(json, "groups")) {
    AdamWCommit::Group& group = commit.groups.emplace_back();
    group.options = unpack_options(at(each, "options"), unknown);
    for (const Json& item : array_at(each, "params")) {
      const std::string name = text_of(item, "params");
      if (!commit.parameters.contains(name) || !in_groups.insert(name).second) {
        damaged(
            "it has a parameter in its groups that it does not have, or "
            "twice: " +
            shown(item));
      }
      group.parameters.push_back(name);
    }
  }
  if (in_groups.size() != commit.parameters.size()) {
    damaged("it has parameters that are in no group");
  }
}

// What only Python keeps --------------------------------------------------

void unpack_extra(const Json& extra, AdamWCommit& commit) {
  if (extra.is_null()) return;
  if (extra.is_string()) {
    commit.extra = extra.get<std::string>();
    return;
  }
  for (const char* const kind : {"bytes", "bytearray"}) {
    if (const Json* const content = find(extra, kind)) {
      commit.extra = from_base64(text_of(*content, kind));
      return;
    }
  }
  commit.notes.push_back(
      "the commit's extra= is of a kind that only Python reads: it is left "
      "out. C++ reads bytes and str");
}

bool is_empty_dict(const Json& json) { return array_at(json, "dict").empty(); }

void note_what_is_left_out(const Json& json,
                           const std::set<std::string>& unknown,
                           AdamWCommit& commit) {
  if (!unknown.empty()) {
    std::string names;
    for (const std::string& name : unknown) {
      names += (names.empty() ? "" : ", ") + name;
    }
    commit.notes.push_back(
        "options of the commit's groups have no place in "
        "C++ and are left out: " +
        names);
  }
  if (!is_empty_dict(at(json, "foreign")) ||
      !is_empty_dict(at(json, "others"))) {
    commit.notes.push_back(
        "the commit has state of others, such as a wrapper's, which only "
        "Python keeps: it is left out");
  }
}

AdamWCommit parse_document(const Json& json) {
  if (at(json, "format") != kFormat) {
    throw std::invalid_argument(
        "the commit has version " + shown(at(json, "format")) +
        " of the document; this torch_ext reads version 1");
  }
  const std::string found = text_of(at(json, "class"), "class");
  if (found != kClass) {
    throw std::invalid_argument("the commit is of an " + found.substr(0, 80) +
                                ", not of an " + kClass);
  }
  AdamWCommit commit;
  const std::string format = text_of(at(json, "state_format"), "state_format");
  try {
    commit.state_format = parse_state_format(format);
  } catch (const std::invalid_argument&) {
    damaged("its \"state_format\" is " + shown(Json(format)));
  }
  commit.seed = count_of(at(json, "seed"), "seed");
  commit.next_slot = count_of(at(json, "next"), "next");
  std::set<std::string> unknown;
  commit.defaults = unpack_options(at(json, "defaults"), unknown);
  unpack_parameters(json, commit);
  unpack_groups(json, commit, unknown);
  unpack_extra(at(json, "extra"), commit);
  note_what_is_left_out(json, unknown, commit);
  return commit;
}

}  // namespace

std::string adamw_commit_text(const AdamWCommit& commit) {
  Json groups = Json::array();
  for (const AdamWCommit::Group& group : commit.groups) {
    groups.push_back(
        {{"params", group.parameters}, {"options", packed(group.options)}});
  }
  Json parameters = Json::object();
  for (const auto& [name, parameter] : commit.parameters) {
    parameters[name] = packed(parameter);
  }
  Json extra;
  if (!commit.extra.empty()) extra = {{"bytes", to_base64(commit.extra)}};
  const Json nothing{{"dict", Json::array()}};
  const Json document{{"format", kFormat},
                      {"class", kClass},
                      {"state_format", state_format_name(commit.state_format)},
                      {"seed", commit.seed},
                      {"next", commit.next_slot},
                      {"defaults", packed(commit.defaults)},
                      {"groups", std::move(groups)},
                      {"parameters", std::move(parameters)},
                      {"foreign", nothing},
                      {"others", nothing},
                      {"extra", std::move(extra)}};
  try {
    return document.dump();
  } catch (const Json::type_error&) {
    throw std::invalid_argument("commit: a parameter's name is not in UTF-8");
  }
}

AdamWCommit parse_adamw_commit(std::string_view text, const std::string& path) {
  try {
    return parse_document(parse(text));
  } catch (const FormatError& error) {
    throw IoError({.op = "read commit",
                   .path = path,
                   .error = EIO,
                   .detail = std::string("the commit's document is damaged: ") +
                             error.what()});
  }
}

}  // namespace torch_ext
