// Stores that were committed, and then damaged. Whatever is changed, what is
// opened is a whole commit that was acknowledged, with a note where it is not
// the last one; or an error says what is wrong. Nothing is allocated that is
// larger than the file.
//
// The file's bytes are kept in memory, so that many changes can be tried.

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "store/commit_log.h"
#include "store/store_format.h"
#include "support/aligned_buffer.h"
#include "support/commit_training.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"
#include "torch_ext/store/store.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kTile = 2 * kBlock;
constexpr std::size_t kTiles = 6;
constexpr std::uint64_t kRoots[] = {64 << 10, 128 << 10};
constexpr std::uint64_t kExtents = 1 << 20;

/// The bytes of a file, up to where only zeros follow.
using Image = std::vector<std::byte>;

/// Reads and writes the image of a file, and not the file.
class ImageEngine final : public IoEngine {
 public:
  /// Reads at `unreadable` fail.
  ImageEngine(Image& image, const std::uint64_t& size,
              const std::uint64_t& unreadable, int depth)
      : image_(image),
        size_(size),
        unreadable_(unreadable),
        depth_(static_cast<std::size_t>(depth)) {}
  std::string_view name() const noexcept override { return "memory"; }
  std::size_t depth() const noexcept override { return depth_; }
  std::size_t submit(std::span<const IoRequest> batch) override {
    batch = batch.first(std::min(batch.size(), depth_ - done_.size()));
    for (const IoRequest& request : batch) {
      done_.push_back({request.cookie, carry_out(request)});
    }
    return batch.size();
  }
  std::size_t poll(std::span<IoCompletion> out, std::size_t,
                   std::chrono::nanoseconds) override {
    const std::size_t count = std::min(out.size(), done_.size());
    std::copy_n(done_.begin(), count, out.begin());
    done_.erase(done_.begin(),
                done_.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }
  void wake() noexcept override {}

 private:
  std::int64_t carry_out(const IoRequest& request) {
    if (request.op == IoRequest::Op::kSync) return 0;
    const bool read = request.op == IoRequest::Op::kRead;
    if (read && request.offset == unreadable_) return -EIO;
    const std::uint64_t end = request.offset + request.length;
    if (!read && end > image_.size()) image_.resize(end);
    const std::uint64_t limit = read ? std::min(end, size_) : end;
    if (request.offset >= limit) return 0;
    for (std::uint64_t at = request.offset; at < limit;) {
      const std::uint64_t there = std::max<std::uint64_t>(image_.size(), at);
      const std::size_t count = std::min(limit, there) - at;
      std::byte* const memory = request.data + (at - request.offset);
      if (count == 0) {
        std::memset(memory, 0, limit - at);
        break;
      }
      if (read) {
        std::memcpy(memory, image_.data() + at, count);
      } else {
        std::memcpy(image_.data() + at, memory, count);
      }
      at += count;
    }
    return static_cast<std::int64_t>(limit - request.offset);
  }

  Image& image_;
  const std::uint64_t& size_;
  const std::uint64_t& unreadable_;
  const std::size_t depth_;
  std::vector<IoCompletion> done_;
};

/// What a commit held when it was acknowledged.
struct Acknowledged {
  std::uint64_t generation = 0;
  std::uint64_t step = 0;
  std::vector<Place> places;
  std::vector<std::vector<std::uint64_t>> checksums;
};

std::uint64_t pattern_of(std::uint64_t step, std::size_t tile) {
  return step * 1000 + tile;
}

StoreOptions options_for(const std::filesystem::path& directory) {
  StoreOptions options{.directory = directory};
  options.aio.block_size = kBlock;
  options.aio.queue_depth = 4;
  options.aio.thread_count = 1;
  options.engine = "threads";
  return options;
}

/// A store after some steps and commits, in memory. A test changes `image`.
class Victim {
 public:
  /// 'c': step and commit, 'k': the same and keep two, 's': step.
  explicit Victim(const std::string& history) {
    {
      Store store(options_for(dir_.path()));
      CommitLog log(store, StoreName());
      std::vector<std::shared_ptr<Extent>> tiles(kTiles);
      std::uint64_t step = 0;
      for (const char what : history) {
        ++step;
        for (std::size_t i = 0; i < kTiles; ++i) {
          // What no commit has is written again, as an optimizer does it.
          const auto has = [&](const Commit& commit) {
            return std::ranges::count(commit.extents, tiles[i]) > 0;
          };
          if (tiles[i] == nullptr || std::ranges::any_of(log.commits(), has)) {
            tiles[i] = store.allocate(kTile);
          }
          AlignedBuffer bytes(kTile);
          test::fill_pattern(bytes.bytes(), pattern_of(step, i));
          store.write(tiles[i], 0, bytes.bytes()).wait();
        }
        if (what == 's') continue;
        log.add(step, document(step), tiles, what == 'k' ? 2 : 1);
        Acknowledged& last = commits_.emplace_back();
        last.generation = log.commits().back().generation;
        last.step = step;
        for (const auto& tile : tiles) {
          last.places.push_back(tile->place());
          last.checksums.push_back(tile->checksums());
        }
      }
    }
    size_ = std::filesystem::file_size(file());
    std::ifstream stream(file(), std::ios::binary);
    image.resize(size_);
    stream.read(reinterpret_cast<char*>(image.data()),
                static_cast<std::streamsize>(size_));
    while (image.back() == std::byte{0}) image.pop_back();
    image.resize((image.size() + kBlock - 1) / kBlock * kBlock);
    open_store();
  }

