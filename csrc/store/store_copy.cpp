// How a commit becomes a store of its own, in other directories.
//
// 1. Scratch files are made there, with space for all that follows. A full
//    drive refuses here.
// 2. Each extent of the commit gets its bytes. Where the file system can, it
//    shares the blocks of the original (FICLONERANGE); else they are read,
//    checked and written.
// 3. CommitLog makes the only commit of the new store: header, table, flush,
//    root, flush. Then the files get their names, the first one last.
//
// The owner may write tiles meanwhile, since nobody writes extents of a commit.
// That is why extents are shared, and not whole files: a clone of a file would
// have roots and tiles of a moment in the midst of something. It would also
// keep all blocks of the original shared, so that each write of the next step
// needed new ones.
//
// A kill before the first link leaves nothing. A kill between the links of
// several drives leaves files without a first one. They look like a store whose
// first directory is elsewhere, so a later call leaves them alone. Where only
// some of several processes have their copies, the next call replaces those:
// if nobody uses them, and nobody has committed to them.
//
// The copy's id is not random: it follows from the original's and from the
// directories. So a later call knows a copy that it made.

#include "store_copy.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <filesystem>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "base/cut_point.h"
#include "memory/pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"

namespace torch_ext {
namespace {

/// Blocks that are on their way. Each has a block of memory.
constexpr std::size_t kInFlight = 8;

std::vector<int> weights_of(const DirectoryList& directories) {
  std::vector<int> weights;
  for (const auto& each : directories.all()) weights.push_back(each.weight);
  return weights;
}

std::string listed(const std::vector<std::uint32_t>& weights) {
  std::string text;
  for (const std::uint32_t weight : weights) {
    text += (text.empty() ? "" : ", ") + std::to_string(weight);
  }
  return text;
}

void check_division(const Store& from, const DirectoryList& to) {
  std::vector<int> wanted = weights_of(to);
  const std::vector<std::uint32_t> weights = from.weights();
  int divisor = 0;
  for (const int weight : wanted) {
    // Store says what is wrong with the others.
    if (weight > 0) divisor = std::gcd(divisor, weight);
  }
  for (int& weight : wanted) weight /= std::max(divisor, 1);
  if (std::ranges::equal(wanted, weights)) return;
  throw std::invalid_argument(
      "snapshot: the store is in " + std::to_string(weights.size()) +
      (weights.size() == 1 ? " directory" : " directories") +
      (weights.size() == 1 ? "" : " of the weights " + listed(weights)) +
      ", and its copy must be too; got " + std::to_string(wanted.size()) +
      (weights.size() == wanted.size() ? " of other weights" : ""));
}

/// Bytes that tell a directory from others.
std::string identity_of(const std::filesystem::path& directory) {
  const std::string name = absolute_path(directory);
  struct stat status;
  if (stat(name.c_str(), &status) != 0) {
    throw IoError({.op = "stat", .path = name, .error = errno});
  }
  return std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino) +
         ";";
}

StoreId id_of_copy(const StoreId& of_original, std::string place) {
  place.append(reinterpret_cast<const char*>(of_original.data()),
               of_original.size());
  std::array<std::uint64_t, 2> halves;
  for (std::uint64_t& half : halves) {
    place += "snapshot";
    half = checksum(std::as_bytes(std::span(place)));
  }
  StoreId id;
  std::memcpy(id.data(), halves.data(), id.size());
  return id;
}

/// Moves blocks from one store to another, several at a time.
class BlockMover {
 public:
  BlockMover(Store& from, Store& to)
      : from_(from),
        to_(to),
        block_(static_cast<std::size_t>(from.config().block_size)),
        memory_(kInFlight * block_) {}
  BlockMover(const BlockMover&) = delete;
  BlockMover& operator=(const BlockMover&) = delete;
  ~BlockMover() {
    for (const Slot& slot : slots_) {
      // Memory stays until nobody uses it. An error was thrown by another one,
      // or nobody asks any more.
      settle(slot.read);
      settle(slot.write);
    }
  }

