// How a store is checked while its owner may go on with it.
//
// Everything is read once: headers, roots, both copies of each table, and each
// block of each extent. Blocks are operations of their own, several in flight,
// so that each one that is damaged has its own error. The I/O threads compare
// the checksums.
//
// When something does not fit, CommitReader::moved_on() tells whether the owner
// has made a commit meanwhile. If so, all is read again, since the owner may
// have written there. The second time, it is an error.

#include "store_check.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/cut_point.h"
#include "io/file_lock.h"
#include "memory/pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using Clock = std::chrono::steady_clock;

/// The owner has gone on, so what does not fit may be its doing.
struct MovedOn {};

constexpr auto kBetweenReports = std::chrono::milliseconds(100);
/// Blocks in flight, and the most memory for them where one does not take more.
constexpr std::size_t kInFlight = 16;
constexpr std::uint64_t kMemory = std::uint64_t{64} << 20;

class Examination {
 public:
  Examination(const std::vector<std::filesystem::path>& files,
              const StoreCheck& check)
      : check_(check), store_(options_to_read(files)), reader_(store_) {}

  /// Errors: MovedOn.
  StoreReport run() {
    report_.header = reader_.header();
    read_commits();
    report_.damage = reader_.damage();
    list_extents();
    cut_point("commits read");
    if (check_.extents) check_extents();
    if (report_.commits.empty() && report_.damage.empty()) {
      report_.damage.push_back({.path = store_.file().path(),
                                .offset = kRootOffsets[0],
                                .length = kHeaderBytes,
                                .what = "nothing was committed there"});
    }
    if (!report_.damage.empty() && reader_.moved_on()) throw MovedOn{};
    return std::move(report_);
  }

 private:
  struct Listed {
    std::uint64_t generation = 0;
    std::size_t index = 0;  ///< Among the commit's extents.
    std::shared_ptr<Extent> extent;
  };
  struct Block {
    const Listed* of = nullptr;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
  };

  // The newest commit, and what it keeps. If nothing of that one can be read,
  // the other root's: resuming would take it.
  void read_commits() {
    for (const CommitReader::Slot& slot : reader_.slots()) {
      if (slot.root.kind == StoreRoot::Kind::kTombstone) continue;
      const bool is_last = report_.commits.empty();
      report_.commits.clear();
      report_.commits = reader_.read(slot.root);
      // The last commit may have dropped those that this one keeps.
      if (!is_last) {
        report_.commits.erase(report_.commits.begin(),
                              report_.commits.end() - 1);
      }
      const auto& newest = report_.commits.back();
      if (newest.fault.empty() || !newest.commit.extents.empty()) return;
    }
  }

  // Each once. The newest commit comes first, since it matters most.
  void list_extents() {
    report_.committed = store_.directories() * Store::kHeadBytes;
    std::set<const Extent*> seen;
    const auto take = [&](const std::shared_ptr<Extent>& extent) {
      if (extent == nullptr || !seen.insert(extent.get()).second) return false;
      report_.committed += extent->padded_size();
      return true;
    };
    for (std::size_t i = report_.commits.size(); i-- > 0;) {
      const CommitReader::Found& found = report_.commits[i];
      for (const auto& copy : found.tables) take(copy);
      for (std::size_t j = 0; j < found.commit.extents.size(); ++j) {
        const std::shared_ptr<Extent>& extent = found.commit.extents[j];
        if (take(extent)) {
          listed_.push_back({found.commit.generation, j, extent});
        }
      }
    }
  }

  void check_extents() {
    const std::uint64_t block = report_.header.block_size;
    std::vector<Block> blocks;
    std::uint64_t largest = 0;
    std::uint64_t total = 0;
    for (const Listed& each : listed_) {
      const std::uint64_t padded = each.extent->padded_size();
      for (std::uint64_t at = 0; at < padded; at += block) {
        blocks.push_back({&each, at, std::min(block, padded - at)});
        largest = std::max(largest, blocks.back().length);
      }
      total += padded;
    }
    if (blocks.empty()) return;
    const std::size_t in_flight =
        std::min(blocks.size(),
                 std::clamp<std::size_t>(kMemory / largest, 1, kInFlight));
    const Pages memory(in_flight * largest);
    Reads reads(in_flight);
    Clock::time_point next = Clock::now() + kBetweenReports;
    for (std::size_t i = 0; i < blocks.size() + in_flight; ++i) {
      if (i >= in_flight) end(reads.take(i - in_flight), blocks[i - in_flight]);
      if (i < blocks.size()) {
        const std::span<std::byte> bytes =
            memory.first(in_flight * largest)
                .subspan(i % in_flight * largest, blocks[i].length);
        reads.put(i,
                  store_.read(blocks[i].of->extent, blocks[i].offset, bytes));
      }
      if (check_.progress && Clock::now() >= next) {
        check_.progress(report_.checked, total);
        next = Clock::now() + kBetweenReports;
      }
    }
    if (check_.progress) check_.progress(report_.checked, total);
  }

