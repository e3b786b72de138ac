#include "store/store_check.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/cut_point.h"
#include "io/file_lock.h"
#include "store/commit_log.h"
#include "support/aligned_buffer.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::TempDir;

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kTile = 2 * kBlock;
constexpr std::size_t kTiles = 3;

/// Owns a store and commits to it, as an optimizer does.
class Owner {
 public:
  explicit Owner(const std::vector<WeightedDirectory>& directories)
      : store_(options_for(directories)), log_(store_, StoreName()) {}

  /// Writes all tiles to space that no commit has.
  void step() {
    tiles_.clear();
    for (std::size_t i = 0; i < kTiles; ++i) {
      tiles_.push_back(store_.allocate(kTile));
      AlignedBuffer bytes(kTile);
      test::fill_pattern(bytes.bytes(), ++written_);
      store_.write(tiles_.back(), 0, bytes.bytes()).wait();
    }
  }
  void commit(std::size_t keep = 1) {
    const std::uint64_t step = ++commits_;
    log_.add(step, "step " + std::to_string(step), tiles_, keep);
  }
  /// A commit after which the space of the one before is written.
  void go_on() {
    step();
    commit();
    step();
  }
  const CommitLog& log() const { return log_; }
  const Store& store() const { return store_; }

 private:
  static StoreOptions options_for(
      const std::vector<WeightedDirectory>& directories) {
    StoreOptions options{.directory = directories};
    options.aio.block_size = kBlock;
    options.engine = "threads";
    return options;
  }
  Store store_;
  CommitLog log_;
  std::vector<std::shared_ptr<Extent>> tiles_;
  std::uint64_t written_ = 0;
  std::uint64_t commits_ = 0;
};

/// What is called when read_store() knows the commits, and reads no extent yet.
std::function<void()>* at_commits_read = nullptr;

class StoreCheckTest : public testing::Test {
 protected:
  StoreCheckTest() { at_commits_read = &meanwhile_; }
  ~StoreCheckTest() override { on_cut_point = nullptr; }

  std::vector<std::filesystem::path> files() const {
    return {dir_.path() / StoreName().of_file(0)};
  }
  StoreReport check() { return read_store(files(), {.extents = true}); }
  /// `work` is done each time when the commits have been read.
  void meanwhile(std::function<void()> work) {
    meanwhile_ = std::move(work);
    on_cut_point = [](std::string_view name) {
      if (name == "commits read") (*at_commits_read)();
    };
  }
  void flip(std::uint64_t offset) const {
    std::fstream file(files()[0],
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(static_cast<char>(byte ^ 1));
  }
  std::string bytes_of_file() const {
    std::ifstream file(files()[0], std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  TempDir dir_;
  std::function<void()> meanwhile_;
};

TEST_F(StoreCheckTest, ALiveStoreIsReadAndNothingIsWritten) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  owner.step();
  owner.commit(2);
  const std::string before = bytes_of_file();
  struct stat status_before;
  ASSERT_EQ(stat(files()[0].c_str(), &status_before), 0);
  const StoreReport report = check();
  EXPECT_TRUE(report.damage.empty()) << report.damage[0].what;
  ASSERT_EQ(report.commits.size(), 2u);
  EXPECT_EQ(report.commits[0].commit.step, 1u);
  EXPECT_EQ(report.commits[1].commit.document, "step 2");
  EXPECT_EQ(report.checked, 2 * kTiles * kTile);
  struct stat status_after;
  ASSERT_EQ(stat(files()[0].c_str(), &status_after), 0);
  EXPECT_EQ(status_before.st_ctim.tv_nsec, status_after.st_ctim.tv_nsec);
  EXPECT_EQ(bytes_of_file(), before);
  owner.go_on();
  EXPECT_EQ(check().commits.back().commit.step, 3u);
}

TEST_F(StoreCheckTest, AStoreThatIsOnlyReadHasNoOtherAccess) {
  {
    Owner owner({{dir_.path()}});
    owner.step();
    owner.commit();
  }
  StoreOptions options{.directory = dir_.path(),
                       .files = {StoreName().of_file(0)},
                       .read_only = true};
  options.aio.block_size = kBlock;
  Store store(options);
  EXPECT_EQ(fcntl(store.file().fd(), F_GETFL) & O_ACCMODE, O_RDONLY);
  AlignedBuffer bytes(kBlock);
  EXPECT_EQ(test::failure_of([&] {
              store.write_head(0, 0, bytes.bytes()).wait();
            }).error,
            EBADF);
}

TEST_F(StoreCheckTest, IfTheOwnerGoesOnItIsReadAgainOnce) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  int times = 0;
  meanwhile([&] {
    if (times++ == 0) owner.go_on();
  });
  const StoreReport report = check();
  EXPECT_EQ(times, 2);
  EXPECT_TRUE(report.damage.empty()) << report.damage[0].what;
  EXPECT_EQ(report.commits.back().commit.step, 2u);
}

TEST_F(StoreCheckTest, IfTheOwnerGoesOnTwiceNothingIsSaidOfDamage) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  meanwhile([&] { owner.go_on(); });
  const IoFailure failure = test::failure_of([this] { check(); });
  EXPECT_EQ(failure.error, EBUSY);
  EXPECT_EQ(failure.path, files()[0]);
  EXPECT_NE(failure.detail.find("made commits twice"), std::string::npos);
}

