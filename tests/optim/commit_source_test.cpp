// A commit is read where it lies, by somebody who is not its owner. What it has
// is computed in memory.

#include "optim/commit_source.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/commit_training.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/store/store.h"

namespace torch_ext {
namespace {

using test::CommitTraining;
using test::TempDir;

class CommitSourceTest : public testing::TestWithParam<std::size_t> {
 protected:
  CommitSourceTest() : drives_(GetParam()) {
    for (const TempDir& each : drives_) paths_.push_back(each.path());
  }

  TileOptions options() const { return CommitTraining::options(paths_, 5); }

  SourceOptions source() const {
    SourceOptions options;
    for (std::size_t i = 0; i < paths_.size(); ++i) {
      options.files.push_back(paths_[i] / StoreName().of_file(i));
    }
    options.engine = "threads";
    return options;
  }

  /// Reads elements here and there, and all values.
  static std::string wrong(CommitSource& source, std::uint64_t step) {
    const auto [states, values] = CommitTraining::expected(step);
    std::mt19937_64 random(step);
    for (int i = 0; i < 300; ++i) {
      const std::size_t number = random() % states.size();
      const std::uint64_t element = random() % states[number].size();
      const StateSegment& segment = source.state_at(number, element);
      if (element < segment.first || element - segment.first >= segment.count ||
          segment.step != step) {
        return "another segment";
      }
      // The one before stays until the call after this one.
      const StateSegment& value = source.value_at(number, element);
      if (segment.field<std::uint32_t>(0)[element - segment.first] !=
          states[number][element]) {
        return "state of " + std::to_string(number) + " is wrong";
      }
      if (value.field<std::uint32_t>(0)[element - value.first] !=
          values[number][element]) {
        return "a value of " + std::to_string(number) + " is wrong";
      }
    }
    return "";
  }

  std::vector<TempDir> drives_;
  std::vector<std::filesystem::path> paths_;
};

INSTANTIATE_TEST_SUITE_P(Drives, CommitSourceTest,
                         testing::Values(std::size_t{1}, std::size_t{3}));

TEST_P(CommitSourceTest, ReadsEachCommitThatIsKept) {
  CommitTraining training(options());
  for (int i = 0; i < 3; ++i) {
    training.step();
    training.commit(/*keep=*/2);
  }
  const auto lists = CommitSource::list(source());
  ASSERT_EQ(lists.size(), 2u);  // A root for each of the last two.
  ASSERT_EQ(lists[0].size(), 2u);
  EXPECT_EQ(lists[0][0].generation, 2u);
  EXPECT_EQ(lists[0][1].step, 3u);
  EXPECT_EQ(lists[0][1].document, "after 3");
  for (const std::uint64_t generation : {2u, 3u}) {
    CommitSource commit(source(), generation);
    EXPECT_EQ(commit.document().of_caller,
              "after " + std::to_string(generation));
    EXPECT_EQ(wrong(commit, generation), "");
  }
}

TEST_P(CommitSourceTest, ReadsBesideALiveOwner) {
  CommitTraining training(options());
  training.step();
  training.commit();
  CommitSource commit(source(), 1);
  training.step();
  training.step();
  EXPECT_EQ(wrong(commit, 1), "");
  // Then the owner writes where the commit was, and that is told.
  for (int i = 0; i < 3; ++i) {
    training.commit();
    training.step();
  }
  try {
    EXPECT_EQ(wrong(commit, 1), "it was overwritten");
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), ESTALE);
    EXPECT_NE(std::string(error.what()).find("made other commits"),
              std::string::npos);
  }
}

TEST_P(CommitSourceTest, SaysWhatIsNotThere) {
  EXPECT_THROW(CommitSource(source(), 1), IoError);
  CommitTraining training(options());
  training.step();
  training.commit();
  try {
    CommitSource commit(source(), 2);
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), ENOENT);
  }
  CommitSource commit(source(), 1);
  EXPECT_THROW(commit.state_at(0, 5000), std::out_of_range);
  EXPECT_THROW(commit.state_at(5, 0), std::out_of_range);
  EXPECT_THROW(commit.value_at(9, 0), std::out_of_range);
  EXPECT_THROW(commit.value_at(1, 300), std::out_of_range);
  SourceOptions swapped = source();
  std::ranges::reverse(swapped.files);
  if (swapped.files.size() > 1) {
    EXPECT_THROW(CommitSource(swapped, 1), std::invalid_argument);
  }
}

TEST_P(CommitSourceTest, DamageIsSeenWhereItIs) {
  {
    CommitTraining training(options());
    training.step();
    training.commit();
  }
  const std::filesystem::path file = source().files[0];
  {
    std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekp(Store::kHeadBytes + 100);
    bytes.put('\x5a');
  }
  CommitSource commit(source(), 1);
  try {
    EXPECT_EQ(wrong(commit, 1), "it is damaged");
    FAIL();
  } catch (const IoError& error) {
    EXPECT_EQ(error.error(), EIO);
    EXPECT_EQ(error.failure().path, file.string());
    EXPECT_EQ(error.failure().offset, Store::kHeadBytes);
  }
}

TEST(StoreNameTest, TheNewestEpochIsFound) {
  const TempDir folder;
  const StoreName name;
  EXPECT_EQ(name.newest_in(folder.path()).epoch, 0u);
  EXPECT_EQ(name.newest_in(folder.path() / "no").epoch, 0u);
  for (const char* file :
       {"state.r0-of-1.e2.d0.store", "state.r0-of-1.e10.d0.store",
        "state.r0-of-1.e11.d1.store", "state.r0-of-2.e12.d0.store",
        "state.r0-of-1.e013.d0.store", "state.r0-of-1.e14.d0.store.old",
        "state.r0-of-1.e99999999999.d0.store"}) {
    std::ofstream(folder.path() / file).put('x');
  }
  EXPECT_EQ(name.newest_in(folder.path()).epoch, 10u);
  StoreName other = name;
  other.world = 2;
  EXPECT_EQ(other.newest_in(folder.path()).epoch, 12u);
}

}  // namespace
}  // namespace torch_ext
