#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_ext/store/store.h"

// What a store that outlives its process writes beside its extents.
// docs/file_format.md describes the same bytes for other readers.
//
//   0          header, never written again
//   64 KiB     root 0, in the first directory's file only
//   128 KiB    root 1, likewise
//   1 MiB on   extents
//
// A root is the last word about a generation: it says where the commit's table
// lies. The table lists the extents. All numbers are little-endian.
namespace torch_ext {

using StoreId = std::array<std::byte, 16>;

/// A file that is not what it should be, in words.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that once was what it should be.
class DamagedError : public FormatError {
 public:
  using FormatError::FormatError;
};

/// Where things are in the head of a file, in bytes.
inline constexpr std::size_t kHeaderBytes = 4096;
inline constexpr std::uint64_t kRootOffsets[] = {std::uint64_t{64} << 10,
                                                 std::uint64_t{128} << 10};
inline constexpr std::size_t kMostDrives = 64;

struct StoreHeader {
  StoreId store = {};  ///< The same in all files of a store.
  StoreId run = {};    ///< The same in the stores of all ranks.
  std::uint32_t drive = 0;
  std::uint32_t rank = 0;
  std::uint32_t world = 1;
  std::uint32_t epoch = 0;
  std::uint64_t granule = 0;
  std::uint64_t block_size = 0;
  std::vector<std::uint32_t> weights = {};  ///< One for each drive.
  bool operator==(const StoreHeader&) const = default;
};

struct StoreRoot {
  enum class Kind : std::uint32_t { kCommit = 1, kTombstone = 2 };
  StoreId store = {};
  Kind kind = Kind::kCommit;
  std::uint64_t generation = 0;
  std::uint64_t step = 0;
  std::uint64_t table_checksum = 0;
  /// Two copies of the table; none for a tombstone.
  std::vector<Place> tables = {};
  bool operator==(const StoreRoot&) const = default;
};

struct CommitTable {
  /// An earlier commit that is kept.
  struct Earlier {
    std::uint64_t generation = 0;
    std::uint64_t step = 0;
    std::uint64_t table_checksum = 0;
    std::vector<Place> tables = {};
    bool operator==(const Earlier&) const = default;
  };
  struct Item {
    Place place;
    std::vector<std::uint64_t> checksums;
    bool operator==(const Item&) const = default;
  };
  StoreId store = {};
  std::uint64_t generation = 0;
  std::uint64_t step = 0;
  std::int64_t time = 0;  ///< Seconds since 1970.
  std::vector<Earlier> earlier = {};
  std::string document = {};  ///< What the extents mean: its writer's.
  std::vector<Item> extents = {};
  bool operator==(const CommitTable&) const = default;
};

/// These have kHeaderBytes bytes. Errors: FormatError (more than kMostDrives).
std::vector<std::byte> encode(const StoreHeader& header);
std::vector<std::byte> encode(const StoreRoot& root);
/// This has any length.
std::vector<std::byte> encode(const CommitTable& table);

bool begins_as_header(std::span<const std::byte> bytes);
/// Errors: FormatError that says what is wrong. Nothing is allocated that is
/// larger than `bytes`.
StoreHeader decode_header(std::span<const std::byte> bytes);
/// Null if no root of this store is there: none was written, or not all of it.
std::optional<StoreRoot> decode_root(std::span<const std::byte> bytes,
                                     const StoreId& store, std::size_t drives);
/// `blocks_of`: how many checksums an extent has.
CommitTable decode_table(
    std::span<const std::byte> bytes, const StoreId& store, std::size_t drives,
    const std::function<std::uint64_t(std::uint64_t)>& blocks_of);

}  // namespace torch_ext
