// How commits are found again: commit_log.cpp tells how they got there.
//
// The header says how the store was made. A root says where the table of its
// commit lies, and the table where the extents and the tables of earlier
// commits lie. Everything on this way has a checksum.
//
// A reader takes no lock, so the owner of the store may go on meanwhile. It
// writes to space of a commit only after a later commit has its root. So a
// reader compares the roots when something does not fit. If they are what they
// were, nobody has written there, and what does not fit is damage. What fits is
// what was committed, whatever the owner has done since.

#include "commit_reader.h"

#include <algorithm>
#include <cerrno>
#include <functional>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "memory/pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

[[noreturn]] void fail_damaged(const File& file, const std::string& detail) {
  throw IoError({.op = "read commit",
                 .path = file.path(),
                 .error = EIO,
                 .detail = detail});
}

/// Reads with `read`, which fills the memory that it is given.
template <typename Read>
StoreHeader read_by(const File& file, std::size_t granule, Read read) {
  const std::size_t bytes = align_up(kHeaderBytes, granule);
  const Pages memory(bytes);
  try {
    read(memory.first(bytes));
    return decode_header(memory.first(bytes));
  } catch (const DamagedError& error) {
    fail_damaged(file, error.what());
  } catch (const FormatError& error) {
    throw std::invalid_argument(file.path() + ": " + error.what());
  }
}

bool is_zero(std::span<const std::byte> bytes) {
  return std::ranges::all_of(
      bytes, [](std::byte byte) { return byte == std::byte{0}; });
}

/// Whether an extent has two purposes in a commit.
bool has_one_twice(const CommitReader::Found& found) {
  std::vector<const Extent*> all;
  for (const auto* list : {&found.tables, &found.commit.extents}) {
    for (const auto& extent : *list) {
      if (extent != nullptr && extent->size() > 0) all.push_back(extent.get());
    }
  }
  std::ranges::sort(all);
  return std::ranges::adjacent_find(all) != all.end();
}

}  // namespace

bool is_loss(int error) noexcept {
  return error == EIO || error == ENODATA || error == EUCLEAN ||
         error == EBADMSG || error == EILSEQ;
}

bool is_store(const File& file) {
  const Pages memory(file.granule());
  const auto bytes = memory.first(file.granule());
  return begins_as_header(bytes.first(file.read(0, bytes)));
}

StoreHeader read_header(const File& file) {
  return read_by(file, file.granule(), [&file](std::span<std::byte> bytes) {
    static_cast<void>(file.read(0, bytes));
  });
}

StoreHeader read_header(Store& store, std::size_t directory) {
  const File& file = store.file(directory);
  StoreHeader header =
      read_by(file, store.granule(), [&](std::span<std::byte> bytes) {
        if (file.size() < bytes.size()) {
          throw FormatError("it is not a store of torch_ext");
        }
        store.read_head(directory, 0, bytes).wait();
      });
  if (file.size() < Store::kHeadBytes) fail_damaged(file, "it was truncated");
  return header;
}

std::string other_directories(std::size_t has, std::size_t given) {
  return "the store is in " + std::to_string(has) +
         (has == 1 ? " directory, and " : " directories, and ") +
         std::to_string(given) + (given == 1 ? " was" : " were") +
         " given: give those of the store, in its order. Python's resume() "
         "moves the state to others with nvme_path=";
}

StoreOptions options_to_read(const std::vector<std::filesystem::path>& files) {
  StoreOptions options{.read_only = true};
  for (std::size_t i = 0; i < files.size(); ++i) {
    const std::filesystem::path path = absolute_path(files[i]);
    const StoreHeader header = read_header(File::open(path, File::Mode::kRead));
    if (header.drive != i || header.weights.size() != files.size()) {
      throw std::invalid_argument(path.string() + ": it is the file of drive " +
                                  std::to_string(header.drive) + " of " +
                                  std::to_string(header.weights.size()) +
                                  ", not of drive " + std::to_string(i) +
                                  " of " + std::to_string(files.size()));
    }
    options.directory.all().push_back(
        {path.parent_path(), static_cast<int>(header.weights[i])});
    options.files.push_back(path.filename().string());
    options.aio.block_size = header.block_size;
  }
  return options;
}

