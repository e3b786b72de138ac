#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "torch_ext/memory/buffer_pool.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// Where a tile holds the state of a run of one parameter's elements.
struct Segment {
  std::size_t parameter = 0;
  std::uint64_t first = 0;   ///< Element; a multiple of StateFields::kCut.
  std::uint64_t count = 0;   ///< Elements.
  std::uint64_t offset = 0;  ///< Bytes into the tile, of the first field.
};

/// State that is read and written in one go.
struct Tile {
  static constexpr std::size_t kUnranked =
      std::numeric_limits<std::size_t>::max();
  enum class State {
    kIdle,     ///< On disk only, or nowhere yet.
    kReading,  ///< The disk fills `buffer`.
    kReady,    ///< `buffer` waits for its turn.
    kBusy,     ///< A kernel works on `buffer`.
    kWriting,  ///< The disk takes from `buffer`.
  };

  std::size_t number = 0;
  std::vector<Segment> segments;
  std::uint64_t bytes = 0;         ///< Used; the extent's size.
  bool resident = false;           ///< Stays in memory from its first visit on.
  std::shared_ptr<Extent> extent;  ///< Null for a resident tile.
  std::size_t active_segments = 0;  ///< Released in the step that has begun.

  // Of TileLanes, under its lock: --------------------------------------------
  State state = State::kIdle;
  Buffer buffer;
  bool on_disk = false;          ///< Has been written in full.
  bool in_memory = false;        ///< `buffer` is the only copy; resident.
  bool unwanted = false;         ///< Let go of as soon as it is read.
  bool released = false;         ///< May be visited in this round.
  bool visited = false;          ///< Has been.
  std::size_t rank = kUnranked;  ///< Place among the tiles to visit.
  double start = 0;              ///< When the transfer in flight began.
  std::size_t step = 0;          ///< That it is in memory for; 0: for none.
};

using TileList = std::vector<std::unique_ptr<Tile>>;

}  // namespace torch_ext
