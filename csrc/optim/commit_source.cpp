// Reading a commit where it lies.
//
// Elements are found by their segment, and segments lie in tiles. A tile is
// read whole, into one of a few buffers; the tile that was used longest ago
// makes way. Whoever divides state anew goes through a parameter from its
// first element to its last, so the tile that follows is read ahead.
//
// The store's owner may go on meanwhile: see commit_reader.cpp. It writes to
// the commit's extents only once a later commit has taken its place. So what
// fits its checksum is the commit's. What does not fit is damage, unless the
// owner has moved on.

#include "commit_source.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <map>
#include <stdexcept>
#include <utility>

#include "memory/pages.h"
#include "store/commit_reader.h"
#include "tile_layout.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using Found = CommitReader::Found;

StoreOptions store_options(const SourceOptions& options) {
  StoreOptions how = options_to_read(options.files);
  const std::uint64_t block_size = how.aio.block_size;
  how.aio = options.aio;
  how.aio.block_size = block_size;
  how.engine = options.engine;
  how.engine_factory = options.engine_factory;
  return how;
}

[[noreturn]] void fail(const std::string& path, int error,
                       const std::string& detail) {
  throw IoError(
      {.op = "read commit", .path = path, .error = error, .detail = detail});
}

std::string damage_of(const CommitReader& reader) {
  std::string text;
  for (const StoreDamage& each : reader.damage()) {
    text += (text.empty() ? "" : "; ") + each.what;
  }
  return text;
}

/// Where the segments of one parameter or value are.
struct SegmentPlace {
  std::size_t tile = 0;  ///< An extent of the commit.
  Segment segment;
};
/// By the first element.
using Places = std::map<std::uint64_t, SegmentPlace>;

}  // namespace

class CommitSource::Impl {
 public:
  Impl(const SourceOptions& options, std::uint64_t generation)
      : store_(store_options(options)), reader_(store_) {
    find(generation);
    const std::string& path = store_.file().path();
    try {
      document_ = parse_document(commit_.document);
    } catch (const FormatError& error) {
      fail(path, EIO, error.what());
    }
    const std::size_t states = document_.tiles.size();
    if (states + document_.value_tiles.size() != commit_.extents.size()) {
      fail(path, EIO, "its document has other tiles");
    }
    for (std::size_t i = 0; i < commit_.extents.size(); ++i) {
      const bool is_state = i < states;
      const auto& tile =
          is_state ? document_.tiles[i] : document_.value_tiles[i - states];
      if (commit_.extents[i]->size() != tile.bytes) {
        fail(path, EIO, "its document has tiles of other sizes");
      }
      auto& places = is_state ? states_ : values_;
      for (const Segment& segment : tile.segments) {
        places[segment.parameter][segment.first] = {i, segment};
      }
    }
  }

