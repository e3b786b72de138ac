#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tile.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// What the extents of an optimizer's commit are. They stand in the order of
/// the tiles: those of the state, and then those of the values.
struct CommitDocument {
  struct Parameter {
    std::size_t number = 0;
    std::uint64_t elements = 0;
    StateFields fields = {};
    std::uint64_t step = 0;
    bool has_state = false;
  };
  struct TileContent {
    std::uint64_t bytes = 0;
    std::vector<Segment> segments = {};
  };
  std::uint64_t tile_bytes = 0;
  std::vector<Parameter> parameters = {};
  std::vector<TileContent> tiles = {};
  std::vector<CommittedValue> values = {};
  std::vector<TileContent> value_tiles = {};
  std::string of_caller = {};
};

/// JSON that says where things lie in tiles. It is long and seldom changes.
std::string layout_json(const TileList& tiles,
                        std::span<const CommittedValue> values,
                        const TileList& value_tiles, std::uint64_t tile_bytes);

/// A value as the one field of a parameter.
StateFields fields_of(const CommittedValue& value);

/// A commit's document: a layout, and what changes with each commit. Errors:
/// std::invalid_argument if `of_caller` is not in UTF-8.
std::string make_document(
    std::string_view layout,
    const std::vector<CommitDocument::Parameter>& parameters,
    std::string_view of_caller);

/// Errors: FormatError that says what is wrong. Segments lie inside their tiles
/// and parameters, do not overlap, and cover each value, and each parameter
/// that has state.
CommitDocument parse_document(std::string_view text);

}  // namespace torch_ext