  /// What came of opening it.
  struct Outcome {
    std::uint64_t step = 0;  ///< 0: it was refused.
    std::string wrong;       ///< What must not be.
    std::string error;
  };

  Outcome open() {
    Outcome outcome;
    std::unique_ptr<CommitLog> log;
    try {
      log = CommitLog::open(*store_, StoreName());
    } catch (const IoError& error) {
      outcome.error = error.what();
      if (error.error() != EIO || error.failure().path.empty()) {
        outcome.wrong = error.what();
      }
    } catch (const std::invalid_argument& error) {
      outcome.error = error.what();
    } catch (const std::exception& error) {
      outcome.wrong = std::string("another error: ") + error.what();
    }
    if (log != nullptr) {
      outcome.step = log->commits().back().step;
      outcome.wrong = judge(*log);
    } else if (outcome.error.size() < 20 && outcome.wrong.empty()) {
      outcome.wrong = "an error that says nothing: " + outcome.error;
    }
    return outcome;
  }

  /// Cuts the file.
  void resize(std::uint64_t size) {
    store_.reset();
    std::filesystem::resize_file(file(), size);
    size_ = size;
    open_store();
  }

  /// The newest commit's root, and the other slot's.
  std::size_t newest_slot() const {
    return root(0).generation > root(1).generation ? 0 : 1;
  }
  StoreRoot root(std::size_t slot) const {
    const auto id = decode_header(at(0)).store;
    const auto found = decode_root(at(kRoots[slot]), id, 1);
    return found ? *found : StoreRoot();
  }
  std::span<const std::byte> at(std::uint64_t offset,
                                std::size_t length = kBlock) const {
    return std::span(image).subspan(offset, length);
  }
  const std::vector<Acknowledged>& commits() const { return commits_; }
  const Acknowledged& last() const { return commits_.back(); }
  std::uint64_t size() const { return size_; }
  Store& store() { return *store_; }

  Image image;
  std::uint64_t unreadable = ~std::uint64_t{0};  ///< An offset.

 private:
  static std::string document(std::uint64_t step) {
    return "what step " + std::to_string(step) + " was";
  }
  std::filesystem::path file() const {
    return dir_.path() / StoreName().of_file(0);
  }
  void open_store() {
    StoreOptions options = options_for(dir_.path());
    options.files = {StoreName().of_file(0)};
    options.engine_factory = [this](int depth) {
      return std::make_unique<ImageEngine>(image, size_, unreadable, depth);
    };
    store_ = std::make_unique<Store>(options);
  }

