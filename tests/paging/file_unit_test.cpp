#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/make_queue.h"
#include "torch_ext/paging/pager.h"

// Units that are ranges of a file.

namespace torch_ext {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

class FileUnitTest : public testing::Test {
 protected:
  FileUnitTest() : path_(dir_.path() / "model.bin"), content_(8 * kMiB + 777) {
    test::fill_pattern(content_, 5);
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(content_.data()),
               static_cast<std::streamsize>(content_.size()));
  }

  void make(std::uint64_t memory) {
    const AioConfig aio = {.block_size = 256 << 10, .queue_depth = 8};
    StoreOptions options{.directory = dir_.path(), .aio = aio};
    store_ = std::make_shared<Store>(options);
    file_ = std::make_shared<File>(File::open(path_, File::Mode::kRead));
    pager_.emplace(
        PagerOptions{.store = store_,
                     .memory = memory,
                     .files = make_queue(aio, "auto", file_->direct()).queue});
  }

  Pager::Unit add(std::uint64_t offset, std::uint64_t bytes) {
    return pager_->add({.file = file_, .offset = offset, .bytes = bytes},
                       "range " + std::to_string(offset));
  }

  Pager::Pins pin(Pager::Unit unit, Access access = Access::kRead) {
    const Pager::Touch touch{unit, access};
    return pager_->pin({&touch, 1});
  }

  /// Whether the unit has the file's bytes from `offset` on.
  bool has(Pager::Unit unit, std::uint64_t offset) {
    const Pager::Pins pins = pin(unit);
    const auto expected =
        std::span(content_).subspan(offset, pager_->bytes(unit));
    return reinterpret_cast<std::uintptr_t>(pins.data(0)) % 64 == 0 &&
           std::equal(expected.begin(), expected.end(), pins.data(0));
  }

  /// Takes all the memory, so that all others have to go.
  void evict_all() {
    const Pager::Unit all = pager_->add(pager_->stats().memory, "all");
    pin(all, Access::kReplace);
    pager_->remove(all);
  }

  void change(std::uint64_t offset, char byte) const {
    std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(byte);
  }

  /// As a program that sets the times back, or a drive that fails.
  template <typename Change>
  void in_secret(Change change) const {
    struct stat before = {};
    ASSERT_EQ(::stat(path_.c_str(), &before), 0);
    change();
    const timespec times[] = {before.st_atim, before.st_mtim};
    ASSERT_EQ(::utimensat(AT_FDCWD, path_.c_str(), times, 0), 0);
  }

  int error_of(Pager::Unit unit) {
    try {
      pin(unit);
    } catch (const IoError& error) {
      EXPECT_NE(std::string(error.what()).find("model.bin"), std::string::npos);
      return error.error();
    }
    return 0;
  }

  test::TempDir dir_;
  const std::filesystem::path path_;
  std::vector<std::byte> content_;
  std::shared_ptr<Store> store_;
  std::shared_ptr<const File> file_;
  std::optional<Pager> pager_;
};

TEST_F(FileUnitTest, AnyRangeIsReadToAMultipleOf64) {
  make(16 * kMiB);
  for (const std::uint64_t offset :
       {0u, 8u, 56u, 63u, 64u, 4088u, 4096u, 5001u}) {
    for (const std::uint64_t bytes :
         {std::uint64_t{1}, std::uint64_t{100}, std::uint64_t{4096}, kMiB - 8,
          kMiB, kMiB + 1, 3 * kMiB + 8, content_.size() - offset}) {
      EXPECT_TRUE(has(add(offset, bytes), offset)) << offset << " " << bytes;
    }
  }
  EXPECT_EQ(store_->stats().allocated, 0u);
  EXPECT_EQ(store_->stats().write_ops, 0u);
}

TEST_F(FileUnitTest, TheEndOfAFileIsRead) {
  make(4 * kMiB);
  for (const std::uint64_t bytes : {1u, 64u, 777u, 4097u}) {
    const std::uint64_t offset = content_.size() - bytes;
    EXPECT_TRUE(has(add(offset, bytes), offset)) << bytes;
  }
}

