// Processes killed at random moments: what they were told is written is in the
// files of the caller, and scratch leaves neither a file nor its space.

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/child.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;
using test::AlignedBuffer;

constexpr std::size_t kFiles = 4;
constexpr std::size_t kSize = 150'001;
constexpr std::uint64_t kOffset = 100;

/// What a child says of version `version` of a file.
struct Message {
  enum Kind : std::uint32_t { kBegins, kIsWritten } kind;
  std::uint32_t file;
  std::uint64_t version;
};

/// The last that was heard of a file.
struct Heard {
  std::uint64_t begun = 0;
  std::uint64_t written = 0;  ///< 0: none.
};

std::uint64_t seed_of(std::size_t file, std::uint64_t version) {
  return file * 1'000'000 + version;
}

fs::path path_of(const fs::path& directory, std::size_t file) {
  return directory / std::to_string(file);
}

/// Rewrites the files until it is killed.
void write_files(const fs::path& directory, const std::string& engine,
                 int told) {
  FileTransferOptions options;
  options.aio.block_size = 64 << 10;
  options.engine = engine;
  options.host_memory = 1 << 20;
  FileTransfer files(options);
  std::vector<AlignedBuffer> memory;
  for (std::size_t i = 0; i < kFiles; ++i) memory.emplace_back(kSize);
  const auto tell = [&](Message::Kind kind, std::size_t file,
                        std::uint64_t version) {
    const Message message{kind, static_cast<std::uint32_t>(file), version};
    return write(told, &message, sizeof(message)) == sizeof(message);
  };
  for (std::uint64_t version = 1;; ++version) {
    std::vector<SwapTicket> tickets;
    for (std::size_t i = 0; i < kFiles; ++i) {
      test::fill_pattern(memory[i].bytes(), seed_of(i, version));
      if (!tell(Message::kBegins, i, version)) return;
      tickets.push_back(files.write(path_of(directory, i), kOffset,
                                    {host_device(), memory[i].data(), kSize}));
    }
    for (std::size_t i = 0; i < kFiles; ++i) {
      tickets[i].wait();
      if (!tell(Message::kIsWritten, i, version)) return;
    }
  }
}

/// Runs `work` in a child with the writing end of a pipe, kills it `time` after
/// its first `messages`, and hands all that it wrote to `heard`.
void kill_after(std::size_t messages, std::chrono::microseconds time,
                const std::function<void(int)>& work,
                const std::function<void(const Message&)>& heard) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    close(ends[0]);
    work(ends[1]);
    _exit(1);
  }
  close(ends[1]);
  Message message;
  for (std::size_t i = 0; i < messages; ++i) {
    ASSERT_EQ(read(ends[0], &message, sizeof(message)),
              static_cast<ssize_t>(sizeof(message)));
    heard(message);
  }
  const auto end = std::chrono::steady_clock::now() + time;
  bool killed = false;
  while (true) {
    pollfd ready = {ends[0], POLLIN, 0};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        end - std::chrono::steady_clock::now());
    if (!killed && (left.count() < 0 ||
                    poll(&ready, 1, static_cast<int>(left.count())) == 0)) {
      // Between two milliseconds.
      std::this_thread::sleep_until(end);
      ASSERT_EQ(kill(child, SIGKILL), 0);
      killed = true;
    }
    if (read(ends[0], &message, sizeof(message)) != sizeof(message)) break;
    heard(message);
  }
  close(ends[0]);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
      << "the child ended by itself";
}

/// Whether each byte of the file's range is of one of the versions that it may
/// hold: the acknowledged one, or one that was being written.
bool holds_a_version(const fs::path& path, std::size_t file, Heard heard) {
  AlignedBuffer memory(kSize);
  std::ifstream stream(path, std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(kOffset));
  stream.read(reinterpret_cast<char*>(memory.data()), kSize);
  if (stream.gcount() != static_cast<std::streamsize>(kSize)) return false;
  if (heard.begun == heard.written) {
    return test::holds_pattern(memory.bytes(), seed_of(file, heard.written));
  }
  AlignedBuffer old(kSize);
  AlignedBuffer next(kSize);
  test::fill_pattern(old.bytes(), seed_of(file, heard.written));
  test::fill_pattern(next.bytes(), seed_of(file, heard.begun));
  for (std::size_t i = 0; i < kSize; ++i) {
    const std::byte byte = memory.data()[i];
    if (byte != old.data()[i] && byte != next.data()[i]) return false;
  }
  return true;
}