  /// A commit that was opened must be one that was acknowledged, to the bit.
  std::string judge(CommitLog& log) {
    const Commit& found = log.commits().back();
    const auto known = std::ranges::find(commits_, found.generation,
                                         &Acknowledged::generation);
    if (known == commits_.end()) return "no such commit was made";
    std::vector<Place> places;
    std::vector<std::vector<std::uint64_t>> checksums;
    for (const auto& extent : found.extents) {
      places.push_back(extent->place());
      checksums.push_back(extent->checksums());
    }
    if (found.step != known->step || found.document != document(found.step) ||
        places != known->places || checksums != known->checksums) {
      return "the commit of step " + std::to_string(known->step) +
             " is not as it was";
    }
    if (found.step == last().step) return "";
    if (log.notes().empty()) return "an earlier commit, and no note";
    for (std::size_t i = 0; i < kTiles; ++i) {
      AlignedBuffer bytes(kTile);
      try {
        store_->read(found.extents[i], 0, bytes.bytes()).wait();
      } catch (const IoError& error) {
        return std::string("it was opened: ") + error.what();
      }
      if (!test::holds_pattern(bytes.bytes(), pattern_of(found.step, i))) {
        return "tile " + std::to_string(i) + " has other bytes";
      }
    }
    return "";
  }

