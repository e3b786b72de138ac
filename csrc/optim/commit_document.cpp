#include "commit_document.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "store/store_format.h"
#include "tile_layout.h"

namespace torch_ext {
namespace {

using Json = nlohmann::json;
using TileContent = CommitDocument::TileContent;

constexpr std::uint64_t kMostTile = std::uint64_t{1} << 40;
constexpr std::uint64_t kMostElements = std::uint64_t{1} << 48;

Json json_of(const TileList& tiles) {
  Json all = Json::array();
  for (const auto& tile : tiles) {
    Json segments = Json::array();
    for (const Segment& segment : tile->segments) {
      segments.push_back(
          {segment.parameter, segment.first, segment.count, segment.offset});
    }
    all.push_back({tile->bytes, std::move(segments)});
  }
  return all;
}

/// Reads JSON without recursion that a file could make deep.
Json parse(std::string_view text) {
  constexpr int kMostDepth = 16;
  const auto shallow = [](int depth, Json::parse_event_t, Json&) {
    if (depth > kMostDepth) throw FormatError("its document is too deep");
    return true;
  };
  Json json = Json::parse(text, shallow, /*allow_exceptions=*/false);
  if (!json.is_object()) throw FormatError("its document is not JSON");
  return json;
}

const Json& at(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) {
    throw FormatError(std::string("its document has no \"") + key + "\"");
  }
  return *found;
}

const Json& array_at(const Json& object, const char* key) {
  const Json& array = at(object, key);
  if (!array.is_array()) {
    throw FormatError(std::string("its document's \"") + key +
                      "\" is no array");
  }
  return array;
}

std::uint64_t number(const Json& json) {
  if (!json.is_number_unsigned()) {
    throw FormatError("its document has something else for a number: " +
                      json.dump().substr(0, 40));
  }
  return json.get<std::uint64_t>();
}

std::uint64_t number_in(const Json& array, std::size_t index) {
  if (!array.is_array() || index >= array.size()) {
    throw FormatError("its document lacks a number");
  }
  return number(array[index]);
}

std::vector<TileContent> tiles_of(const Json& json, std::uint64_t tile_bytes) {
  std::vector<TileContent> tiles;
  for (const Json& each : json) {
    TileContent& tile = tiles.emplace_back();
    tile.bytes = number_in(each, 0);
    if (tile.bytes == 0 || tile.bytes > tile_bytes || each.size() != 2 ||
        !each[1].is_array()) {
      throw FormatError("its document has a tile that cannot be");
    }
    for (const Json& segment : each[1]) {
      tile.segments.push_back({.parameter = number_in(segment, 0),
                               .first = number_in(segment, 1),
                               .count = number_in(segment, 2),
                               .offset = number_in(segment, 3)});
    }
  }
  return tiles;
}

/// Segments of this many elements with these fields.
struct Target {
  std::uint64_t elements = 0;
  StateFields fields = {};
  bool must_be_covered = true;
};

void check_segments(const std::vector<TileContent>& tiles,
                    const std::map<std::size_t, Target>& targets) {
  using Range = std::pair<std::uint64_t, std::uint64_t>;
  std::map<std::size_t, std::vector<Range>> covered;
  for (const TileContent& tile : tiles) {
    std::vector<Range> used;
    for (const Segment& segment : tile.segments) {
      const auto found = targets.find(segment.parameter);
      if (found == targets.end() || segment.count == 0 ||
          segment.first > found->second.elements ||
          segment.count > found->second.elements - segment.first ||
          segment.first % StateFields::kCut != 0 || segment.offset % 64 != 0) {
        throw FormatError("its document has a segment that cannot be");
      }
      std::uint64_t bytes = 0;
      for (std::size_t i = 0; i < StateFields::kMax; ++i) {
        bytes += TileLayout::bytes_of(found->second.fields, i, segment.count);
      }
      if (segment.offset > tile.bytes || bytes > tile.bytes - segment.offset) {
        throw FormatError("its document has a segment beyond its tile");
      }
      used.emplace_back(segment.offset, segment.offset + bytes);
      covered[segment.parameter].emplace_back(segment.first, segment.count);
    }
    std::ranges::sort(used);
    for (std::size_t i = 1; i < used.size(); ++i) {
      if (used[i].first < used[i - 1].second) {
        throw FormatError("its document has segments that overlap");
      }
    }
  }
  for (const auto& [number, target] : targets) {
    std::vector<Range>& parts = covered[number];
    std::ranges::sort(parts);
    std::uint64_t next = 0;
    for (const auto& [first, count] : parts) {
      if (first != next) {
        next = target.elements + 1;  // A gap, or twice.
        break;
      }
      next += count;
    }
    // All of it has a place, or nothing.
    if (next == target.elements) continue;
    if (parts.empty() && !target.must_be_covered) continue;
    throw FormatError("its document does not cover number " +
                      std::to_string(number));
  }
}

void check_segments(const CommitDocument& document) {
  std::map<std::size_t, Target> targets;
  for (const auto& [number, elements, fields, step, has_state] :
       document.parameters) {
    if (!targets.emplace(number, Target{elements, fields, has_state}).second) {
      throw FormatError("its document has a parameter twice");
    }
  }
  check_segments(document.tiles, targets);
  targets.clear();
  for (std::size_t i = 0; i < document.values.size(); ++i) {
    const CommittedValue& value = document.values[i];
    targets.emplace(i, Target{value.elements, fields_of(value)});
  }
  check_segments(document.value_tiles, targets);
}

}  // namespace