CommitReader::CommitReader(Store& store) : store_(store) {
  // What the store counts with: the files may have grown since.
  size_ = store_.stats().file_size + store_.directories() * Store::kHeadBytes;
  read_headers();
  for (std::size_t number = 0; number < 2; ++number) {
    roots_.push_back(read_root(number));
    const std::vector<std::byte>& bytes = roots_.back();
    const auto damaged = [&](const std::string& what) {
      damage_.push_back({.path = store_.file().path(),
                         .offset = kRootOffsets[number],
                         .length = kHeaderBytes,
                         .what = "root " + std::to_string(number) + what});
    };
    if (bytes.empty()) {
      // A drive may be unable to read what was being written in a power cut.
      damaged(" cannot be read");
      continue;
    }
    auto root = decode_root(bytes, header_.store, store_.directories());
    if (!root && !is_zero(bytes)) damaged(" is damaged, or was being written");
    if (!root) continue;
    if (!slots_.empty() && slots_[0].root.generation == root->generation) {
      damaged(" is a copy of the other");
      continue;
    }
    slots_.push_back({number, std::move(*root)});
  }
  std::ranges::sort(slots_, std::greater(),
                    [](const Slot& slot) { return slot.root.generation; });
}

void CommitReader::read_headers() {
  for (std::size_t i = 0; i < store_.directories(); ++i) {
    const StoreHeader header = read_header(store_, i);
    if (i == 0) header_ = header;
    if (i == 0 && header.weights.size() != store_.directories()) {
      throw std::invalid_argument(
          store_.file().path() + ": " +
          other_directories(header.weights.size(), store_.directories()));
    }
    StoreHeader expected = header_;
    expected.drive = static_cast<std::uint32_t>(i);
    if (header != expected || header.weights != store_.weights() ||
        header.granule != store_.granule() ||
        header.block_size !=
            static_cast<std::uint64_t>(store_.config().block_size)) {
      throw std::invalid_argument(
          store_.file(i).path() +
          ": it is not of this store, or the store was made with other "
          "directories, weights or block_size");
    }
  }
}

// Returns nothing if the drive cannot read it.
std::vector<std::byte> CommitReader::read_root(std::size_t number) const {
  const std::size_t bytes = align_up(kHeaderBytes, store_.granule());
  const Pages memory(bytes);
  try {
    store_.read_head(0, kRootOffsets[number], memory.first(bytes)).wait();
  } catch (const IoError& error) {
    if (!is_loss(error.error())) throw;
    return {};
  }
  const auto root = memory.first(kHeaderBytes);
  return {root.begin(), root.end()};
}

std::uint64_t CommitReader::size_of_files() const {
  std::uint64_t size = 0;
  for (std::size_t i = 0; i < store_.directories(); ++i) {
    size += store_.file(i).size();
  }
  return size;
}

bool CommitReader::moved_on() const {
  return size_of_files() != size_ || read_root(0) != roots_[0] ||
         read_root(1) != roots_[1];
}

std::vector<CommitReader::Found> CommitReader::read(const StoreRoot& root) {
  adopted_.clear();
  std::vector<Found> found;
  std::vector<CommitTable::Earlier> earlier;
  Found newest = read_commit(root.generation, root.step, root.table_checksum,
                             root.tables, earlier);
  std::set<std::uint64_t> seen;
  for (const CommitTable::Earlier& each : earlier) {
    std::vector<CommitTable::Earlier> not_kept;
    found.push_back(read_commit(each.generation, each.step, each.table_checksum,
                                each.tables, not_kept));
    if (each.generation >= root.generation ||
        !seen.insert(each.generation).second) {
      found.back().fault = "it is out of order";
      add_damage(each.tables[0], "the table of step " +
                                     std::to_string(each.step) +
                                     " is out of order");
    }
  }
  found.push_back(std::move(newest));
  adopted_.clear();
  return found;
}