  void move(const std::shared_ptr<Extent>& from,
            const std::shared_ptr<Extent>& to) {
    for (std::uint64_t at = 0; at < to->padded_size(); at += block_) {
      Slot& slot = slots_[next_ % kInFlight];
      begin_write(slot);
      end(slot);
      const std::span<std::byte> bytes =
          memory_.first(kInFlight * block_)
              .subspan(next_ % kInFlight * block_, block_);
      const auto of = [&](const Extent& extent) {
        return std::min<std::uint64_t>(block_, extent.padded_size() - at);
      };
      // Where granules differ, there may be more to write than to read.
      std::ranges::fill(bytes, std::byte{0});
      slot = {.read = from_.read(from, at, bytes.first(of(*from))),
              .reads = true,
              .to = to,
              .at = at,
              .bytes = bytes.first(of(*to))};
      ++next_;
      // A block is written when half of the others are being read.
      begin_write(slots_[(next_ + kInFlight / 2) % kInFlight]);
    }
  }

  void finish() {
    for (std::size_t i = 0; i < kInFlight; ++i) {
      begin_write(slots_[(next_ + i) % kInFlight]);
    }
    for (Slot& slot : slots_) end(slot);
  }

 private:
  struct Slot {
    Ticket read = {};
    Ticket write = {};
    bool reads = false;
    bool writes = false;
    std::shared_ptr<Extent> to = nullptr;
    std::uint64_t at = 0;
    std::span<std::byte> bytes = {};
  };

  void begin_write(Slot& slot) {
    if (!std::exchange(slot.reads, false)) return;
    slot.read.wait();
    slot.write = to_.write(slot.to, slot.at, slot.bytes);
    slot.writes = true;
  }

  static void end(Slot& slot) {
    if (std::exchange(slot.writes, false)) slot.write.wait();
  }

  static void settle(const Ticket& ticket) noexcept {
    try {
      ticket.wait();
    } catch (...) {
    }
  }

  Store& from_;
  Store& to_;
  const std::size_t block_;
  const Pages memory_;
  std::array<Slot, kInFlight> slots_;
  std::size_t next_ = 0;
};

}  // namespace

StoreCopy::StoreCopy(Store& from, const CommitLog& log, DirectoryList to,
                     const std::string& place)
    : from_(from), log_(log), to_(std::move(to)) {
  check_division(from_, to_);
  std::string all = place;
  for (const auto& each : to_.all()) all += identity_of(each.path);
  id_ = id_of_copy(log_.id(), std::move(all));
}

std::string StoreCopy::path(std::size_t directory) const {
  return absolute_path(to_.all()[directory].path /
                       log_.name().of_file(directory));
}

