// Trainings with commits on a file system that is shut down in their midst, as
// a power cut would: what is only in its journal's buffers is gone. That is
// names, sizes, and which blocks have been written. It cannot see whether the
// drive was asked to flush: ForgetfulDisk does.

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
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "support/child.h"
#include "support/commit_victim.h"
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
/// device goes when the process does, at the latest.
class LoopMount {
 public:
  /// Errors: std::runtime_error that says what the machine lacks.
  explicit LoopMount(const std::string& type)
      : type_(type), image_(dir_ / "image"), place_(dir_ / "place") {
    std::filesystem::create_directory(place_);
    const std::string size = type == "xfs" ? "300M" : "128M";
    if (!test::own_mounts()) throw std::runtime_error("may not mount");
    if (!run("command -v mkfs." + type)) {
      throw std::runtime_error("there is no mkfs." + type);
    }
    if (!run("truncate -s " + size + " " + image_.string() + " && mkfs." +
             type + " -q " + image_.string())) {
      throw std::runtime_error("mkfs." + type + " failed");
    }
    if (!mount()) throw std::runtime_error("may not mount a loop device");
  }
  LoopMount(const LoopMount&) = delete;
  LoopMount& operator=(const LoopMount&) = delete;
  ~LoopMount() { umount2(place_.c_str(), MNT_DETACH); }

  const std::filesystem::path& path() const { return place_; }

  /// Ends the file system as it is, without what its log has not written.
  /// Returns false if it cannot.
  bool shut_down() const {
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
    if (!mount()) throw std::runtime_error("it cannot be mounted again");
  }

 private:
  bool mount() const {
    return run("mount -t " + type_ + " -o loop " + image_.string() + " " +
               place_.string());
  }

  const test::TempDir dir_;
  const std::string type_;
  const std::filesystem::path image_;
  const std::filesystem::path place_;
};

/// Cuts the power of one file system some times. Returns what is wrong.
std::string cut_power(const std::string& type, std::size_t round, int cuts,
                      std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::unique_ptr<LoopMount> disk;
  try {
    disk = std::make_unique<LoopMount>(type);
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
  std::printf("[  FAULTS  ] %s: %d power cuts, %zu commits acknowledged\n",
              type.c_str(), cuts, acknowledged);
  std::fflush(stdout);
  return acknowledged > 0 ? "" : "nothing was committed";
}

class PowerCutFaults : public testing::TestWithParam<const char*> {};

TEST_P(PowerCutFaults, AFileSystemThatIsShutDownLosesNoCommit) {
  const int cuts = test::all_faults() ? 20 : 12;
  const std::size_t times = test::all_faults() ? 20 : 1;
  for (std::size_t i = 0; i < times && !HasFailure() && !IsSkipped(); ++i) {
    const std::uint64_t seed = test::all_faults() ? std::random_device()() : 1;
    test::expect_well_in_child(
        [&] { return cut_power(GetParam(), 3 + i * 5, cuts, seed); });
  }
}

INSTANTIATE_TEST_SUITE_P(FileSystems, PowerCutFaults,
                         testing::Values("ext4", "xfs"), [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