  test::TempDir dir_;
  std::vector<Acknowledged> commits_;
  std::uint64_t size_ = 0;
  std::unique_ptr<Store> store_;
};

/// While it lives, this process gets hardly more memory than it has, so that a
/// number from a file that is taken for a size is noticed.
class LittleMemory {
 public:
  LittleMemory() {
    getrlimit(RLIMIT_AS, &before_);
    if (test::kSanitized) return;
    std::ifstream statm("/proc/self/statm");
    std::uint64_t pages = 0;
    statm >> pages;
    rlimit less = before_;
    less.rlim_cur =
        std::min<rlim_t>(pages * 4096 + (128 << 20), before_.rlim_cur);
    setrlimit(RLIMIT_AS, &less);
  }
  LittleMemory(const LittleMemory&) = delete;
  LittleMemory& operator=(const LittleMemory&) = delete;
  ~LittleMemory() { setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_ = {};
};

std::byte bit_of(std::uint64_t bit) { return std::byte(1 << bit % 8); }

TEST(CommitDamageFaults, NoChangedBitIsTakenForSomethingElse) {
  std::size_t tried = 0;
  std::size_t last = 0;
  std::size_t earlier = 0;
  // The commit before the last: whole, written over, kept.
  for (const char* history : {"cc", "ccs", "kk"}) {
    Victim victim(history);
    const LittleMemory little;
    ASSERT_EQ(victim.open().step, victim.last().step);
    std::vector<std::uint64_t> bits;
    const auto add = [&](std::uint64_t begin, std::uint64_t end,
                         std::uint64_t stride) {
      for (std::uint64_t bit = begin * 8; bit < end * 8; bit += stride) {
        bits.push_back(bit);
      }
    };
    const std::uint64_t stride = test::all_faults() ? 1
                                 : test::kSanitized ? 211
                                                    : 211;
    // Those that mean something are all tried once.
    const bool all = test::all_faults() || history == std::string("cc");
    for (const std::uint64_t begin : {std::uint64_t{0}, kRoots[0], kRoots[1]}) {
      add(begin, begin + 128, test::kSanitized ? 11 : all ? 1 : 11);
      add(begin + 128, begin + kBlock - 8, stride);
      add(begin + kBlock - 8, begin + kBlock, 1);
    }
    for (const std::size_t slot : {0u, 1u}) {
      for (const Place& place : victim.root(slot).tables) {
        add(place.offsets[0], place.offsets[0] + place.size,
            test::all_faults() ? 1 : 11);
      }
    }
    for (const std::uint64_t bit : bits) {
      victim.image[bit / 8] ^= bit_of(bit);
      const Victim::Outcome outcome = victim.open();
      victim.image[bit / 8] ^= bit_of(bit);
      ASSERT_EQ(outcome.wrong, "") << history << ", bit " << bit;
      ++tried;
      if (outcome.step == victim.last().step) ++last;
      if (outcome.step != 0 && outcome.step < victim.last().step) ++earlier;
    }
    ASSERT_EQ(victim.open().step, victim.last().step);
  }
  std::printf(
      "[  FAULTS  ] %zu bits changed: %zu times the last commit was found, %zu "
      "times the one before, else an error\n",
      tried, last, earlier);
  EXPECT_GT(last, 0u);
  EXPECT_GT(earlier, 0u);
  EXPECT_LT(last + earlier, tried);
}

TEST(CommitDamageFaults, AChangedBitOfATileIsSeenWhenItIsRead) {
  Victim victim("c");
  const auto log = CommitLog::open(victim.store(), StoreName());
  const std::uint64_t stride = test::all_faults() ? 1 : 1009;
  std::size_t tried = 0;
  for (const auto& extent : log->commits().back().extents) {
    AlignedBuffer bytes(kTile);
    for (std::uint64_t bit = 0; bit < kTile * 8; bit += stride) {
      std::byte& changed = victim.image[extent->offset() + bit / 8];
      changed ^= bit_of(bit);
      try {
        victim.store().read(extent, 0, bytes.bytes()).wait();
        FAIL() << "bit " << bit;
      } catch (const IoError& error) {
        ASSERT_EQ(error.error(), EIO);
        ASSERT_EQ(error.failure().offset,
                  extent->offset() + bit / 8 / kBlock * kBlock);
      }
      changed ^= bit_of(bit);
      ++tried;
    }
  }
  std::printf("[  FAULTS  ] %zu bits of tiles changed\n", tried);
}

TEST(CommitDamageFaults, AFileOfAnyLengthIsWholeOrRefused) {
  Victim victim("cc");
  std::uint64_t needed = kExtents;
  for (const Place& place : victim.last().places) {
    needed = std::max(needed, place.offsets[0] + kTile);
  }
  for (const Place& place : victim.root(victim.newest_slot()).tables) {
    needed = std::max(needed, place.offsets[0] + kBlock);
  }
  std::vector<std::uint64_t> lengths = {victim.size() - 1, 1, 0};
  for (std::uint64_t size = victim.size() / kBlock * kBlock; size > 0;) {
    lengths.push_back(size);
    for (const int more : {-512, -1, 1, 512}) {
      lengths.push_back(size + static_cast<std::uint64_t>(more));
    }
    const bool dense = size <= victim.image.size() + 2 * kBlock;
    const bool head = size <= kExtents - kBlock && size > 2 * kBlock;
    const std::uint64_t step =
        !dense || (head && !test::all_faults()) ? (64 << 10) : kBlock;
    size -= std::min(size, step);
  }
  std::ranges::sort(lengths, std::greater());
  const LittleMemory little;
  std::size_t whole = 0;
  for (const std::uint64_t length : lengths) {
    if (length > victim.size()) continue;
    victim.resize(length);
    const Victim::Outcome outcome = victim.open();
    ASSERT_EQ(outcome.wrong, "") << length << " bytes";
    if (outcome.step == victim.last().step) {
      ++whole;
      ASSERT_GE(length, needed);
    }
  }
  std::printf("[  FAULTS  ] %zu lengths, %zu of them whole\n", lengths.size(),
              whole);
  EXPECT_GT(whole, 0u);
}

TEST(CommitDamageFaults, TilesThatHaveChangedPlacesAreSeen) {
  Victim victim("ccs");
  const auto log = CommitLog::open(victim.store(), StoreName());
  const auto& tiles = log->commits().back().extents;
  std::vector<std::uint64_t> others;
  for (const auto& tile : tiles) others.push_back(tile->offset());
  // Those of the commit before, and of the step after.
  for (const Place& place : victim.commits()[0].places) {
    others.push_back(place.offsets[0]);
  }
  std::size_t pairs = 0;
  for (const auto& tile : tiles) {
    for (const std::uint64_t other : others) {
      if (other == tile->offset()) continue;
      const auto swap = [&] {
        const auto first =
            victim.image.begin() + static_cast<std::ptrdiff_t>(tile->offset());
        std::swap_ranges(
            first, first + kTile,
            victim.image.begin() + static_cast<std::ptrdiff_t>(other));
      };
      swap();
      AlignedBuffer bytes(kTile);
      EXPECT_THROW(victim.store().read(tile, 0, bytes.bytes()).wait(), IoError);
      swap();
      victim.store().read(tile, 0, bytes.bytes()).wait();
      ++pairs;
    }
  }
  EXPECT_EQ(pairs, kTiles * (2 * kTiles - 1));
}

void copy_block(const Image& from, std::uint64_t source, Image& to,
                std::uint64_t target) {
  std::memcpy(to.data() + target, from.data() + source, kBlock);
}

TEST(CommitDamageFaults, ARootOfAnotherStoreIsNotTaken) {
  const Victim other("ccc");
  for (const std::size_t from : {0u, 1u}) {
    for (const std::size_t to : {0u, 1u}) {
      Victim victim("cc");
      const bool newest = to == victim.newest_slot();
      copy_block(other.image, kRoots[from], victim.image, kRoots[to]);
      const Victim::Outcome outcome = victim.open();
      EXPECT_EQ(outcome.wrong, "");
      // The commit before was whole.
      EXPECT_EQ(outcome.step, newest ? 1u : 2u) << outcome.error;
    }
  }
  Victim victim("cc");
  for (const std::uint64_t root : kRoots) {
    copy_block(other.image, root, victim.image, root);
  }
  EXPECT_NE(victim.open().error.find("root 0 is damaged, or was being written; "
                                     "root 1 is damaged"),
            std::string::npos);
}

// A drive that has lost a write has an older block.
TEST(CommitDamageFaults, AnOlderRootOverTheNewerIsNotTakenForIt) {
  for (const char* history : {"cc", "ccs", "ccccs", "kkks"}) {
    Victim victim(history);
    const std::size_t newest = victim.newest_slot();
    copy_block(victim.image, kRoots[1 - newest], victim.image, kRoots[newest]);
    const Victim::Outcome outcome = victim.open();
    EXPECT_EQ(outcome.wrong, "") << history;
    if (std::string(history) == "cc") {
      EXPECT_EQ(outcome.step, 1u) << outcome.error;
    } else if (history[0] == 'c') {
      EXPECT_NE(outcome.error.find("is a copy of the other"), std::string::npos)
          << outcome.error;
    }
  }
}

// A block that cannot be read may be what a power cut has left of a root.
TEST(CommitDamageFaults, ARootThatTheDriveCannotReadIsADamagedOne) {
  for (const std::size_t unreadable : {0u, 1u}) {
    Victim victim("cc");
    victim.unreadable = kRoots[unreadable];
    const Victim::Outcome outcome = victim.open();
    EXPECT_EQ(outcome.wrong, "");
    EXPECT_EQ(outcome.step, unreadable == victim.newest_slot() ? 1u : 2u)
        << outcome.error;
  }
}

/// Puts another table, and a root that fits it, in the place of the newest.
void replace_table(Victim& victim,
                   const std::function<void(CommitTable&, StoreRoot&)>& edit) {
  const std::size_t newest = victim.newest_slot();
  StoreRoot root = victim.root(newest);
  CommitTable table = decode_table(
      victim.at(root.tables[0].offsets[0], root.tables[0].size), root.store, 1,
      [&](std::uint64_t size) { return victim.store().blocks_of(size); });
  edit(table, root);
  const auto bytes = encode(table);
  root.table_checksum = checksum(bytes);
  for (Place& place : root.tables) {
    place.size = bytes.size();
    std::ranges::copy(bytes, victim.image.begin() +
                                 static_cast<std::ptrdiff_t>(place.offsets[0]));
  }
  std::ranges::copy(
      encode(root),
      victim.image.begin() + static_cast<std::ptrdiff_t>(kRoots[newest]));
  std::fill_n(
      victim.image.begin() + static_cast<std::ptrdiff_t>(kRoots[1 - newest]),
      kBlock, std::byte{0});
}

TEST(CommitDamageFaults, ATableThatLiesIsRefused) {
  const auto error_of = [](const auto& edit) {
    Victim victim("kk");
    replace_table(victim, edit);
    return victim.open().error;
  };
  EXPECT_EQ(error_of([](CommitTable&, StoreRoot&) {}), "");
  const auto says = [&](const char* words, const auto& edit) {
    const std::string error = error_of(edit);
    EXPECT_NE(error.find(words), std::string::npos) << error;
  };
  says("lie in the same place", [](CommitTable& table, StoreRoot&) {
    table.extents[1] = table.extents[0];
  });
  says("lie in the same place", [](CommitTable& table, StoreRoot& root) {
    table.extents[1].place.offsets = root.tables[0].offsets;
  });
  says("another commit's",
       [](CommitTable& table, StoreRoot&) { --table.generation; });
  says("is damaged", [](CommitTable& table, StoreRoot& root) {
    table.generation = root.generation = ~std::uint64_t{0};
  });
  says("cannot lie at", [](CommitTable& table, StoreRoot&) {
    table.extents[1].place.offsets[0] = 0;
  });
  says("cannot lie at", [](CommitTable& table, StoreRoot&) {
    table.extents[1].place.offsets[0] += 4096;
  });
  says("another store's",
       [](CommitTable& table, StoreRoot&) { table.store[0] ^= std::byte{1}; });
}

// What is wrong with a commit that is kept does no harm to the last one.
TEST(CommitDamageFaults, AKeptCommitThatIsOutOfOrderIsLeftOut) {
  Victim victim("kk");
  replace_table(victim, [](CommitTable& table, StoreRoot&) {
    table.earlier[0].generation = table.generation;
  });
  const auto log = CommitLog::open(victim.store(), StoreName());
  EXPECT_EQ(log->commits().size(), 1u);
  ASSERT_EQ(log->notes().size(), 1u);
  EXPECT_NE(log->notes()[0].find("out of order"), std::string::npos);
}

/// What a field of a hostile file may be.
std::uint64_t hostile(std::mt19937_64& random, std::uint64_t before) {
  const std::uint64_t numbers[] = {0,
                                   1,
                                   2,
                                   kBlock,
                                   kTile,
                                   kExtents,
                                   1ull << 31,
                                   1ull << 32,
                                   1ull << 40,
                                   1ull << 62,
                                   1ull << 63,
                                   ~0ull,
                                   ~0ull - 7,
                                   before + 1,
                                   before - 1,
                                   before * 2,
                                   before / 2,
                                   before + kBlock,
                                   before ^ (1ull << random() % 64)};
  return numbers[random() % std::size(numbers)];
}

void change(std::mt19937_64& random, std::span<std::byte> bytes) {
  for (std::size_t i = 1 + random() % 3; i > 0; --i) {
    const std::size_t width = random() % 3 == 0 ? 4 : 8;
    const std::size_t at = random() % (bytes.size() / width) * width;
    std::uint64_t number = 0;
    std::memcpy(&number, bytes.data() + at, width);
    number = hostile(random, number);
    std::memcpy(bytes.data() + at, &number, width);
  }
}

void seal(std::span<std::byte> block) {
  const std::uint64_t sum = checksum(block.first(kBlock - 8));
  std::memcpy(block.data() + kBlock - 8, &sum, 8);
}

// Whoever can write a file can make its checksums right.
TEST(CommitDamageFaults, AHostileFileIsReadOrRefused) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 300'000
                           : test::kSanitized ? 500
                                              : 4000;
  Victim victim("kk");
  const LittleMemory little;
  const Image before = victim.image;
  std::size_t opened = 0;
  for (std::size_t i = 0; i < most; ++i) {
    const std::size_t newest = victim.newest_slot();
    const std::span<std::byte> image(victim.image);
    const auto root = image.subspan(kRoots[newest], kBlock);
    // There is nothing else to take.
    std::ranges::fill(image.subspan(kRoots[1 - newest], kBlock), std::byte{0});
    const std::size_t what = random() % 8;
    if (what == 0) {
      change(random, image.first(128));
      seal(image.first(kBlock));
    } else if (what < 3) {
      change(random, root.first(128));
      seal(root);
    } else {
      StoreRoot changed = victim.root(newest);
      const Place& place = changed.tables[0];
      const auto table = image.subspan(place.offsets[0], place.size);
      change(random, table);
      std::memcpy(image.data() + changed.tables[1].offsets[0], table.data(),
                  table.size());
      changed.table_checksum = checksum(table);
      std::ranges::copy(encode(changed), root.begin());
    }
    try {
      const auto log = CommitLog::open(victim.store(), StoreName());
      ++opened;
      for (const Commit& commit : log->commits()) {
        for (const auto& extent : commit.extents) {
          ASSERT_LE(extent->padded_size(), victim.size());
          const AlignedBuffer bytes(extent->padded_size());
          try {
            victim.store().read(extent, 0, bytes.bytes()).wait();
          } catch (const IoError&) {
          }
        }
      }
      // Going on from it harms nobody.
      if (i % 4 == 0) log->add(9, "", {victim.store().allocate(kTile)});
    } catch (const std::bad_alloc&) {
      FAIL() << "it wanted more memory than the file has: " << i;
    } catch (const IoError&) {
    } catch (const std::invalid_argument&) {
    }
    victim.image = before;
  }
  std::printf("[  FAULTS  ] %zu hostile files, %zu of them opened\n", most,
              opened);
  EXPECT_GT(opened, 0u);
  EXPECT_LT(opened, most);
}

/// Changes a number or a letter of a text, or takes out or doubles a part.
std::string changed_text(std::mt19937_64& random, std::string text) {
  for (std::size_t i = 1 + random() % 3; i > 0; --i) {
    const std::size_t at = random() % text.size();
    const std::size_t length =
        std::min<std::size_t>(random() % 12, text.size() - at);
    const std::size_t digit = text.find_first_of("0123456789", at);
    const std::size_t kind = random() % 8;
    if (kind < 5 && digit != std::string::npos) {
      const std::size_t end = text.find_first_not_of("0123456789", digit);
      const std::string before = text.substr(digit, end - digit);
      const std::uint64_t number = std::strtoull(before.c_str(), nullptr, 10);
      text.replace(digit, before.size(),
                   std::to_string(hostile(random, number)));
    } else if (kind == 5) {
      text.erase(at, length);
    } else if (kind == 6) {
      text.insert(at, text.substr(at, length));
    } else {
      text[at] = "[]{},:\"-.e0 \n"[random() % 13];
    }
  }
  return text;
}

/// Changes a byte of all that it gets.
struct Touch final : UpdateKernel {
  void update(std::span<const StateSegment> segments) override {
    for (const StateSegment& segment : segments) {
      if (segment.count > 0) ++*segment.field<unsigned char>(0);
    }
  }
};

TEST(CommitDamageFaults, AHostileDocumentIsReadOrRefused) {
  std::mt19937_64 random(test::all_faults() ? std::random_device()() : 1);
  const std::size_t most = test::all_faults() ? 50'000
                           : test::kSanitized ? 200
                                              : 1000;
  const test::TempDir dir;
  TileOptions options = test::CommitTraining::options({dir.path()}, 10);
  {
    test::CommitTraining training(options);
    training.step();
    training.commit();
  }
  const auto file = dir.path() / StoreName().of_file(0);
  const std::uint64_t size = std::filesystem::file_size(file);
  Image before(size);
  std::ifstream(file, std::ios::binary)
      .read(reinterpret_cast<char*>(before.data()),
            static_cast<std::streamsize>(size));
  Image image = before;
  const std::uint64_t unreadable = ~std::uint64_t{0};
  options.store.engine_factory = [&](int depth) {
    return std::make_unique<ImageEngine>(image, size, unreadable, depth);
  };
  const auto block = [&](std::uint64_t at, std::uint64_t length) {
    return std::span(image).subspan(at, length);
  };
  const StoreHeader header = decode_header(block(0, kBlock));
  StoreRoot root = *decode_root(block(kRoots[0], kBlock), header.store, 1);
  const CommitTable table = decode_table(
      block(root.tables[0].offsets[0], root.tables[0].size), header.store, 1,
      [](std::uint64_t bytes) { return (bytes + kBlock - 1) / kBlock; });
  // The end of the file is free.
  root.tables[1].offsets[0] = size - (64 << 10);
  root.tables[0].offsets[0] = size - (128 << 10);
  const LittleMemory little;
  std::size_t opened = 0;
  for (std::size_t i = 0; i < most; ++i) {
    CommitTable changed = table;
    changed.document = changed_text(random, table.document);
    const auto bytes = encode(changed);
    ASSERT_LT(bytes.size(), 64u << 10);
    root.table_checksum = checksum(bytes);
    for (Place& place : root.tables) {
      place.size = bytes.size();
      std::ranges::copy(bytes, block(place.offsets[0], bytes.size()).begin());
    }
    std::ranges::copy(encode(root), block(kRoots[0], kBlock).begin());
    try {
      const auto offload = OptimizerOffload::resume(options);
      ++opened;
      // What it says can be used.
      Touch touch;
      offload->read_values(touch);
      std::vector<std::size_t> all(offload->parameters());
      std::iota(all.begin(), all.end(), 0);
      offload->step(all, touch);
    } catch (const std::bad_alloc&) {
      FAIL() << "it wanted more memory than the file has: " << changed.document;
    } catch (const IoError& error) {
      ASSERT_TRUE(error.error() == EIO || error.error() == ENOSPC)
          << error.what() << changed.document;
    } catch (const std::invalid_argument&) {
    }
  }
  std::printf("[  FAULTS  ] %zu hostile documents, %zu of them opened\n", most,
              opened);
  EXPECT_GT(opened, 0u);
  EXPECT_LT(opened, most);
}

}  // namespace
}  // namespace torch_ext
