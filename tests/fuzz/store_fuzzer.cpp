// What a store's file has beside its extents. The first byte of an input says
// whether the others are a header, a root or a table, and the second one how
// many drives there are. Whoever makes such a file can make its checksums
// right, so they are made right here too.

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "store/store_format.h"
#include "targets.h"
#include "torch_ext/base/checksum.h"

namespace {

using namespace torch_ext;
using fuzz::check;

std::vector<std::byte> sealed(std::span<const std::byte> content) {
  std::vector<std::byte> block(kHeaderBytes);
  const std::size_t most = kHeaderBytes - sizeof(std::uint64_t);
  std::copy_n(content.begin(), std::min(content.size(), most), block.begin());
  const std::uint64_t sum = checksum(std::span(block).first(most));
  std::memcpy(block.data() + most, &sum, sizeof(sum));
  return block;
}

/// The id that a root or table says it has.
StoreId id_in(std::span<const std::byte> content) {
  StoreId id = {};
  if (content.size() >= 24) std::memcpy(id.data(), content.data() + 8, 16);
  return id;
}

bool try_header(std::span<const std::byte> content) {
  const StoreHeader header = decode_header(sealed(content));
  check(header.drive < header.weights.size() && header.rank < header.world);
  check(decode_header(encode(header)) == header);
  return true;
}

bool try_root(std::span<const std::byte> content, std::size_t drives) {
  const StoreId id = id_in(content);
  const auto root = decode_root(sealed(content), id, drives);
  if (!root) return false;
  const bool tombstone = root->kind == StoreRoot::Kind::kTombstone;
  check(root->tables.size() == (tombstone ? 0 : 2));
  for (const Place& table : root->tables) check(table.offsets.size() == drives);
  check(decode_root(encode(*root), id, drives) == *root);
  return true;
}

bool try_table(std::span<const std::byte> content, std::size_t drives) {
  const auto blocks_of = [](std::uint64_t bytes) { return (bytes + 99) / 100; };
  const CommitTable table =
      decode_table(content, id_in(content), drives, blocks_of);
  for (const CommitTable::Item& item : table.extents) {
    check(item.checksums.size() == blocks_of(item.place.size));
  }
  // Every byte of a table means something.
  check(std::ranges::equal(encode(table), content));
  return true;
}

}  // namespace

bool fuzz_store(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return false;
  const std::size_t drives = 1 + data[1] % kMostDrives;
  const auto content = std::as_bytes(std::span(data, size)).subspan(2);
  try {
    switch (data[0] % 3) {
      case 0:
        return try_header(content);
      case 1:
        return try_root(content, drives);
      default:
        return try_table(content, drives);
    }
  } catch (const FormatError& error) {
    const std::string_view text = error.what();
    check(!text.empty() && text.size() <= fuzz::kLongestMessage);
    return false;
  }
}
