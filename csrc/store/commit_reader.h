#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store_format.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// A point to which a store can go back: extents that nobody writes, and a text
/// that says what they are.
struct Commit {
  std::uint64_t generation = 0;
  std::uint64_t step = 0;
  std::int64_t time = 0;  ///< Seconds since 1970.
  std::string document;
  std::vector<std::shared_ptr<Extent>> extents;
};

/// Bytes of a store that are not what they should be.
struct StoreDamage {
  std::string path;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::string what;
  /// The generation of the commit to whose extents they belong. 0: to none.
  std::uint64_t generation = 0;
  std::size_t extent = 0;           ///< Its index in the commit.
  std::uint64_t extent_offset = 0;  ///< Where they begin in the extent.
};

/// Whether a read that failed with this errno says that the bytes are lost, and
/// not that the machine could not read now.
bool is_loss(int error) noexcept;

/// Whether a file begins as those of stores do, whatever follows. Errors:
/// IoError.
bool is_store(const File& file);

/// Reads the header of a file, or of a directory's file in a store. Errors:
/// IoError (EIO if it is damaged); std::invalid_argument if the file is no
/// store of ours, or of a later version. A store's file must have a whole head.
StoreHeader read_header(const File& file);
StoreHeader read_header(Store& store, std::size_t directory = 0);

/// Says that a store is in so many directories, that others were given, and
/// what may be meant.
std::string other_directories(std::size_t has, std::size_t given);

/// How to open a store's files for reading. `files`: in the order of its
/// drives. Errors: those of read_header(); std::invalid_argument if they are
/// others.
StoreOptions options_to_read(const std::vector<std::filesystem::path>& files);

/// Reads the commits in a store's files. It takes no lock and writes nothing,
/// so an owner may go on with the files: see moved_on().
/// Threads: one at a time. The store must outlive the object.
class CommitReader {
 public:
  /// Reads the headers and the roots. Errors: those of read_header();
  /// std::invalid_argument if the files are not of one store, or the store was
  /// made in another way.
  explicit CommitReader(Store& store);

  const StoreHeader& header() const noexcept { return header_; }

  /// A valid root, and which of the two it is.
  struct Slot {
    std::size_t number = 0;
    StoreRoot root;
  };
  /// The one with the highest generation first.
  const std::vector<Slot>& slots() const noexcept { return slots_; }

  /// A commit, with the space of its extents taken in the store.
  struct Found {
    Commit commit;
    std::uint64_t table_checksum = 0;
    std::vector<std::shared_ptr<Extent>> tables;  ///< Two copies.
    /// Why nobody can go back to it; empty if nothing says so. Then there may
    /// be no document, and nulls for extents and tables.
    std::string fault;
  };
  /// Reads the commit of a root, and those before it that it keeps. They come
  /// in the order in which they go, that of the root last. It does not read
  /// extents. What is wrong with the commits is in `fault` and in damage().
  /// REQUIRES: nothing is left of an earlier call.
  /// Errors: IoError if the machine cannot read.
  std::vector<Found> read(const StoreRoot& root);

  /// What was wrong so far: with roots, with copies of tables, and with places.
  const std::vector<StoreDamage>& damage() const noexcept { return damage_; }

  /// Whether the roots or the sizes of the files are no longer what they were.
  /// Then an owner has gone on, and may have written where the commits lie that
  /// were read. If it has not, bytes that do not fit are damage. Errors:
  /// IoError.
  bool moved_on() const;

 private:
  void read_headers();
  std::vector<std::byte> read_root(std::size_t number) const;
  std::uint64_t size_of_files() const;
  Found read_commit(std::uint64_t generation, std::uint64_t step,
                    std::uint64_t sum, const std::vector<Place>& places,
                    std::vector<CommitTable::Earlier>& earlier);
  std::vector<std::byte> read_table(Found& found,
                                    const std::vector<Place>& places);
  std::shared_ptr<Extent> adopt(const Place& place,
                                std::vector<std::uint64_t> checksums,
                                std::string& wrong);
  void add_damage(const Place& place, std::string what);

  Store& store_;
  StoreHeader header_;
  std::uint64_t size_ = 0;                     ///< The sum of the files' sizes.
  std::vector<std::vector<std::byte>> roots_;  ///< As they were read.
  std::vector<Slot> slots_;
  std::vector<StoreDamage> damage_;
  /// By place, while commits are read.
  std::map<std::vector<std::uint64_t>, std::shared_ptr<Extent>> adopted_;
};

}  // namespace torch_ext
