// Trainings with commits on real file systems, in whose midst the power is cut.
//
// PowerCutFaults shuts the file system down: what is only in its log's buffers
// is gone. That is names, sizes, and which blocks have been written. It cannot
// see whether the drive was asked to flush.
//
// VolatileDriveFaults has a drive under the file system that loses what was
// not flushed.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/ioctl.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "support/child.h"
#include "support/commit_victim.h"
#include "support/forgetful_drive.h"
#include "support/temp_dir.h"
#include "support/trials.h"

namespace torch_ext {
namespace {

bool run(const std::string& command) {
  return std::system(
             ("PATH=$PATH:/sbin:/usr/sbin; " + command + " >/dev/null 2>&1")
                 .c_str()) == 0;
}

/// A file system in a file, mounted where only this process sees it. Its loop
/// device goes when the process does, at the latest. With a seed, there is a
/// drive in between that forgets.
class LoopMount {
 public:
  /// Errors: std::runtime_error that says what the machine lacks.
  explicit LoopMount(const std::string& type,
                     std::optional<std::uint64_t> seed = std::nullopt)
      : type_(type),
        image_(dir_ / "image"),
        place_(dir_ / "place"),
        fuse_(dir_ / "fuse") {
    std::filesystem::create_directory(place_);
    std::filesystem::create_directory(fuse_);
    const std::string size = type == "xfs" ? "300M" : "128M";
    if (!test::own_mounts()) throw std::runtime_error("may not mount");
    if (!run("command -v mkfs." + type)) {
      throw std::runtime_error("there is no mkfs." + type);
    }
    if (!run("truncate -s " + size + " " + image_.string() + " && mkfs." +
             type + " -q " + image_.string())) {
      throw std::runtime_error("mkfs." + type + " failed");
    }
    if (seed) drive_.emplace(image_, fuse_, *seed);
    if (!mount()) throw std::runtime_error("may not mount a loop device");
  }
  LoopMount(const LoopMount&) = delete;
  LoopMount& operator=(const LoopMount&) = delete;
  ~LoopMount() { umount2(place_.c_str(), MNT_DETACH); }

  /// The blocks that the drive has lost.
  std::uint64_t lost() const { return drive_ ? drive_->lost() : 0; }

  const std::filesystem::path& path() const { return place_; }

  /// Ends the file system as it is, without what its log has not written.
  /// Returns false if it cannot.
  bool shut_down() {
    if (drive_) {
      drive_->cut();
      return true;
    }
    constexpr std::uint32_t kWithoutLog = 2;
    std::uint32_t how = kWithoutLog;
    const int fd = open(place_.c_str(), O_RDONLY | O_CLOEXEC);
    const bool done = ioctl(fd, _IOR('X', 125, std::uint32_t), &how) == 0;
    close(fd);
    return done;
  }

  /// Mounts it again, as after a power cut.
  void restart() {
    // The kernel may close a dead process's files a little later.
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (umount2(place_.c_str(), 0) != 0) {
      if (std::chrono::steady_clock::now() > end) {
        throw std::runtime_error("umount failed");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (drive_) drive_->restart();
    if (!mount()) throw std::runtime_error("it cannot be mounted again");
  }

 private:
  bool mount() const {
    const auto& file = drive_ ? drive_->file() : image_;
    return run("mount -t " + type_ + " -o loop " + file.string() + " " +
               place_.string());
  }

  const test::TempDir dir_;
  const std::string type_;
  const std::filesystem::path image_;
  const std::filesystem::path place_;
  const std::filesystem::path fuse_;
  std::optional<test::ForgetfulDrive> drive_;
};

/// Cuts the power of one file system some times. Returns what is wrong.
std::string cut_power(const std::string& type, bool forgets, std::size_t round,
                      int cuts, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::unique_ptr<LoopMount> disk;
  try {
    disk = std::make_unique<LoopMount>(
        type, forgets ? std::optional(seed) : std::nullopt);
  } catch (const std::runtime_error& error) {
    return test::skip(error.what());
  }
  constexpr std::array kBuffers = {3, 13, 10, 40};
  std::size_t acknowledged = 0;
  for (int done = 0; done < cuts; ++round) {
    const auto folder = disk->path() / std::to_string(round);
    std::filesystem::create_directory(folder);
    sync();  // What was there before the training is the user's.
    test::CommitVictim victim({folder}, kBuffers[round % kBuffers.size()],
                              1 + round % 2, "threads");
    victim.cut = [&] {
      if (!disk->shut_down()) _exit(5);
    };
    victim.restart = [&] { disk->restart(); };
    for (const test::Kill& kill : test::plan_kills(round, 1, random)) {
      if (done++ == cuts) break;
      if (std::string wrong = victim.suffer(kill); !wrong.empty()) {
        return wrong + " (round " + std::to_string(round) + ", cut at '" +
               std::string(kill.point) + "', pass " +
               std::to_string(kill.pass) + ")";
      }
    }
    acknowledged += victim.acknowledged();
    std::filesystem::remove_all(folder);
  }
  std::printf("[  FAULTS  ] %s: %d power cuts, %zu commits acknowledged",
              type.c_str(), cuts, acknowledged);
  if (forgets) {
    std::printf(", %llu blocks lost",
                static_cast<unsigned long long>(disk->lost()));
  }
  std::printf("\n");
  std::fflush(stdout);
  if (forgets && disk->lost() == 0) return "the drive has lost nothing";
  return acknowledged > 0 ? "" : "nothing was committed";
}

class PowerCutFaults : public testing::TestWithParam<const char*> {};

TEST_P(PowerCutFaults, AFileSystemThatIsShutDownLosesNoCommit) {
  const int cuts = test::all_faults() ? 20 : 12;
  const std::size_t times = test::all_faults() ? 20 : 1;
  for (std::size_t i = 0; i < times && !HasFailure() && !IsSkipped(); ++i) {
    const std::uint64_t seed = test::all_faults() ? std::random_device()() : 1;
    test::expect_well_in_child(
        [&] { return cut_power(GetParam(), false, 3 + i * 5, cuts, seed); });
  }
}

TEST(VolatileDriveFaults, WhatADriveDoesNotFlushIsNotCountedOn) {
  if (!test::all_faults()) GTEST_SKIP() << "only in the long form";
  for (std::size_t i = 0; i < 20 && !HasFailure() && !IsSkipped(); ++i) {
    const std::uint64_t seed = std::random_device()();
    test::expect_well_in_child(
        [&] { return cut_power("ext4", true, i * 5, 20, seed); });
  }
}

INSTANTIATE_TEST_SUITE_P(FileSystems, PowerCutFaults,
                         testing::Values("ext4", "xfs"), [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