CommitReader::Found CommitReader::read_commit(
    std::uint64_t generation, std::uint64_t step, std::uint64_t sum,
    const std::vector<Place>& places,
    std::vector<CommitTable::Earlier>& earlier) {
  Found found;
  found.commit.generation = generation;
  found.commit.step = step;
  found.table_checksum = sum;
  const std::vector<std::byte> bytes = read_table(found, places);
  if (bytes.empty()) return found;
  try {
    CommitTable table = decode_table(
        bytes, header_.store, store_.directories(),
        [this](std::uint64_t size) { return store_.blocks_of(size); });
    if (table.generation != generation || table.step != step) {
      throw FormatError("its table is another commit's");
    }
    found.commit.time = table.time;
    found.commit.document = std::move(table.document);
    earlier = std::move(table.earlier);
    for (CommitTable::Item& item : table.extents) {
      std::string wrong;
      auto extent = adopt(item.place, std::move(item.checksums), wrong);
      if (extent == nullptr) {
        add_damage(item.place, wrong);
        damage_.back().generation = generation;
        damage_.back().extent = found.commit.extents.size();
        found.fault = std::move(wrong);
      }
      found.commit.extents.push_back(std::move(extent));
    }
    if (found.fault.empty() && has_one_twice(found)) {
      throw FormatError("two of its extents lie in the same place");
    }
  } catch (const FormatError& error) {
    // Its checksum is right, so this is not the drive's doing.
    found.fault = error.what();
    add_damage(places[0], found.fault);
  }
  return found;
}

std::vector<std::byte> CommitReader::read_table(
    Found& found, const std::vector<Place>& places) {
  std::vector<std::byte> bytes;
  std::string last;
  for (const Place& place : places) {
    std::string wrong;
    std::shared_ptr<Extent> extent;
    // A table is read once, however often a file refers to it.
    if (adopted_.contains(place.offsets)) {
      wrong = "two extents lie in the same place";
    } else {
      extent = adopt(place, {}, wrong);
    }
    if (extent == nullptr) {
      found.fault = wrong;
    } else {
      const Pages memory(extent->padded_size());
      const auto all = memory.first(extent->padded_size());
      const auto read = all.first(extent->size());
      try {
        store_.read_unchecked(extent, all).wait();
        if (checksum(read) == found.table_checksum) {
          bytes.assign(read.begin(), read.end());
        } else {
          wrong = "checksum mismatch";
        }
      } catch (const IoError& error) {
        if (!is_loss(error.error())) throw;
        wrong = error.what();
      }
    }
    found.tables.push_back(std::move(extent));
    if (wrong.empty()) continue;
    last = ": " + wrong;
    add_damage(place, "copy " + std::to_string(found.tables.size()) +
                          " of the table of step " +
                          std::to_string(found.commit.step) + last);
  }
  if (bytes.empty()) {
    found.fault = "both copies of its table are damaged" + last;
  }
  return bytes;
}

// Extents that several commits have are one. Returns null, and says why, for
// one that cannot be.
std::shared_ptr<Extent> CommitReader::adopt(
    const Place& place, std::vector<std::uint64_t> checksums,
    std::string& wrong) {
  const auto known = adopted_.find(place.offsets);
  if (known != adopted_.end()) {
    const Extent& there = *known->second;
    if (there.place() != place) {
      wrong = "two extents lie in the same place";
    } else if (!checksums.empty() && there.checksums() != checksums) {
      wrong = "two commits have other bytes in the same place";
    }
    return wrong.empty() ? known->second : nullptr;
  }
  try {
    auto extent = store_.adopt(place, std::move(checksums));
    adopted_.emplace(place.offsets, extent);
    return extent;
  } catch (const std::invalid_argument& error) {
    wrong = error.what();
    return nullptr;
  }
}

// What several drives share is named by its part on the first of them.
void CommitReader::add_damage(const Place& place, std::string what) {
  std::size_t drive = 0;
  while (drive + 1 < place.offsets.size() &&
         place.offsets[drive] == Place::kNowhere) {
    ++drive;
  }
  if (place.offsets.size() > 1) {
    what += " (its first part; the drives share it)";
  }
  damage_.push_back({.path = store_.file(drive).path(),
                     .offset = place.offsets[drive],
                     .length = place.size,
                     .what = std::move(what)});
}

}  // namespace torch_ext