class KillFaults : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string reason = engine_unavailable_reason(GetParam());
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
  static int kills() { return test::all_faults() ? 300 : 20; }
  std::chrono::microseconds moment() {
    return std::chrono::microseconds(
        static_cast<int>(1000 + random_() % 40'000));
  }

  std::mt19937_64 random_{std::random_device()()};
};

TEST_P(KillFaults, NamedFilesHoldEveryAcknowledgedByte) {
  std::size_t acknowledged = 0;
  std::size_t exact = 0;
  for (int i = 0; i < kills(); ++i) {
    const test::TempDir directory;
    std::array<Heard, kFiles> heard;
    // On a busy machine a first write may take longer than any moment, so that
    // every second child lives until one of its writes is acknowledged.
    kill_after(
        i % 2 == 0 ? 1 : kFiles + 1, moment(),
        [&](int told) { write_files(directory.path(), GetParam(), told); },
        [&](const Message& message) {
          Heard& file = heard.at(message.file);
          const bool begins = message.kind == Message::kBegins;
          (begins ? file.begun : file.written) = message.version;
          acknowledged += begins ? 0u : 1u;
        });
    for (std::size_t file = 0; file < kFiles; ++file) {
      if (heard[file].written == 0) continue;
      exact += heard[file].begun == heard[file].written ? 1u : 0u;
      EXPECT_TRUE(
          holds_a_version(path_of(directory.path(), file), file, heard[file]))
          << "kill " << i << ", file " << file << ", version "
          << heard[file].written;
    }
  }
  std::printf(
      "[  FAULTS  ] %s: %d kills, %zu writes acknowledged, %zu files checked "
      "to the byte\n",
      GetParam(), kills(), acknowledged, exact);

  EXPECT_GT(acknowledged, 0u);
}

/// Swaps out and in until it is killed.
void swap_for_ever(const fs::path& directory, const std::string& engine,
                   int told) {
  SwapperOptions options;
  options.store.directory = directory;
  options.store.aio.block_size = 64 << 10;
  options.store.engine = engine;
  options.host_memory = 1 << 20;
  Swapper swapper(options);
  AlignedBuffer memory(kSize);
  for (std::uint64_t version = 1;; ++version) {
    test::fill_pattern(memory.bytes(), version);
    const std::string key = std::to_string(version % 8);
    const DeviceBytes bytes{host_device(), memory.data(), kSize};
    swapper.swap_out(key, bytes).wait();
    swapper.swap_in(key, bytes).wait();
    const Message message{Message::kIsWritten, 0, version};
    if (write(told, &message, sizeof(message)) != sizeof(message)) return;
  }
}

std::uint64_t free_blocks(const fs::path& directory) {
  struct statvfs space = {};
  EXPECT_EQ(statvfs(directory.c_str(), &space), 0);
  return space.f_bfree;
}

/// Kills some; empty if they have left nothing. Its mounts are its own, so that
/// nobody else changes how much is free.
std::string kill_swappers(
    int kills, const std::string& engine,
    const std::function<std::chrono::microseconds()>& moment) {
  const test::TempDir parent;
  const fs::path& place = parent.path();
  if (!test::own_mounts() ||
      mount("none", place.c_str(), "tmpfs", 0, "size=64m") != 0) {
    return test::skip("no file system may be mounted here");
  }
  const std::uint64_t before = free_blocks(place);
  for (int i = 0; i < kills; ++i) {
    std::size_t swaps = 0;
    kill_after(
        1, moment(), [&](int told) { swap_for_ever(place, engine, told); },
        [&](const Message&) { ++swaps; });
    if (testing::Test::HasFailure() || swaps == 0) return "nothing was swapped";
    if (!fs::is_empty(place)) return "a file is left";
    // The kernel closes a ring's files some time after its process.
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (free_blocks(place) != before) {
      if (std::chrono::steady_clock::now() > end) return "space is left";
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  umount(place.c_str());
  return "";
}

TEST_P(KillFaults, ScratchLeavesNoFileAndNoSpaceBehind) {
  for (int killed = 0; killed < kills(); killed += 20) {
    const std::uint64_t seed = random_();
    test::expect_well_in_child([&] {
      random_.seed(seed);
      return kill_swappers(20, GetParam(), [this] { return moment(); });
    });
    if (IsSkipped() || HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, KillFaults,
                         testing::Values("libaio", "io_uring", "threads"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