bool StoreCopy::is_mine(std::size_t directory) const {
  try {
    const File file = File::open(path(directory), File::Mode::kRead);
    const StoreHeader header = read_header(file);
    return header.store == id_ && header.drive == directory;
  } catch (const IoError& error) {
    // A link, a directory, a header that is damaged.
    if (is_loss(error.error()) || error.error() == ELOOP ||
        error.error() == EISDIR || error.error() == EINVAL) {
      return false;
    }
    throw;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// Returns a file that the copy must not be beside, or an empty text.
std::string StoreCopy::other_file() const {
  for (std::size_t i = 0; i < to_.all().size(); ++i) {
    if (File::exists(path(i)) && !is_mine(i)) return path(i);
  }
  const StoreName& name = log_.name();
  for (const auto& each : to_.all()) {
    for (const StoreName::File& file : name.files_in(each.path)) {
      const StoreName& other = file.store;
      const std::string found =
          absolute_path(each.path / other.of_file(file.directory));
      if (other == name) {
        const std::size_t i = file.directory;
        const bool is_seen = i < to_.all().size() &&
                             File::identify(path(i)) == File::identify(found);
        if (!is_seen) return found;
      } else if (other.world != name.world || other.epoch != name.epoch) {
        return found;
      }
    }
  }
  return "";
}

StoreCopy::There StoreCopy::there() const {
  if (!other_file().empty()) return There::kOther;
  bool any = false;
  for (std::size_t i = 0; i < to_.all().size(); ++i) {
    any = any || File::exists(path(i));
  }
  // The first one gets its name last.
  return File::exists(path(0)) ? There::kCopy
         : any                 ? There::kUnfinished
                               : There::kNothing;
}

void StoreCopy::refuse_others() const {
  const std::string other = other_file();
  if (!other.empty()) fail_taken(other);
}

void StoreCopy::fail_taken(const std::string& file) const {
  bool has_its_name = false;
  for (std::size_t i = 0; i < to_.all().size(); ++i) {
    has_its_name = has_its_name || file == path(i);
  }
  throw IoError(
      {.op = "snapshot",
       .path = file,
       .error = EEXIST,
       .detail = std::string(has_its_name
                                 ? "it is there already"
                                 : "resume() could take the store of this file "
                                   "for the snapshot") +
                 ": remove it, or give another directory"});
}

/// Whether a store has the commit that it was made with, and no other yet.
bool StoreCopy::is_unused() const {
  std::vector<std::filesystem::path> files;
  for (std::size_t i = 0; i < to_.all().size(); ++i) files.push_back(path(i));
  Store store(options_to_read(files));
  const CommitReader reader(store);
  return reader.slots().size() == 1 && reader.damage().empty();
}

void StoreCopy::make_way(bool replace) const {
  refuse_others();
  const There found = there();
  if (found == There::kNothing) return;
  if (found == There::kUnfinished) {
    std::size_t i = 0;
    while (!File::exists(path(i))) ++i;
    throw IoError({.op = "snapshot",
                   .path = path(i),
                   .error = EEXIST,
                   .detail = "the first directory has no file of this store: a "
                             "snapshot was cut off here, or that file is "
                             "elsewhere. Remove this one if nobody needs it, "
                             "or give another directory"});
  }
  if (!replace) fail_taken(path(0));
  const FileLock lock(File::open(path(0), File::Mode::kExisting));
  if (!is_unused()) fail_taken(path(0));
  for (std::size_t i = 0; i < to_.all().size(); ++i) {
    if (!File::exists(path(i))) continue;
    if (unlink(path(i).c_str()) != 0) {
      throw IoError({.op = "unlink", .path = path(i), .error = errno});
    }
    sync_directory(to_.all()[i].path);
  }
}

std::vector<std::shared_ptr<Extent>> StoreCopy::reserve(Store& store) const {
  const Commit& commit = log_.commits().back();
  std::uint64_t bytes = 0;
  // What both copies of the table take, about.
  std::uint64_t of_tables = 2 * commit.document.size();
  for (const auto& extent : commit.extents) {
    bytes += extent->padded_size();
    of_tables += 2 * 8 * (2 + store.directories() + extent->checksums().size());
  }
  store.check_room(bytes + of_tables + store.directories() * Store::kHeadBytes);
  std::vector<std::shared_ptr<Extent>> extents;
  for (const auto& extent : commit.extents) {
    extents.push_back(store.allocate_like(extent->place()));
  }
  cut_point("copy reserved");
  return extents;
}

bool StoreCopy::share(
    Store& store, const std::vector<std::shared_ptr<Extent>>& extents) const {
  const Commit& commit = log_.commits().back();
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (!store.share(*commit.extents[i], extents[i])) return false;
    cut_point("extent shared");
  }
  return true;
}

void StoreCopy::copy(
    Store& store, const std::vector<std::shared_ptr<Extent>>& extents) const {
  const Commit& commit = log_.commits().back();
  BlockMover mover(from_, store);
  for (std::size_t i = 0; i < extents.size(); ++i) {
    mover.move(commit.extents[i], extents[i]);
  }
  mover.finish();
}

void StoreCopy::take_names(const Store& store) const noexcept {
  for (std::size_t i = 0; i < to_.all().size(); ++i) {
    try {
      if (File::identify(path(i)) != store.file(i).identity()) continue;
      unlink(path(i).c_str());
      sync_directory(to_.all()[i].path);
    } catch (...) {
      // A later call says what it finds.
    }
  }
}

StoreCopy::Report StoreCopy::make(bool replace, const CommitLog::Vote& vote) {
  make_way(replace);
  const Commit& commit = log_.commits().back();
  Store store(from_.options_for(to_));
  std::vector<std::shared_ptr<Extent>> extents = reserve(store);
  Report report;
  for (const auto& extent : extents) report.bytes += extent->padded_size();
  report.reflink = share(store, extents);
  if (!report.reflink) copy(store, extents);
  cut_point("extents copied");
  bool is_known = true;
  CommitLog::Vote asked;
  if (vote) {
    asked = [&] {
      store.trim();
      is_known = false;
      const bool all = vote();
      is_known = true;
      return all;
    };
  }
  try {
    CommitLog log(store, log_.name(), id_);
    log.add(commit.step, commit.document, std::move(extents), 1,
            commit.generation, asked, commit.time);
    if (!vote) store.trim();
  } catch (...) {
    if (is_known) take_names(store);
    throw;
  }
  return report;
}

}  // namespace torch_ext
