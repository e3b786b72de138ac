#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "tile.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/size.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// How host_memory is shared out.
struct TilePlan {
  std::uint64_t tile_bytes = 0;
  std::size_t buffers = 0;
  /// How many of the buffers tiles pass through, unless all tiles can stay.
  std::size_t lanes = 0;

  /// How many of `tiles` tiles stay in memory.
  std::size_t resident(std::size_t tiles) const {
    return tiles <= buffers ? tiles : buffers - lanes;
  }
};

/// Whether tile `i` of `tiles` is one of `chosen` that are spread evenly.
inline bool is_chosen(std::size_t i, std::size_t tiles, std::size_t chosen) {
  return (i + 1) * chosen / tiles > i * chosen / tiles;
}

/// Begins the error of a host_memory that does not do.
inline const std::string kHostMemoryTooSmall =
    "optimizer: host_memory must be at least ";

/// Shares out host_memory. There are few lane buffers, so that nearly all of a
/// large budget is for tiles that stay. Yet they are large enough for requests
/// that a drive likes. `tile_bytes` is a wish, or 0.
/// Errors: std::invalid_argument that names the smallest host_memory that will
/// do.
inline TilePlan plan_tiles(std::uint64_t host_memory, std::uint64_t scratch,
                           std::uint64_t granule,
                           std::uint64_t tile_bytes = 0) {
  constexpr std::uint64_t kFewest = 3;  // Read, update, write.
  constexpr std::size_t kLanes = 8;
  constexpr std::uint64_t kSmallest = std::uint64_t{64} << 10;
  constexpr std::uint64_t kUsual = std::uint64_t{1} << 20;
  constexpr std::uint64_t kLargest = std::uint64_t{16} << 20;
  const std::uint64_t smallest =
      align_up(tile_bytes > 0 ? tile_bytes : kSmallest, granule);
  const std::uint64_t needed = scratch + kFewest * smallest;
  if (host_memory < needed) {
    throw std::invalid_argument(kHostMemoryTooSmall + std::to_string(needed) +
                                " bytes (" + format_size(needed) + "), got " +
                                std::to_string(host_memory));
  }
  const std::uint64_t rest = host_memory - scratch;
  TilePlan plan;
  plan.tile_bytes = smallest;
  if (tile_bytes == 0) {
    const std::uint64_t wish =
        std::clamp(rest / 256, std::min(rest / kLanes, kUsual), kLargest);
    plan.tile_bytes = std::max(smallest, align_down(wish, granule));
  }
  plan.buffers = rest / plan.tile_bytes;
  plan.lanes = std::min(plan.buffers, kLanes);
  return plan;
}

/// Describes a plan in the terms of the public header. Tiles take multiples of
/// `granule` on the drive.
inline OptimizerPlan describe(const TilePlan& from, const TileList& tiles,
                              std::uint64_t host_memory, std::uint64_t scratch,
                              std::uint64_t granule) {
  const std::size_t count = tiles.size();
  OptimizerPlan plan;
  plan.host_memory = host_memory;
  plan.scratch_bytes = scratch;
  plan.tile_bytes = from.tile_bytes;
  plan.tiles = count;
  plan.resident_tiles = from.resident(count);
  plan.lane_buffers = plan.resident_tiles == count ? 0 : from.lanes;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t bytes = tiles[i]->bytes;
    plan.state_bytes += bytes;
    if (is_chosen(i, count, plan.resident_tiles)) {
      plan.resident_bytes += bytes;
    } else {
      plan.step_bytes += 2 * align_up(bytes, granule);
    }
  }
  return plan;
}

/// Fills tiles with parameters, one after the other.
class TileLayout {
 public:
  /// Tiles are appended to `tiles`.
  TileLayout(TileList& tiles, std::uint64_t tile_bytes)
      : tiles_(tiles), first_(tiles.size()), tile_bytes_(tile_bytes) {}

  void add(std::size_t parameter, std::uint64_t elements,
           const StateFields& fields) {
    for (std::uint64_t first = 0; first < elements;) {
      const std::uint64_t count = take(elements - first, fields);
      Tile& tile = *tiles_.back();
      tile.segments.push_back({parameter, first, count, tile.bytes});
      tile.bytes += bytes_of(fields, count);
      first += count;
    }
  }

  /// Bytes from a field of `count` elements to the next field.
  static std::uint64_t bytes_of(const StateFields& fields, std::size_t field,
                                std::uint64_t count) {
    return align_up(fields.bytes(field, count), 64);
  }

 private:
  // How many elements go into the last tile. It is made anew if need be.
  std::uint64_t take(std::uint64_t left, const StateFields& fields) {
    const bool open = tiles_.size() > first_;
    const std::uint64_t room = open ? tile_bytes_ - tiles_.back()->bytes : 0;
    const std::uint64_t more = fitting(left, fields, room);
    if (more > 0) return more;
    tiles_.push_back(std::make_unique<Tile>());
    tiles_.back()->number = tiles_.size() - 1;
    return fitting(left, fields, tile_bytes_);
  }

  // How many of `left` elements fit into `room` bytes, cut where parameters may
  // be cut.
  static std::uint64_t fitting(std::uint64_t left, const StateFields& fields,
                               std::uint64_t room) {
    if (bytes_of(fields, left) <= room) return left;
    std::uint64_t unit = 0;
    for (const std::uint32_t bytes : fields.bytes_per_cut) unit += bytes;
    std::uint64_t cuts = room / unit;
    while (cuts > 0 && bytes_of(fields, cuts * StateFields::kCut) > room) {
      --cuts;
    }
    return cuts * StateFields::kCut;
  }

  static std::uint64_t bytes_of(const StateFields& fields,
                                std::uint64_t count) {
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      bytes += bytes_of(fields, i, count);
    }
    return bytes;
  }

  TileList& tiles_;
  const std::size_t first_;
  const std::uint64_t tile_bytes_;
};

/// The least host_memory that keeps everything in memory. It may be a tile and
/// 1/1024 too large, since tiles change in size and number from one budget to
/// the next. `tiles_for(tile_bytes)` says how many tiles there would be; they
/// have `state_bytes` in all.
inline std::uint64_t budget_for_all(
    std::uint64_t state_bytes, std::uint64_t granule, std::uint64_t tile_bytes,
    const std::function<std::uint64_t(std::uint64_t)>& scratch_for,
    const std::function<std::size_t(std::uint64_t)>& tiles_for) {
  const std::uint64_t page = page_size();
  const auto holds = [&](std::uint64_t budget) {
    const std::uint64_t scratch = align_up(scratch_for(budget), page);
    TilePlan plan;
    try {
      plan = plan_tiles(budget, scratch, granule, tile_bytes);
    } catch (const std::invalid_argument&) {
      return false;  // Too little for any tiles.
    }
    return tiles_for(plan.tile_bytes) < plan.buffers;
  };
  std::uint64_t enough = align_up(state_bytes + 1, page);
  while (!holds(enough)) enough *= 2;
  std::uint64_t less = enough / 2;
  while (enough - less > std::max(page, enough / 1024)) {
    const std::uint64_t middle = align_down(less + (enough - less) / 2, page);
    (holds(middle) ? enough : less) = middle;
  }
  return enough;
}

}  // namespace torch_ext