  /// Reads into memory that must stay until they have ended.
  class Reads {
   public:
    explicit Reads(std::size_t count) : tickets_(count) {}
    Reads(const Reads&) = delete;
    Reads& operator=(const Reads&) = delete;
    ~Reads() {
      for (const Ticket& ticket : tickets_) {
        try {
          ticket.wait();
        } catch (...) {  // It has ended, which is all that counts.
        }
      }
    }
    void put(std::size_t number, Ticket ticket) {
      tickets_[number % tickets_.size()] = std::move(ticket);
    }
    const Ticket& take(std::size_t number) const {
      return tickets_[number % tickets_.size()];
    }

   private:
    std::vector<Ticket> tickets_;
  };

  void end(const Ticket& ticket, const Block& block) {
    report_.checked += block.length;
    try {
      ticket.wait();
    } catch (const IoError& error) {
      const IoFailure& failure = error.failure();
      if (!is_loss(failure.error)) throw;
      if (reader_.moved_on()) throw MovedOn{};
      add({.path = failure.path,
           .offset = failure.offset.value_or(0),
           .length = failure.length.value_or(block.length),
           .what = failure.detail.empty() ? errno_name(failure.error)
                                          : failure.detail,
           .generation = block.of->generation,
           .extent = block.of->index,
           .extent_offset = block.offset});
    }
  }

  // Neighbours are one.
  void add(StoreDamage damage) {
    if (!report_.damage.empty()) {
      StoreDamage& last = report_.damage.back();
      if (last.generation == damage.generation &&
          last.extent == damage.extent && last.path == damage.path &&
          last.what == damage.what &&
          last.offset + last.length == damage.offset &&
          last.extent_offset + last.length == damage.extent_offset) {
        last.length += damage.length;
        return;
      }
    }
    report_.damage.push_back(std::move(damage));
  }

  const StoreCheck& check_;
  StoreReport report_;
  Store store_;
  CommitReader reader_;
  std::vector<Listed> listed_;
};

}  // namespace

StoreReport read_store(const std::vector<std::filesystem::path>& files,
                       const StoreCheck& check) {
  if (files.empty())
    throw std::invalid_argument("read_store: no file is given");
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      return Examination(files, check).run();
    } catch (const MovedOn&) {
    }
  }
  throw IoError({.op = "read commit",
                 .path = absolute_path(files[0]),
                 .error = EBUSY,
                 .detail = "the store's owner has made commits twice while it "
                           "was read, so that nothing can be said; try again "
                           "while there are fewer commits"});
}

void remove_store(const std::vector<std::filesystem::path>& files,
                  const StoreId& store) {
  std::vector<File> open;
  for (const std::filesystem::path& path : files) {
    open.push_back(File::open(path, File::Mode::kRead));
  }
  FileLock lock;
  for (const File& file : open) {
    const StoreHeader header = read_header(file);
    if (header.store != store) {
      throw std::invalid_argument(file.path() + ": it is not of this store");
    }
    if (header.drive == 0) lock = FileLock(file);
  }
  for (const File& file : open) {
    if (File::identify(file.path()) != file.identity()) {
      throw IoError({.op = "remove",
                     .path = file.path(),
                     .error = ESTALE,
                     .detail = "another file has taken its name"});
    }
    if (unlink(file.path().c_str()) != 0) {
      throw IoError({.op = "unlink", .path = file.path(), .error = errno});
    }
    sync_directory(std::filesystem::path(file.path()).parent_path());
  }
}

}  // namespace torch_ext
