#include "torch_ext/swap/file_transfer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "support/child.h"
#include "support/file_transfer_test.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::AlignedBuffer;
using test::expect_well_in_child;
using test::Fault;
using test::kMiB;
using test::Stream;

/// The failure that `call` throws; one with errno 0 if it throws none.
template <class Call>
IoFailure failure_of(Call call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.failure();
  }
  return {};
}

class FileTransferTest : public test::FileTransferTest {
 protected:
  static std::string bytes_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static std::string text_of(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
};

TEST_F(FileTransferTest, AnyLengthAtAnyOffsetAndAddressComesBack) {
  FileTransfer files(options());
  AlignedBuffer memory(6 * kMiB);
  std::uint64_t n = 0;
  for (const std::size_t size :
       {std::size_t{1}, std::size_t{511}, std::size_t{513}, std::size_t{4096},
        std::size_t{8191}, std::size_t{200'001}, 5 * kMiB + 1}) {
    for (const std::uint64_t offset : {0u, 1u, 512u, 4095u, 4096u, 70'000u}) {
      for (const std::size_t shift : {0u, 1u, 64u}) {
        const fs::path name = path(std::to_string(n++));
        const auto bytes = memory.bytes(shift, size);
        test::fill_pattern(bytes, n);
        files.write(name, offset, on_host(bytes)).wait();
        const std::string stored = bytes_of(name);
        ASSERT_EQ(stored.size(), offset + size);
        ASSERT_EQ(stored.find_first_not_of('\0'),
                  text_of(bytes).find_first_not_of('\0') + offset);
        ASSERT_EQ(stored.substr(offset), text_of(bytes));
        std::fill(bytes.begin(), bytes.end(), std::byte{0});
        files.read(name, offset, on_host(bytes)).wait();
        ASSERT_TRUE(test::holds_pattern(bytes, n));
        fs::remove(name);
      }
    }
  }
  EXPECT_EQ(files.stats().failures, 0u);
  EXPECT_EQ(files.stats().in_flight, 0u);
}

TEST_F(FileTransferTest, DeviceMemoryGoesThroughBuffersBehindItsStream) {
  FileTransfer files(options());
  const DeviceBytes source = on_device(10 * kMiB + 3, 7);
  files.write(path("x"), 5, source).wait();
  const DeviceBytes back = on_device(10 * kMiB + 3, 8);
  files.read(path("x"), 5, back).wait();
  device_->settle(Stream::kCopy);
  EXPECT_TRUE(holds(back, 7));
  EXPECT_LE(files.stats().host_bytes_peak, files.stats().host_bytes);
  EXPECT_GT(files.stats().host_bytes_peak, 0u);
}

TEST_F(FileTransferTest, AFileIsMadePrivateAndNeverTruncated) {
  FileTransfer files(options());
  AlignedBuffer memory(8192);
  files.write(path("x"), 0, on_host(memory.bytes())).wait();
  EXPECT_EQ(fs::status(path("x")).permissions(), fs::perms(0600));
  files.write(path("x"), 0, on_host(memory.bytes(0, 4096))).wait();
  EXPECT_EQ(fs::file_size(path("x")), 8192u);
  files.write(path("empty"), 0, on_host({})).wait();
  EXPECT_EQ(fs::file_size(path("empty")), 0u);
}

TEST_F(FileTransferTest, WhatIsWrongWithAFileIsAnErrorOfTheCall) {
  FileTransfer files(options());
  AlignedBuffer memory(8192);
  const DeviceBytes bytes = on_host(memory.bytes());
  fs::create_directory(path("directory"));
  fs::create_symlink(path("elsewhere"), path("link"));
  ASSERT_EQ(mkfifo(path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(failure_of([&] { files.read(path("no"), 0, bytes); }).error,
            ENOENT);
  EXPECT_EQ(failure_of([&] { files.write(path("no/x"), 0, bytes); }).error,
            ENOENT);
  EXPECT_EQ(failure_of([&] { files.write(path("directory"), 0, bytes); }).error,
            EISDIR);
  EXPECT_EQ(failure_of([&] { files.write(path("link"), 0, bytes); }).error,
            ELOOP);
  EXPECT_EQ(failure_of([&] { files.read(path("fifo"), 0, bytes); }).error,
            EINVAL);
  EXPECT_EQ(failure_of([&] { files.write(-1, 0, bytes); }).error, EBADF);
  EXPECT_FALSE(fs::exists(path("elsewhere")));
  EXPECT_THROW(files.write("", 0, bytes), std::invalid_argument);
  EXPECT_THROW(files.read(path("x"), std::uint64_t{1} << 63, bytes),
               std::invalid_argument);
  EXPECT_EQ(files.stats().operations, 0u);
  EXPECT_EQ(files.stats().in_flight, 0u);
}

TEST_F(FileTransferTest, AFileThatIsTooShortIsRefusedBeforeAnyByte) {
  FileTransfer files(options());
  AlignedBuffer memory(8192);
  test::fill_pattern(memory.bytes(), 1);
  files.write(path("x"), 0, on_host(memory.bytes(0, 5000))).wait();
  const IoFailure failure = failure_of(
      [&] { files.read(path("x"), 0, on_host(memory.bytes())).wait(); });
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.path, path("x").string());
  EXPECT_EQ(failure.length, 8192u);
  EXPECT_NE(failure.detail.find("5000"), std::string::npos);
  EXPECT_TRUE(test::holds_pattern(memory.bytes(), 1));
}

TEST_F(FileTransferTest, AFileThatIsReplacedIsOpenedAgain) {
  FileTransfer files(options());
  AlignedBuffer memory(4096);
  const auto write = [&](std::uint64_t seed) {
    test::fill_pattern(memory.bytes(), seed);
    files.write(path("d/x"), 0, on_host(memory.bytes())).wait();
    const std::string stored = bytes_of(path("d/x"));
    return stored == text_of(memory.bytes());
  };
  fs::create_directory(path("d"));
  EXPECT_TRUE(write(1));
  fs::remove_all(path("d"));
  EXPECT_EQ(failure_of([&] { write(2); }).error, ENOENT);
  fs::create_directory(path("d"));
  EXPECT_TRUE(write(3));
  fs::rename(path("d/x"), path("d/y"));
  EXPECT_TRUE(write(4));
  fs::rename(path("d/y"), path("d/x"));
  EXPECT_TRUE(write(5));
  files.read(path("d/x"), 0, on_host(memory.bytes())).wait();
  EXPECT_TRUE(test::holds_pattern(memory.bytes(), 5));
}

TEST_F(FileTransferTest, AtMost64DescriptorsAreOpenHoweverManyFilesThereAre) {
  // The first writes stay in flight, so their files stay in use.
  script_->set_plan([](std::size_t index, const IoRequest&) {
    return index == 0 ? Fault::held() : Fault();
  });
  FileTransferOptions one_at_a_time = scripted();
  one_at_a_time.aio.queue_depth = 1;
  FileTransfer files(one_at_a_time);
  const int before = open("/dev/null", O_RDONLY | O_CLOEXEC);
  AlignedBuffer memory(4096);
  test::fill_pattern(memory.bytes(), 3);
  std::vector<SwapTicket> tickets;
  for (int i = 0; i < 300; ++i) {
    const fs::path name = path(std::to_string(i));
    tickets.push_back(files.write(name, 0, on_host(memory.bytes())));
    EXPECT_LE(files.stats().descriptors, 64u);
  }
  EXPECT_EQ(files.stats().in_flight, 300u);
  script_->release(0);
  for (const SwapTicket& ticket : tickets) ticket.wait();
  EXPECT_LE(files.stats().descriptors, 64u);
  for (int i = 0; i < 300; ++i) {
    ASSERT_EQ(bytes_of(path(std::to_string(i))), text_of(memory.bytes()));
  }
  files.close();
  const int after = open("/dev/null", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(after, before + 1);
  close(before);
  close(after);
}

TEST_F(FileTransferTest, AnErrorOfTheDeviceReachesTheTicketAndOnlyThat) {
  script_->set_plan(test::only(1, Fault::fail(EIO)));
  FileTransfer files(scripted());
  AlignedBuffer memory(4096);
  const DeviceBytes bytes = on_host(memory.bytes());
  const SwapTicket good = files.write(path("good"), 0, bytes);
  good.wait();
  const SwapTicket bad = files.write(path("bad"), 4096, bytes);
  const IoFailure failure = failure_of([&] { bad.wait(); });
  EXPECT_EQ(failure.op, "pwrite");
  EXPECT_EQ(failure.path, path("bad").string());
  EXPECT_EQ(failure.offset, 4096u);
  EXPECT_EQ(failure.error, EIO);
  files.write(path("bad"), 4096, bytes).wait();
  EXPECT_EQ(files.stats().failures, 1u);
  EXPECT_NO_THROW(files.close());
}

TEST_F(FileTransferTest, AnErrorThatNobodyAskedForIsThrownByClose) {
  script_->set_plan(test::only(0, Fault::fail(EIO)));
  FileTransfer files(scripted());
  AlignedBuffer memory(4096);
  files.write(path("x"), 0, on_host(memory.bytes()));
  EXPECT_EQ(failure_of([&] { files.close(); }).error, EIO);
  EXPECT_NO_THROW(files.close());
  EXPECT_THROW(files.write(path("x"), 0, on_host(memory.bytes())), StateError);
}

TEST_F(FileTransferTest, AFullDiskIsAnErrorBeforeAnyByteAndIsUsedAgainLater) {
  expect_well_in_child([this]() -> std::string {
    const char* place = dir_.path().c_str();
    if (!test::own_mounts() ||
        mount("none", place, "tmpfs", 0, "size=4m") != 0) {
      return test::skip("may not mount");
    }
    FileTransfer files(options());
    std::vector<std::byte> bytes(3 * kMiB);
    files.write(path("a"), 0, on_host(bytes)).wait();
    const SwapTicket refused = files.write(path("b"), 0, on_host(bytes));
    const IoFailure failure = failure_of([&] { refused.wait(); });
    if (failure.error != ENOSPC) return errno_name(failure.error);
    if (fs::file_size(path("b")) != 0) return "bytes were written";
    fs::remove(path("a"));
    files.write(path("b"), 0, on_host(bytes)).wait();
    return fs::file_size(path("b")) == bytes.size() ? "" : "size";
  });
}

TEST_F(FileTransferTest, ManyThreadsShareOne) {
  FileTransfer files(options());
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      AlignedBuffer memory(100'000);
      for (int i = 0; i < 20; ++i) {
        const auto seed = static_cast<std::uint64_t>(t * 100 + i);
        const fs::path name = path(std::to_string(t) + "-" + std::to_string(i));
        test::fill_pattern(memory.bytes(), seed);
        files.write(name, seed, on_host(memory.bytes())).wait();
        std::fill(memory.bytes().begin(), memory.bytes().end(), std::byte{0});
        files.read(name, seed, on_host(memory.bytes())).wait();
        wrong += test::holds_pattern(memory.bytes(), seed) ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(FileTransferTest, ADescriptorOfTheCallerIsWrittenToAndStaysOpen) {
  FileTransfer files(options());
  AlignedBuffer memory(10'000);
  test::fill_pattern(memory.bytes(), 4);
  const int fd = open(path("x").c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  files.write(fd, 8, on_host(memory.bytes())).wait();
  EXPECT_EQ(fcntl(fd, F_GETFL) & O_DIRECT, 0);
  close(fd);
  EXPECT_EQ(bytes_of(path("x")).substr(8), text_of(memory.bytes()));
}

TEST_F(FileTransferTest, AForkedChildGetsAClearErrorAndMayDropIt) {
  auto files = std::make_unique<FileTransfer>(options());
  AlignedBuffer memory(4096);
  expect_well_in_child([&]() -> std::string {
    try {
      files->write(path("x"), 0, on_host(memory.bytes()));
    } catch (const StateError&) {
      files.reset();
      return "";
    }
    return "no error";
  });
  files->write(path("x"), 0, on_host(memory.bytes())).wait();
}

TEST_F(FileTransferTest, WrongOptionsAreRefused) {
  FileTransferOptions wrong = options();
  wrong.engine = "floppy";
  EXPECT_THROW(FileTransfer{wrong}, std::invalid_argument);
  wrong = options();
  wrong.aio.queue_depth = 0;
  EXPECT_THROW(FileTransfer{wrong}, std::invalid_argument);
}

}  // namespace
}  // namespace torch_ext
