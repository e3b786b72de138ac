#include "store_format.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

#include "torch_ext/base/checksum.h"

namespace torch_ext {
namespace {

static_assert(std::endian::native == std::endian::little,
              "files are little-endian, and so is memory here");

// Eight characters each.
constexpr std::string_view kHeaderMagic = "txSTORE\n";
constexpr std::string_view kRootMagic = "txROOT \n";
constexpr std::string_view kTableMagic = "txTABLE\n";
/// The format's version, and the least one that a reader must know.
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kReaderVersion = 1;

class Writer {
 public:
  template <typename T>
  void number(T value) {
    static_assert(std::is_arithmetic_v<T>);
    raw(std::as_bytes(std::span(&value, 1)));
  }
  void raw(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  void text(std::string_view text) { raw(std::as_bytes(std::span(text))); }
  void place(const Place& place) {
    number(place.size);
    number(place.first_slot);
    for (const std::uint64_t offset : place.offsets) number(offset);
  }
  /// Zeros up to `bytes`, and there the checksum of all before.
  std::vector<std::byte> sealed(std::size_t bytes) {
    if (bytes_.size() > bytes - sizeof(std::uint64_t)) {
      throw FormatError("too many directories");
    }
    bytes_.resize(bytes - sizeof(std::uint64_t));
    number(checksum(bytes_));
    return std::move(bytes_);
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : left_(bytes) {}

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, raw(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::span<const std::byte> raw(std::uint64_t bytes) {
    if (bytes > left_.size()) throw FormatError("it ends too early");
    const auto taken = left_.first(bytes);
    left_ = left_.subspan(bytes);
    return taken;
  }
  std::string text(std::uint64_t bytes) {
    const auto taken = raw(bytes);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  Place place(std::size_t drives) {
    Place place;
    place.size = number<std::uint64_t>();
    place.first_slot = number<std::uint64_t>();
    for (std::size_t i = 0; i < drives; ++i) {
      place.offsets.push_back(number<std::uint64_t>());
    }
    return place;
  }
  /// A count of things that take `bytes` bytes each at least.
  std::uint64_t count(std::size_t bytes) {
    const auto count = number<std::uint64_t>();
    if (count > left_.size() / bytes) throw FormatError("it ends too early");
    return count;
  }
  StoreId id() {
    StoreId id;
    std::memcpy(id.data(), raw(id.size()).data(), id.size());
    return id;
  }
  bool at_end() const { return left_.empty(); }

 private:
  std::span<const std::byte> left_;
};

bool is_sealed(std::span<const std::byte> bytes) {
  std::uint64_t sum;
  const std::size_t at = bytes.size() - sizeof(sum);
  std::memcpy(&sum, bytes.data() + at, sizeof(sum));
  return sum == checksum(bytes.first(at));
}

void put_tables(Writer& out, std::uint64_t sum,
                const std::vector<Place>& tables) {
  out.number(sum);
  for (const Place& table : tables) out.place(table);
}

std::vector<Place> get_tables(Reader& in, std::size_t drives) {
  std::vector<Place> tables;
  for (int copy = 0; copy < 2; ++copy) tables.push_back(in.place(drives));
  return tables;
}

std::size_t bytes_of_place(std::size_t drives) {
  return (2 + drives) * sizeof(std::uint64_t);
}

}  // namespace

std::vector<std::byte> encode(const StoreHeader& header) {
  if (header.weights.size() > kMostDrives) {
    throw FormatError("a store that outlives its process has at most " +
                      std::to_string(kMostDrives) + " directories");
  }
  Writer out;
  out.text(kHeaderMagic);
  out.number(kVersion);
  out.number(kReaderVersion);
  out.raw(header.store);
  out.raw(header.run);
  for (const std::uint32_t number :
       {header.drive, static_cast<std::uint32_t>(header.weights.size()),
        header.rank, header.world, header.epoch, std::uint32_t{0}}) {
    out.number(number);
  }
  out.number(header.granule);
  out.number(header.block_size);
  for (const std::uint32_t weight : header.weights) out.number(weight);
  return out.sealed(kHeaderBytes);
}

bool begins_as_header(std::span<const std::byte> bytes) {
  return bytes.size() >= kHeaderMagic.size() &&
         std::memcmp(bytes.data(), kHeaderMagic.data(), kHeaderMagic.size()) ==
             0;
}

StoreHeader decode_header(std::span<const std::byte> bytes) {
  if (!begins_as_header(bytes)) {
    throw FormatError("it is not a store of torch_ext");
  }
  Reader in(bytes.first(std::min(bytes.size(), kHeaderBytes)));
  in.raw(kHeaderMagic.size());
  const auto version = in.number<std::uint32_t>();
  const auto reader = in.number<std::uint32_t>();
  if (reader > kVersion) {
    throw FormatError("it has version " + std::to_string(version) +
                      " of the format, and needs a reader of version " +
                      std::to_string(reader) + "; this one knows version " +
                      std::to_string(kVersion));
  }
  if (bytes.size() < kHeaderBytes || !is_sealed(bytes.first(kHeaderBytes))) {
    throw DamagedError("its header is damaged");
  }
  StoreHeader header;
  header.store = in.id();
  header.run = in.id();
  header.drive = in.number<std::uint32_t>();
  const auto drives = in.number<std::uint32_t>();
  header.rank = in.number<std::uint32_t>();
  header.world = in.number<std::uint32_t>();
  header.epoch = in.number<std::uint32_t>();
  in.number<std::uint32_t>();
  header.granule = in.number<std::uint64_t>();
  header.block_size = in.number<std::uint64_t>();
  if (drives == 0 || drives > kMostDrives || header.drive >= drives ||
      header.rank >= header.world) {
    throw DamagedError("its header contradicts itself");
  }
  for (std::uint32_t i = 0; i < drives; ++i) {
    header.weights.push_back(in.number<std::uint32_t>());
  }
  return header;
}

std::vector<std::byte> encode(const StoreRoot& root) {
  Writer out;
  out.text(kRootMagic);
  out.raw(root.store);
  out.number(static_cast<std::uint32_t>(root.kind));
  out.number(std::uint32_t{0});
  out.number(root.generation);
  out.number(root.step);
  put_tables(out, root.table_checksum, root.tables);
  return out.sealed(kHeaderBytes);
}

std::optional<StoreRoot> decode_root(std::span<const std::byte> bytes,
                                     const StoreId& store, std::size_t drives) {
  if (bytes.size() < kHeaderBytes || !is_sealed(bytes.first(kHeaderBytes))) {
    return std::nullopt;
  }
  Reader in(bytes.first(kHeaderBytes));
  StoreRoot root;
  if (in.text(kRootMagic.size()) != kRootMagic) return std::nullopt;
  root.store = in.id();
  if (root.store != store) return std::nullopt;
  root.kind = static_cast<StoreRoot::Kind>(in.number<std::uint32_t>());
  in.number<std::uint32_t>();
  root.generation = in.number<std::uint64_t>();
  // Nobody has counted that far, and there would be none after it.
  if (root.generation == ~std::uint64_t{0}) return std::nullopt;
  root.step = in.number<std::uint64_t>();
  root.table_checksum = in.number<std::uint64_t>();
  if (root.kind == StoreRoot::Kind::kTombstone) return root;
  if (root.kind != StoreRoot::Kind::kCommit) return std::nullopt;
  root.tables = get_tables(in, drives);
  return root;
}

std::vector<std::byte> encode(const CommitTable& table) {
  Writer out;
  out.text(kTableMagic);
  out.raw(table.store);
  out.number(table.generation);
  out.number(table.step);
  out.number(table.time);
  out.number(std::uint64_t{table.earlier.size()});
  out.number(std::uint64_t{table.document.size()});
  out.number(std::uint64_t{table.extents.size()});
  for (const CommitTable::Earlier& earlier : table.earlier) {
    out.number(earlier.generation);
    out.number(earlier.step);
    put_tables(out, earlier.table_checksum, earlier.tables);
  }
  out.text(table.document);
  for (const CommitTable::Item& item : table.extents) {
    out.place(item.place);
    out.raw(std::as_bytes(std::span(item.checksums)));
  }
  return out.take();
}

CommitTable decode_table(
    std::span<const std::byte> bytes, const StoreId& store, std::size_t drives,
    const std::function<std::uint64_t(std::uint64_t)>& blocks_of) {
  Reader in(bytes);
  if (in.text(kTableMagic.size()) != kTableMagic) {
    throw FormatError("it is no table of a commit");
  }
  CommitTable table;
  table.store = in.id();
  if (table.store != store) throw FormatError("it is another store's");
  table.generation = in.number<std::uint64_t>();
  table.step = in.number<std::uint64_t>();
  table.time = in.number<std::int64_t>();
  const std::uint64_t earlier = in.count(24 + 2 * bytes_of_place(drives));
  const std::uint64_t document = in.count(1);
  const std::uint64_t extents = in.count(bytes_of_place(drives));
  for (std::uint64_t i = 0; i < earlier; ++i) {
    CommitTable::Earlier& each = table.earlier.emplace_back();
    each.generation = in.number<std::uint64_t>();
    each.step = in.number<std::uint64_t>();
    each.table_checksum = in.number<std::uint64_t>();
    each.tables = get_tables(in, drives);
  }
  table.document = in.text(document);
  for (std::uint64_t i = 0; i < extents; ++i) {
    CommitTable::Item& item = table.extents.emplace_back();
    item.place = in.place(drives);
    if (item.place.size > std::uint64_t{1} << 62) {
      throw FormatError("an extent is too large");
    }
    const std::uint64_t blocks = blocks_of(item.place.size);
    const auto sums =
        in.raw(blocks > bytes.size() ? bytes.size() + 1 : blocks * 8);
    item.checksums.resize(blocks);
    std::ranges::copy(
        sums, std::as_writable_bytes(std::span(item.checksums)).begin());
  }
  if (!in.at_end()) throw FormatError("it does not end where it should");
  return table;
}

}  // namespace torch_ext