// What fits was committed, even if another commit is the last one now.
TEST_F(StoreCheckTest, ACommitThatIsReadInTimeIsWhole) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  owner.step();
  int times = 0;
  meanwhile([&] {
    ++times;
    owner.commit();
  });
  const StoreReport report = check();
  EXPECT_EQ(times, 1);
  EXPECT_TRUE(report.damage.empty());
  EXPECT_EQ(report.commits.back().commit.step, 1u);
}

// The owner has to grow the file for its first commits.
TEST_F(StoreCheckTest, AFileThatGrowsMeanwhileIsNotDamaged) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  const std::uint64_t at = owner.log().commits()[0].extents[0]->offset();
  int times = 0;
  meanwhile([&] {
    if (times++ > 0) return;
    flip(at);  // As the owner may do once there is a later commit.
    std::filesystem::resize_file(files()[0],
                                 std::filesystem::file_size(files()[0]) * 2);
  });
  const StoreReport report = check();
  EXPECT_EQ(times, 2);
  EXPECT_EQ(report.damage.size(), 1u);
}

TEST_F(StoreCheckTest, EachBlockThatIsDamagedIsNamed) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  const auto& extents = owner.log().commits()[0].extents;
  flip(extents[0]->offset() + kBlock + 9);
  flip(extents[2]->offset());
  flip(extents[2]->offset() + kBlock);
  const StoreReport report = check();
  ASSERT_EQ(report.damage.size(), 2u);
  EXPECT_EQ(report.damage[0].path, files()[0]);
  EXPECT_EQ(report.damage[0].offset, extents[0]->offset() + kBlock);
  EXPECT_EQ(report.damage[0].length, kBlock);
  EXPECT_EQ(report.damage[0].generation, 1u);
  EXPECT_EQ(report.damage[0].extent, 0u);
  EXPECT_EQ(report.damage[0].extent_offset, kBlock);
  EXPECT_EQ(report.damage[1].offset, extents[2]->offset());
  EXPECT_EQ(report.damage[1].length, kTile) << "neighbours are one";
  EXPECT_EQ(report.damage[1].extent, 2u);
  EXPECT_EQ(report.checked, kTiles * kTile) << "it goes on after damage";
}