StateFields fields_of(const CommittedValue& value) {
  StateFields fields;
  fields.bytes_per_cut[0] =
      static_cast<std::uint32_t>(StateFields::kCut) * value.element_bytes;
  return fields;
}

std::string layout_json(const TileList& tiles,
                        std::span<const CommittedValue> values,
                        const TileList& value_tiles, std::uint64_t tile_bytes) {
  Json sizes = Json::array();
  for (const CommittedValue& value : values) {
    sizes.push_back({value.elements, value.element_bytes});
  }
  return Json{{"tile_bytes", tile_bytes},
              {"tiles", json_of(tiles)},
              {"values", std::move(sizes)},
              {"value_tiles", json_of(value_tiles)}}
      .dump();
}

std::string make_document(
    std::string_view layout,
    const std::vector<CommitDocument::Parameter>& parameters,
    std::string_view of_caller) {
  Json all = Json::array();
  for (const CommitDocument::Parameter& parameter : parameters) {
    all.push_back({parameter.number, parameter.elements,
                   parameter.fields.bytes_per_cut, parameter.step,
                   parameter.has_state ? 1 : 0});
  }
  const Json changing{{"parameters", std::move(all)}, {"caller", of_caller}};
  try {
    return std::string(layout) + "\n" + changing.dump();
  } catch (const Json::type_error&) {
    throw std::invalid_argument("commit: the document is not in UTF-8");
  }
}

CommitDocument parse_document(std::string_view text) {
  const std::size_t line = text.find('\n');
  if (line == std::string_view::npos) {
    throw FormatError("its document has one line");
  }
  const Json layout = parse(text.substr(0, line));
  const Json changing = parse(text.substr(line + 1));
  CommitDocument document;
  document.tile_bytes = number(at(layout, "tile_bytes"));
  if (document.tile_bytes < 1 || document.tile_bytes > kMostTile) {
    throw FormatError("its document has tiles that cannot be");
  }
  document.tiles = tiles_of(array_at(layout, "tiles"), document.tile_bytes);
  document.value_tiles =
      tiles_of(array_at(layout, "value_tiles"), document.tile_bytes);
  for (const Json& each : array_at(layout, "values")) {
    const std::uint64_t elements = number_in(each, 0);
    const std::uint64_t bytes = number_in(each, 1);
    if (elements > kMostElements || bytes < 1 || bytes > 64) {
      throw FormatError("its document has a value that cannot be");
    }
    document.values.push_back({elements, static_cast<std::uint32_t>(bytes)});
  }
  const Json& of_caller = at(changing, "caller");
  if (!of_caller.is_string()) {
    throw FormatError("its document's \"caller\" is no text");
  }
  document.of_caller = of_caller.get<std::string>();
  for (const Json& each : array_at(changing, "parameters")) {
    CommitDocument::Parameter& parameter = document.parameters.emplace_back();
    parameter.number = number_in(each, 0);
    parameter.elements = number_in(each, 1);
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      const std::uint64_t field = each.size() > 2 ? number_in(each[2], i) : 0;
      bytes += std::min<std::uint64_t>(field, kMostElements);
      parameter.fields.bytes_per_cut[i] = static_cast<std::uint32_t>(field);
    }
    parameter.step = number_in(each, 3);
    parameter.has_state = number_in(each, 4) != 0;
    if (bytes == 0 || bytes > 64 * StateFields::kCut ||
        parameter.elements > kMostElements ||
        parameter.number != document.parameters.size() - 1) {
      throw FormatError("its document has a parameter that cannot be");
    }
  }
  check_segments(document);
  return document;
}

}  // namespace torch_ext
