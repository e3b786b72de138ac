// What a FileTransfer does when a write ends, and what others do to its files
// meanwhile.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "support/child.h"
#include "support/file_transfer_test.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"
#include "torch_ext/swap/file_transfer.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::AlignedBuffer;
using test::expect_well_in_child;
using test::Fault;
using test::kMiB;

class FileTransferEndsTest : public test::FileTransferTest {
 protected:
  static IoFailure failure_of(const SwapTicket& ticket) {
    try {
      ticket.wait();
    } catch (const IoError& error) {
      return error.failure();
    }
    return {};
  }

  /// How a write ends during which something happens to its file.
  IoFailure failure_after(const std::function<void()>& event) {
    fs::remove(path("x"));
    script_ = std::make_shared<test::FaultScript>(test::only(0, Fault::held()));
    FileTransfer files(scripted());
    AlignedBuffer memory(256 << 10);
    const SwapTicket ticket =
        files.write(path("x"), 0, on_host(memory.bytes()));
    while (script_->held() == 0) std::this_thread::yield();
    event();
    script_->release_all();
    return failure_of(ticket);
  }
};

TEST_F(FileTransferEndsTest, AFileThatIsGoneWhenItsWriteEndsIsAnError) {
  EXPECT_EQ(failure_after([] {}).error, 0);
  IoFailure failure = failure_after([this] { fs::remove(path("x")); });
  EXPECT_EQ(failure.error, ESTALE);
  EXPECT_EQ(failure.path, path("x").string());
  EXPECT_NE(failure.detail.find("deleted"), std::string::npos);
  failure = failure_after([this] {
    File::open(path("y"), File::Mode::kWrite);
    fs::rename(path("y"), path("x"));
  });
  EXPECT_EQ(failure.error, ESTALE);
  // What has another name now is not lost.
  EXPECT_EQ(failure_after([this] { fs::rename(path("x"), path("y")); }).error,
            0);
  EXPECT_EQ(fs::file_size(path("y")), 256u << 10);
}

TEST_F(FileTransferEndsTest, AFileThatWasCutWhileItWasWrittenIsAnError) {
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kSync ? Fault::held() : Fault();
  });
  FileTransfer files(scripted());
  AlignedBuffer memory(8192);
  const SwapTicket ticket =
      files.write(path("x"), 0, on_host(memory.bytes(0, 5000)));
  while (script_->held() == 0) std::this_thread::yield();
  fs::resize_file(path("x"), 4096);
  script_->release_all();
  const IoFailure failure = failure_of(ticket);
  EXPECT_EQ(failure.error, ESTALE);
  EXPECT_NE(failure.detail.find("cut"), std::string::npos);
}

TEST_F(FileTransferEndsTest, AFileThatIsGivenWithoutANameNeedsNone) {
  FileTransfer files(options());
  AlignedBuffer memory(8192);
  const int fd = open(dir_.path().c_str(), O_TMPFILE | O_RDWR, 0600);
  if (fd < 0) GTEST_SKIP() << "no O_TMPFILE";
  EXPECT_NO_THROW(files.write(fd, 0, on_host(memory.bytes())).wait());
  close(fd);
}

TEST_F(FileTransferEndsTest, WhatGoesThroughThePageCacheIsSyncedBeforeItEnds) {
  std::atomic<int> syncs = 0;
  int error = 0;
  script_->set_plan([&](std::size_t, const IoRequest& request) {
    if (request.op != IoRequest::Op::kSync) return Fault();
    ++syncs;
    return error == 0 ? Fault() : Fault::fail(error);
  });
  FileTransfer files(scripted());
  AlignedBuffer memory(256 << 10);
  files.write(path("x"), 0, on_host(memory.bytes())).wait();
  EXPECT_EQ(syncs, 0);
  int expected = 0;
  for (const auto& [offset, length] :
       {std::pair{0, 1000}, {512, 8192}, {4096, (64 << 10) + 1}}) {
    const auto bytes = memory.bytes(0, static_cast<std::size_t>(length));
    const auto at = static_cast<std::uint64_t>(offset);
    error = 0;
    files.write(path("x"), at, on_host(bytes)).wait();
    EXPECT_EQ(syncs, ++expected);
    error = EIO;
    EXPECT_EQ(failure_of(files.write(path("x"), at, on_host(bytes))).error,
              EIO);
    EXPECT_EQ(syncs, ++expected);
    files.read(path("x"), at, on_host(bytes)).wait();
    EXPECT_EQ(syncs, expected);
  }
}