// A stranger's file: each of the commits that it keeps is the same table.
TEST_F(StoreCheckTest, ATableIsReadOnceHoweverOftenAFileHasIt) {
  StoreId id;
  {
    Owner owner({{dir_.path()}});
    owner.step();
    owner.commit();
    id = check().header.store;
  }
  std::string file = bytes_of_file();
  const auto put = [&file](const std::vector<std::byte>& bytes) {
    file.resize(align_up(file.size(), kBlock));
    const Place place{bytes.size(), 0, {file.size()}};
    file.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    file.resize(align_up(file.size(), kBlock));
    return place;
  };
  CommitTable table{.store = id, .generation = 5, .step = 5};
  table.document = std::string(std::size_t{1} << 20, ' ');
  const std::vector<std::byte> large = encode(table);
  const CommitTable::Earlier once{
      5, 5, checksum(large), {put(large), put(large)}};
  CommitTable newest{.store = id, .generation = 9, .step = 9};
  newest.earlier.assign(50, once);
  const std::vector<std::byte> small = encode(newest);
  const std::vector<std::byte> root =
      encode(StoreRoot{.store = id,
                       .generation = 9,
                       .step = 9,
                       .table_checksum = checksum(small),
                       .tables = {put(small), put(small)}});
  file.replace(kRootOffsets[0], root.size(),
               reinterpret_cast<const char*>(root.data()), root.size());
  std::ofstream(files()[0], std::ios::binary) << file;

  std::size_t bytes = 0;
  for (const auto& found : check().commits) {
    bytes += found.commit.document.size();
  }
  EXPECT_EQ(bytes, table.document.size());
}

TEST_F(StoreCheckTest, TheFileOfAnotherDriveIsChecked) {
  TempDir second;
  Owner owner({{dir_.path()}, {second.path()}});
  owner.step();
  owner.commit();
  const std::vector<std::filesystem::path> both = {
      files()[0], second.path() / StoreName().of_file(1)};
  EXPECT_TRUE(read_store(both, {.extents = true}).damage.empty());
  const std::uint64_t at = owner.log().commits()[0].extents[1]->offset(1);
  std::filesystem::resize_file(both[1], at);
  const StoreReport report = read_store(both, {.extents = true});
  ASSERT_FALSE(report.damage.empty());
  for (const StoreDamage& damage : report.damage) {
    EXPECT_NE(damage.what, "") << damage.path;
  }
  EXPECT_THROW(read_store({both[1], both[0]}, {}), std::invalid_argument);
  EXPECT_THROW(read_store({both[0]}, {}), std::invalid_argument);
}

TEST_F(StoreCheckTest, WhatProgressThrowsEndsTheReading) {
  Owner owner({{dir_.path()}});
  owner.step();
  owner.commit();
  std::uint64_t all = 0;
  const auto stop = [&all](std::uint64_t, std::uint64_t total) {
    all = total;
    throw std::runtime_error("stop");
  };
  EXPECT_THROW(read_store(files(), {.extents = true, .progress = stop}),
               std::runtime_error);
  EXPECT_EQ(all, kTiles * kTile);
}

TEST_F(StoreCheckTest, AStoreInUseIsNotRemovedAndTheOwnerIsNamed) {
  StoreId id;
  {
    Owner owner({{dir_.path()}});
    owner.step();
    owner.commit();
    id = read_header(owner.store().file()).store;
    const IoFailure failure =
        test::failure_of([&] { remove_store(files(), id); });
    EXPECT_EQ(failure.error, EAGAIN);
    const std::string process = "process " + std::to_string(getpid());
    EXPECT_NE(failure.detail.find(process), std::string::npos)
        << failure.detail;
    EXPECT_TRUE(lock_owner(owner.store().file()).starts_with(process));
  }
  EXPECT_EQ(lock_owner(File::open(files()[0], File::Mode::kRead)), "");
  StoreId other = id;
  other[0] ^= std::byte{1};
  EXPECT_THROW(remove_store(files(), other), std::invalid_argument);
  EXPECT_TRUE(std::filesystem::exists(files()[0]));
  remove_store(files(), id);
  EXPECT_FALSE(std::filesystem::exists(files()[0]));
}

}  // namespace
}  // namespace torch_ext