TEST_F(FileUnitTest, UnitsAreReadAgainAsOftenAsTheyAreEvicted) {
  make(2 * kMiB);
  std::vector<Pager::Unit> units;
  for (std::uint64_t i = 0; i < 8; ++i)
    units.push_back(add(i * kMiB + 8, kMiB));
  for (int round = 0; round < 5; ++round) {
    pager_->begin_round();
    for (std::uint64_t i = 0; i < 8; ++i) {
      EXPECT_TRUE(has(units[i], i * kMiB + 8)) << round << " " << i;
    }
  }
  EXPECT_GT(pager_->stats().foreseen, 8u);
  EXPECT_EQ(store_->stats().write_ops, 0u);
}

TEST_F(FileUnitTest, WhatHasChangedIsOnTheDriveAndTheFileIsAsBefore) {
  make(4 * kMiB);
  const Pager::Unit unit = add(8, kMiB);
  {
    const Pager::Pins pins = pin(unit, Access::kWrite);
    test::fill_pattern({pins.data(0), kMiB}, 9);
  }
  for (int round = 0; round < 2; ++round) {
    evict_all();
    EXPECT_FALSE(pager_->in_memory(unit));
    const Pager::Pins pins = pin(unit);
    EXPECT_TRUE(test::holds_pattern({pins.data(0), kMiB}, 9));
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pins.data(0)) % 64, 0u);
  }
  std::vector<std::byte> now(content_.size());
  std::ifstream(path_, std::ios::binary)
      .read(reinterpret_cast<char*>(now.data()),
            static_cast<std::streamsize>(now.size()));
  EXPECT_EQ(now, content_);
  // From then on it does not need the file.
  change(100, 'x');
  evict_all();
  EXPECT_EQ(error_of(unit), 0);
}

TEST_F(FileUnitTest, AReplacedUnitWhoseOperatorFailedHasTheFilesBytes) {
  make(4 * kMiB);
  const Pager::Unit unit = add(4096 + 8, kMiB);
  Pager::Pins pins = pin(unit, Access::kReplace);
  std::fill_n(pins.data(0), kMiB, std::byte{1});
  pins.undo_replaced();
  pins.release();
  EXPECT_TRUE(has(unit, 4096 + 8));
}

TEST_F(FileUnitTest, AFileThatWasWrittenToIsAnError) {
  make(4 * kMiB);
  const Pager::Unit known = add(0, kMiB);
  const Pager::Unit fresh = add(kMiB, kMiB);
  EXPECT_TRUE(has(known, 0));
  evict_all();
  change(7 * kMiB, 'x');
  EXPECT_EQ(error_of(known), EIO);
  EXPECT_EQ(error_of(fresh), EIO);
}

TEST_F(FileUnitTest, AFileThatWasCutIsAnError) {
  make(4 * kMiB);
  const Pager::Unit unit = add(6 * kMiB, 2 * kMiB);
  in_secret([&] { std::filesystem::resize_file(path_, 7 * kMiB); });
  EXPECT_EQ(error_of(unit), EIO);
}

TEST_F(FileUnitTest, OtherBytesThanThoseReadBeforeAreAnError) {
  make(4 * kMiB);
  const Pager::Unit unit = add(8, kMiB);
  EXPECT_TRUE(has(unit, 8));
  evict_all();
  in_secret([&] { change(5000, 'x'); });
  EXPECT_EQ(error_of(unit), EIO);
  in_secret([&] {
    change(5000, static_cast<char>(std::to_integer<int>(content_[5000])));
  });
  EXPECT_TRUE(has(unit, 8));
}

TEST_F(FileUnitTest, WhatTheFileDoesNotHaveIsRefused) {
  make(4 * kMiB);
  EXPECT_THROW(add(content_.size() - 5, 6), std::invalid_argument);
  EXPECT_THROW(add(content_.size() + 1, 1), std::invalid_argument);
  EXPECT_THROW(add(~std::uint64_t{0}, 2), std::invalid_argument);
  EXPECT_THROW(add(0, 0), std::invalid_argument);
  EXPECT_THROW(add(0, 5 * kMiB), std::invalid_argument);
  EXPECT_THROW(pager_->add(FileRange{}, "none"), std::invalid_argument);
}

}  // namespace
}  // namespace torch_ext
