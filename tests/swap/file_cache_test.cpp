#include "swap/file_cache.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "support/temp_dir.h"

namespace torch_ext {
namespace {

class FileCacheTest : public testing::Test {
 protected:
  FileCache::Lease open(int number, bool waits = false, bool buffered = false) {
    return cache_.open(
        (dir_.path() / std::to_string(number)).string(),
        {.mode = File::Mode::kWrite, .buffered = buffered, .waits = waits});
  }

  test::TempDir dir_;
  FileCache cache_;
};

TEST_F(FileCacheTest, WhoWaitsGetsTheNextDescriptorBeforeWhoDoesNot) {
  std::vector<FileCache::Lease> leases;
  for (int i = 0; i < FileCache::kMaxDescriptors; ++i) {
    leases.push_back(open(i));
    ASSERT_TRUE(leases.back());
  }
  EXPECT_FALSE(open(100));
  EXPECT_FALSE(open(101, true));
  leases.pop_back();
  EXPECT_FALSE(open(100));
  EXPECT_FALSE(open(0));  // Though it is open.
  const FileCache::Lease served = open(101, true);
  EXPECT_TRUE(served);
  leases.pop_back();
  EXPECT_TRUE(open(100));
  EXPECT_EQ(cache_.descriptors(), FileCache::kMaxDescriptors);
}

TEST_F(FileCacheTest, AnErrorOfWhoWaitsLetsTheOthersGoOn) {
  std::vector<FileCache::Lease> leases;
  for (int i = 0; i < FileCache::kMaxDescriptors; ++i) {
    leases.push_back(open(i));
  }
  std::filesystem::create_directory(dir_.path() / "100");
  EXPECT_FALSE(open(100, true));
  leases.pop_back();
  EXPECT_ANY_THROW(open(100, true));
  EXPECT_TRUE(open(101));
}

TEST_F(FileCacheTest, AFileInUseMayComeToHaveBothDescriptors) {
  std::vector<FileCache::Lease> leases;
  for (int i = 0; i < FileCache::kMaxDescriptors / 2; ++i) {
    leases.push_back(open(i, false, true));
    ASSERT_TRUE(leases.back());
  }
  EXPECT_FALSE(open(100));
  leases.clear();
  for (int i = 0; i < FileCache::kMaxDescriptors; ++i) {
    leases.push_back(open(1000 + i));
    ASSERT_TRUE(leases.back());
  }
  EXPECT_FALSE(open(1000, false, true));
  leases.pop_back();
  EXPECT_TRUE(open(1000, false, true));
  EXPECT_LE(cache_.descriptors(), FileCache::kMaxDescriptors);
}

}  // namespace
}  // namespace torch_ext