  ~Impl() {
    for (Slot& slot : slots_) settle(slot);
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const StateSegment& segment_at(bool is_state, std::size_t number,
                                 std::uint64_t element) {
    const SegmentPlace& place = place_of(is_state, number, element);
    std::byte* next = tile(place.tile) + place.segment.offset;
    StateSegment& result = results_[turn_ = 1 - turn_];
    result = {number, place.segment.first, place.segment.count, 0, {}};
    StateFields fields;
    if (is_state) {
      fields = document_.parameters[number].fields;
      result.step = document_.parameters[number].step;
    } else {
      fields = fields_of(document_.values[number]);
    }
    for (std::size_t i = 0; i < StateFields::kMax; ++i) {
      if (fields.bytes_per_cut[i] == 0) continue;
      result.fields[i] = next;
      next += TileLayout::bytes_of(fields, i, place.segment.count);
    }
    return result;
  }

  const CommitDocument& document() const noexcept { return document_; }
  const std::string& path() const noexcept { return store_.file().path(); }

 private:
  struct Slot {
    std::size_t tile = kNone;
    std::unique_ptr<Pages> memory;
    std::size_t size = 0;
    Ticket read;
    bool reading = false;
    std::uint64_t last_use = 0;
  };
  static constexpr std::size_t kNone = ~std::size_t{0};

  void find(std::uint64_t generation) {
    for (const CommitReader::Slot& slot : reader_.slots()) {
      if (slot.root.kind == StoreRoot::Kind::kTombstone) continue;
      std::vector<Found> all = reader_.read(slot.root);
      for (Found& found : all) {
        if (found.commit.generation != generation) continue;
        if (!found.fault.empty()) fail(path(), EIO, found.fault);
        commit_ = std::move(found.commit);
        return;
      }
    }
    const std::string damage = damage_of(reader_);
    fail(path(), damage.empty() ? ENOENT : EIO,
         "generation " + std::to_string(generation) + " is not there" +
             (damage.empty() ? "" : ": ") + damage);
  }

  const SegmentPlace& place_of(bool is_state, std::size_t number,
                               std::uint64_t element) const {
    const auto& all = is_state ? states_ : values_;
    const auto places = all.find(number);
    if (places != all.end()) {
      auto place = places->second.upper_bound(element);
      if (place != places->second.begin()) {
        const Segment& segment = (--place)->second.segment;
        if (element - segment.first < segment.count) return place->second;
      }
    }
    throw std::out_of_range("commit: number " + std::to_string(number) +
                            " has no element " + std::to_string(element));
  }

  /// The content of a tile.
  std::byte* tile(std::size_t number) {
    Slot& slot = slot_of(number);
    slot.last_use = ++uses_;
    const bool was_reading = slot.reading;
    if (was_reading) {
      read_ahead(number);
      finish(slot);
    }
    return slot.memory->first(slot.size).data();
  }

  /// Finds a tile in memory, or begins to read it.
  Slot& slot_of(std::size_t number) {
    const auto found = std::ranges::find(slots_, number, &Slot::tile);
    if (found != slots_.end()) return *found;
    Slot& slot = *std::ranges::min_element(slots_, {}, &Slot::last_use);
    settle(slot);
    const std::shared_ptr<Extent>& extent = commit_.extents[number];
    if (slot.size < extent->padded_size()) {
      slot.memory.reset();
      slot.size = 0;
      slot.memory = std::make_unique<Pages>(extent->padded_size());
      slot.size = extent->padded_size();
    }
    slot.read =
        store_.read(extent, 0, slot.memory->first(extent->padded_size()));
    slot.tile = number;
    slot.reading = true;
    slot.last_use = ++uses_;
    return slot;
  }

  /// State and values are two runs of tiles.
  void read_ahead(std::size_t number) {
    const std::size_t next = number + 1;
    if (next < commit_.extents.size() && next != document_.tiles.size()) {
      slot_of(next);
    }
  }

  void finish(Slot& slot) {
    try {
      slot.reading = false;
      slot.read.wait();
    } catch (const IoError& error) {
      slot.tile = kNone;
      if (is_loss(error.error()) && reader_.moved_on()) {
        fail(path(), ESTALE,
             "its owner has made other commits while this one was read");
      }
      throw;
    }
  }

  /// Waits until nobody writes to a slot's memory.
  static void settle(Slot& slot) {
    slot.tile = kNone;
    if (!std::exchange(slot.reading, false)) return;
    try {
      slot.read.wait();
    } catch (...) {
      // Nobody has asked for it.
    }
  }

  CommitDocument document_;
  Store store_;
  CommitReader reader_;
  Commit commit_;
  std::map<std::size_t, Places> states_;
  std::map<std::size_t, Places> values_;
  std::array<Slot, kTiles> slots_;
  std::uint64_t uses_ = 0;
  std::array<StateSegment, 2> results_;
  std::size_t turn_ = 0;
};

CommitSource::CommitSource(const SourceOptions& options,
                           std::uint64_t generation)
    : impl_(std::make_unique<Impl>(options, generation)) {}

CommitSource::~CommitSource() = default;

std::vector<std::vector<OptimizerOffload::Committed>> CommitSource::list(
    const SourceOptions& options) {
  Store store(store_options(options));
  const std::string& path = store.file().path();
  CommitReader reader(store);
  std::vector<std::vector<OptimizerOffload::Committed>> all;
  for (const CommitReader::Slot& slot : reader.slots()) {
    if (slot.root.kind == StoreRoot::Kind::kTombstone) continue;
    const std::vector<Found> found = reader.read(slot.root);
    if (!found.back().fault.empty()) continue;
    std::vector<OptimizerOffload::Committed>& commits = all.emplace_back();
    for (const Found& each : found) {
      if (!each.fault.empty()) continue;
      const Commit& commit = each.commit;
      try {
        commits.push_back({commit.generation, commit.step, commit.time,
                           parse_document(commit.document).of_caller});
      } catch (const FormatError& error) {
        fail(path, EIO, error.what());
      }
    }
    // A commit that was renewed stands behind newer ones.
    std::ranges::sort(commits, {}, &OptimizerOffload::Committed::generation);
  }
  if (!all.empty()) return all;
  const std::string damage = damage_of(reader);
  fail(path, damage.empty() ? ENOENT : EIO,
       damage.empty() ? "nothing was committed there" : damage);
}

const CommitDocument& CommitSource::document() const noexcept {
  return impl_->document();
}

const std::string& CommitSource::path() const noexcept { return impl_->path(); }

const StateSegment& CommitSource::state_at(std::size_t parameter,
                                           std::uint64_t element) {
  return impl_->segment_at(/*is_state=*/true, parameter, element);
}

const StateSegment& CommitSource::value_at(std::size_t value,
                                           std::uint64_t element) {
  return impl_->segment_at(/*is_state=*/false, value, element);
}

}  // namespace torch_ext