TEST_F(FileTransferEndsTest, WhatASyncHearsCountsForAllThatHadBegunToWrite) {
  // The kernel tells of a lost page once, whosever it was.
  script_->set_plan(
      [failed = false](std::size_t, const IoRequest& request) mutable {
        if (request.op != IoRequest::Op::kSync || failed) return Fault();
        failed = true;
        return Fault{.error = EIO, .hold = true};
      });
  FileTransfer files(scripted());
  AlignedBuffer memory(64 << 10);
  const auto bytes = on_host(memory.bytes(0, 1000));
  const SwapTicket first = files.write(path("x"), 0, bytes);
  while (script_->held() == 0) std::this_thread::yield();
  // Its write ends and it wants a sync, while that of the first runs.
  const SwapTicket second = files.write(path("x"), 8192, bytes);
  const SwapTicket elsewhere = files.write(path("y"), 0, bytes);
  EXPECT_NO_THROW(elsewhere.wait());
  while (script_->requests() < 5) std::this_thread::yield();
  EXPECT_FALSE(second.done());
  script_->release_all();
  EXPECT_EQ(failure_of(first).error, EIO);
  EXPECT_EQ(failure_of(second).error, EIO);
  EXPECT_NO_THROW(files.write(path("x"), 8192, bytes).wait());
}

TEST_F(FileTransferEndsTest,
       ADriveThatFailsIsNoticedWhereThePageCacheTakesAll) {
  expect_well_in_child([this]() -> std::string {
    // A file system on a loop device whose own file cannot grow any more. Its
    // blocks are those of the tmpfs: the loop driver takes a write that was cut
    // between two of them for a whole one.
    const std::string image = path("image").string();
    const std::string place = path("place").string();
    const auto run = [](const std::string& command) {
      return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
    };
    if (!test::own_mounts() ||
        mount("none", dir_.path().c_str(), "tmpfs", 0, "size=9m") != 0 ||
        !run("truncate -s 64M " + image) ||
        !run("mkfs.ext4 -q -m 0 -b 4096 -O ^has_journal " + image) ||
        !fs::create_directory(place) ||
        !run("mount -o loop " + image + " " + place)) {
      return test::skip("may not mount a loop device");
    }
    std::string wrong;
    int refused = 0;
    {
      FileTransfer files(options());
      std::vector<std::byte> bytes(3000);
      for (int i = 0; i < 3000 && wrong.empty() && refused < 20; ++i) {
        const std::string name = place + "/" + std::to_string(i);
        test::fill_pattern(bytes, static_cast<std::uint64_t>(i));
        try {
          files.write(name, 0, on_host(bytes)).wait();
        } catch (const IoError&) {
          ++refused;
          continue;
        }
        const int fd = open(name.c_str(), O_RDONLY | O_CLOEXEC);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        const bool whole = pread(fd, bytes.data(), bytes.size(), 0) ==
                           static_cast<ssize_t>(bytes.size());
        close(fd);
        if (!whole ||
            !test::holds_pattern(bytes, static_cast<std::uint64_t>(i))) {
          wrong = name + " was acknowledged and is not there";
        }
      }
    }
    run("umount -l " + place);
    if (!wrong.empty()) return wrong;
    return refused > 0 ? "" : "the drive never failed";
  });
}

TEST_F(FileTransferEndsTest, DeletedFilesCanBeLetGoOf) {
  FileTransfer files(options());
  AlignedBuffer memory(8192);
  for (const char* name : {"a", "b", "c"}) {
    files.write(path(name), 0, on_host(memory.bytes())).wait();
  }
  const std::uint64_t open = files.stats().descriptors;
  files.drop_deleted();
  EXPECT_EQ(files.stats().descriptors, open);
  fs::remove(path("a"));
  fs::rename(path("c"), path("b"));
  files.drop_deleted();
  EXPECT_EQ(files.stats().descriptors, open / 3);
  files.close();
  EXPECT_NO_THROW(files.drop_deleted());
}

TEST_F(FileTransferEndsTest,
       FewDescriptorsAndFilesThatComeAndGoNeverEndInAHang) {
  constexpr int kRounds = test::kSanitized ? 100 : 500;
  expect_well_in_child([this]() -> std::string {
    FileTransfer files(options());
    std::vector<std::byte> bytes(4 << 10);
    // From here on the engine has the descriptors that it needs.
    files.write(path(0), 0, on_host(bytes)).wait();
    fs::remove(path(0));
    int next = open("/dev/null", O_RDONLY);
    const auto limit = static_cast<rlim_t>(next) + 2;
    close(next);
    const rlimit few = {limit, limit};
    if (setrlimit(RLIMIT_NOFILE, &few) != 0) return "setrlimit";
    std::atomic<int> hung = 0;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        std::minstd_rand random(t + 1);
        const auto draw = [&random](unsigned below) {
          return static_cast<unsigned>(random()) % below;
        };
        const auto any = [&] { return path(static_cast<int>(draw(3))); };
        for (int round = 0; round < kRounds && hung == 0; ++round) {
          std::vector<SwapTicket> tickets;
          for (int i = 0; i < 4; ++i) {
            std::error_code ignored;
            const unsigned event = draw(4);
            if (event == 0) fs::remove(any(), ignored);
            if (event == 1) fs::rename(any(), any(), ignored);
            try {
              tickets.push_back(
                  files.write(any(), draw(2) * 1000, on_host(bytes)));
            } catch (const IoError&) {
              // The file may have gone in between.
            }
          }
          for (const SwapTicket& ticket : tickets) {
            if (!ticket.wait_for(std::chrono::seconds(20))) ++hung;
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    return hung == 0 ? "" : std::to_string(hung) + " operations hang";
  });
}

}  // namespace
}  // namespace torch_ext
