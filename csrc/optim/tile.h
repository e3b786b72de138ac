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
  std::uint64_t first = 0;  ///< An element; a multiple of StateFields::kCut.
  std::uint64_t count = 0;  ///< Elements.
  std::uint64_t offset =
      0;  ///< Where the first field is in the tile, in bytes.
};

/// State, or values of parameters, that is read and written in one go.
struct Tile {
  static constexpr std::size_t kUnranked =
      std::numeric_limits<std::size_t>::max();
  enum class State {
    kIdle,     ///< On disk only, or nowhere yet.
    kReading,  ///< The disk fills `buffer`.
    kReady,    ///< `buffer` waits for its turn.
    kBusy,     ///< A kernel works on `buffer`.
    kWriting,  ///< The disk takes from `buffer`.
    kHeld,     ///< `buffer` is written later: see TileLanes.
  };

  std::size_t number = 0;
  std::vector<Segment> segments;
  std::uint64_t bytes = 0;  ///< Used; the extent's size.
  bool resident = false;    ///< Stays in memory after its first visit.
  bool holds_state = true;  ///< Else values or zeros, for a commit.
  /// Null for a resident tile before the first commit, and if a write for a
  /// commit has failed. Guarded by TileLanes' lock while transfers run, like
  /// the three after it.
  std::shared_ptr<Extent> extent;
  /// `extent` is a commit's, or one in the making may get it: it is not written
  /// again.
  bool committed = false;
  /// What a commit in the making would be the first to have. Else null.
  std::shared_ptr<Extent> proposed;
  std::vector<std::shared_ptr<Extent>> spares;  ///< Where it may be written.
  std::size_t active_segments = 0;              ///< Released in the open step.

  // TileLanes' own, guarded by its lock: --------------------------------------
  State state = State::kIdle;
  Buffer buffer;
  bool on_disk = false;          ///< Has been written in full.
  bool in_memory = false;        ///< `buffer` has the newest copy; resident.
  bool dirty = false;            ///< No copy on disk is as new.
  bool unwanted = false;         ///< To be let go of once it is read.
  bool second_write = false;     ///< The first one, elsewhere, has failed.
  bool released = false;         ///< May be visited in this round.
  bool visited = false;          ///< Was visited in this round.
  std::size_t rank = kUnranked;  ///< Place among the tiles to visit.
  double start = 0;              ///< When the transfer in flight began.
  std::size_t step = 0;          ///< It is in memory for this one; 0: for none.

  /// Called while no transfer runs.
  void take_spare_if_nowhere() {
    if (extent != nullptr || spares.empty()) return;
    extent = std::move(spares.back());
    spares.pop_back();
  }
};

using TileList = std::vector<std::unique_ptr<Tile>>;

}  // namespace torch_ext
