#include "support/forgetful_disk.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/engine_test.h"
#include "support/temp_dir.h"
#include "torch_ext/io/file.h"

namespace torch_ext::test {
namespace {

class ForgetfulDiskTest : public testing::Test {
 protected:
  using Kept = ForgetfulDisk::Kept;

  ForgetfulDiskTest() { file_.reserve(0, 8 * kPage); }

  std::int64_t run(IoRequest request) {
    request.fd = file_.fd();
    EXPECT_EQ(engine_->submit({&request, 1}), 1u);
    IoCompletion done;
    EXPECT_EQ(engine_->poll({&done, 1}, 1, kLong), 1u);
    return done.result;
  }
  static IoRequest writing(std::uint64_t page, AlignedBuffer& bytes) {
    return {.op = IoRequest::Op::kWrite,
            .offset = page * kPage,
            .data = bytes.data(),
            .length = bytes.size()};
  }
  void write(std::uint64_t page, char with, std::size_t pages = 1) {
    AlignedBuffer bytes(pages * kPage);
    std::fill_n(bytes.data(), bytes.size(), static_cast<std::byte>(with));
    EXPECT_EQ(run(writing(page, bytes)),
              static_cast<std::int64_t>(bytes.size()));
  }
  void sync() { EXPECT_EQ(run({.op = IoRequest::Op::kSync}), 0); }

  /// The first byte of each page of a disk.
  std::string pages(ForgetfulDisk& disk, std::size_t count) {
    const auto engine = disk.factory()(1);
    AlignedBuffer bytes(count * kPage);
    const IoRequest request{
        .fd = file_.fd(), .data = bytes.data(), .length = bytes.size()};
    engine->submit({&request, 1});
    IoCompletion done;
    engine->poll({&done, 1}, 1, kLong);
    EXPECT_EQ(done.result, static_cast<std::int64_t>(bytes.size()));
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
      const char first = static_cast<char>(bytes.data()[i * kPage]);
      text += first == 0 ? '.' : first;
    }
    return text;
  }
  static Kept none(const ForgetfulDisk::Unsynced&, std::size_t) {
    return Kept::kNothing;
  }

  File file_ = File::scratch(temp_parent());
  ForgetfulDisk disk_;
  std::unique_ptr<IoEngine> engine_ = disk_.factory()(4);
};

TEST_F(ForgetfulDiskTest, ReadsWhatWasWritten) {
  write(0, 'a');
  write(1, 'b', 2);
  EXPECT_EQ(pages(disk_, 4), "abb.");
}

TEST_F(ForgetfulDiskTest, ACutTakesWhatWasNotSynced) {
  write(0, 'a');
  sync();
  write(0, 'b');
  write(1, 'c');
  EXPECT_EQ(disk_.unsynced(4).size(), 2u);
  EXPECT_EQ(pages(*disk_.after_cut(4, none), 2), "a.");
  const auto last = [](const ForgetfulDisk::Unsynced& write, std::size_t) {
    return write.offset == kPage ? Kept::kAll : Kept::kNothing;
  };
  EXPECT_EQ(pages(*disk_.after_cut(4, last), 2), "ac");
  EXPECT_EQ(pages(disk_, 2), "bc") << "the disk itself goes on";
}

TEST_F(ForgetfulDiskTest, ACutMayComeAtEachEvent) {
  write(0, 'a');
  write(0, 'b');
  sync();
  EXPECT_EQ(pages(*disk_.after_cut(0, none), 1), ".");
  EXPECT_EQ(pages(*disk_.after_cut(2, none), 1), ".");
  const auto first = [](const ForgetfulDisk::Unsynced& write, std::size_t) {
    return write.event == 0 ? Kept::kAll : Kept::kNothing;
  };
  EXPECT_EQ(pages(*disk_.after_cut(2, first), 1), "a");
  EXPECT_EQ(pages(*disk_.after_cut(3, none), 1), "b");
}

TEST_F(ForgetfulDiskTest, AWriteMaySurviveInPart) {
  write(0, 'a', 4);
  const auto odd = [](const ForgetfulDisk::Unsynced&, std::size_t block) {
    return block % 2 == 1 ? Kept::kAll : Kept::kNothing;
  };
  EXPECT_EQ(pages(*disk_.after_cut(1, odd), 4), ".a.a");
}

TEST_F(ForgetfulDiskTest, ABlockMayBeTorn) {
  write(0, 'a');
  sync();
  write(0, 'b');
  const auto disk = disk_.after_cut(3, [](const ForgetfulDisk::Unsynced&,
                                          std::size_t) { return Kept::kTorn; });
  AlignedBuffer bytes(kPage);
  const auto engine = disk->factory()(1);
  const IoRequest request{
      .fd = file_.fd(), .data = bytes.data(), .length = kPage};
  engine->submit({&request, 1});
  IoCompletion done;
  engine->poll({&done, 1}, 1, kLong);
  EXPECT_EQ(bytes.data()[kPage / 2 - 1], std::byte{'b'});
  EXPECT_EQ(bytes.data()[kPage / 2], std::byte{'a'});
}

TEST_F(ForgetfulDiskTest, ASyncDoesNotCoverAWriteThatWasStillInFlight) {
  AlignedBuffer bytes(kPage);
  std::fill_n(bytes.data(), kPage, std::byte{'a'});
  IoRequest both[] = {writing(0, bytes), {.op = IoRequest::Op::kSync}};
  both[0].fd = both[1].fd = file_.fd();
  ASSERT_EQ(engine_->submit(both), 2u);
  IoCompletion done[2];
  ASSERT_EQ(engine_->poll(done, 2, kLong), 2u);
  EXPECT_EQ(pages(*disk_.after_cut(2, none), 1), ".");
  sync();
  EXPECT_EQ(pages(*disk_.after_cut(3, none), 1), "a");
}

TEST_F(ForgetfulDiskTest, ASyncIsForItsFileAlone) {
  write(0, 'a');
  const File other = File::scratch(temp_parent());
  IoRequest sync{.op = IoRequest::Op::kSync, .fd = other.fd()};
  ASSERT_EQ(engine_->submit({&sync, 1}), 1u);
  IoCompletion done;
  ASSERT_EQ(engine_->poll({&done, 1}, 1, kLong), 1u);
  EXPECT_EQ(pages(*disk_.after_cut(2, none), 1), ".");
}

}  // namespace
}  // namespace torch_ext::test
