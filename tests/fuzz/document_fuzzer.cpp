// The document of a commit: any text is read or refused with a FormatError. In
// what is read, segments lie inside their tiles without overlap, and cover what
// they must.

#include <algorithm>
#include <cstdint>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "optim/commit_document.h"
#include "store/store_format.h"
#include "targets.h"

namespace {

using namespace torch_ext;
using fuzz::check;
using Range = std::pair<std::uint64_t, std::uint64_t>;  // [first, end)

bool overlap(std::vector<Range> ranges) {
  std::ranges::sort(ranges);
  const auto meets = [](const Range& a, const Range& b) {
    return b.first < a.second;
  };
  return std::ranges::adjacent_find(ranges, meets) != ranges.end();
}

/// Bytes of a segment: its fields, each padded to 64. Rounded up by hand, so
/// that it is not the reader's own sum.
std::uint64_t bytes_of(const StateFields& fields, std::uint64_t count) {
  std::uint64_t bytes = 0;
  for (const std::uint64_t per_cut : fields.bytes_per_cut) {
    const std::uint64_t field =
        (count * per_cut + StateFields::kCut - 1) / StateFields::kCut;
    bytes += (field + 63) / 64 * 64;
  }
  return bytes;
}

/// Elements and fields of a parameter or value.
using Target = std::pair<std::uint64_t, StateFields>;

/// How many elements of each target the tiles have.
std::map<std::size_t, std::uint64_t> check_tiles(
    const std::vector<CommitDocument::TileContent>& tiles,
    const std::vector<Target>& targets, std::uint64_t tile_bytes) {
  std::map<std::size_t, std::vector<Range>> parts;
  std::map<std::size_t, std::uint64_t> covered;
  for (const auto& tile : tiles) {
    check(tile.bytes > 0 && tile.bytes <= tile_bytes);
    std::vector<Range> used;
    for (const Segment& segment : tile.segments) {
      check(segment.parameter < targets.size());
      const auto& [elements, fields] = targets[segment.parameter];
      const std::uint64_t end = segment.first + segment.count;
      check(segment.count > 0 && end > segment.first && end <= elements);
      const std::uint64_t bytes = bytes_of(fields, segment.count);
      check(segment.offset + bytes <= tile.bytes);
      used.emplace_back(segment.offset, segment.offset + bytes);
      parts[segment.parameter].emplace_back(segment.first, end);
      covered[segment.parameter] += segment.count;
    }
    check(!overlap(std::move(used)));
  }
  for (auto& [number, ranges] : parts) check(!overlap(std::move(ranges)));
  return covered;
}

}  // namespace

bool fuzz_document(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  CommitDocument document;
  try {
    document = parse_document(text);
  } catch (const FormatError& error) {
    const std::string_view message = error.what();
    check(!message.empty() && message.size() <= fuzz::kLongestMessage);
    return false;
  }
  std::vector<Target> targets;
  for (const auto& parameter : document.parameters) {
    check(parameter.number == targets.size());
    targets.emplace_back(parameter.elements, parameter.fields);
  }
  auto covered = check_tiles(document.tiles, targets, document.tile_bytes);
  for (const auto& parameter : document.parameters) {
    const std::uint64_t has = covered[parameter.number];
    check(has == parameter.elements || (has == 0 && !parameter.has_state));
  }
  targets.clear();
  for (const CommittedValue& value : document.values) {
    targets.emplace_back(value.elements, fields_of(value));
  }
  covered = check_tiles(document.value_tiles, targets, document.tile_bytes);
  for (std::size_t i = 0; i < targets.size(); ++i) {
    check(covered[i] == targets[i].first);
  }
  // What was read is written as it was.
  const auto again =
      parse_document(make_document(text.substr(0, text.find('\n')),
                                   document.parameters, document.of_caller));
  check(again.of_caller == document.of_caller &&
        again.parameters.size() == document.parameters.size());
  for (std::size_t i = 0; i < again.parameters.size(); ++i) {
    const auto& a = again.parameters[i];
    const auto& b = document.parameters[i];
    check(a.step == b.step && a.has_state == b.has_state &&
          a.fields.bytes_per_cut == b.fields.bytes_per_cut);
  }
  return true;
}
