#include "torch_ext/base/available_memory.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "support/temp_dir.h"

namespace torch_ext {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

/// A machine with 1,000 MiB available, of which 200 are swap.
class AvailableMemoryTest : public testing::Test {
 protected:
  AvailableMemoryTest() {
    put("proc/meminfo",
        "MemTotal: 4096000 kB\nMemFree: 99 kB\n"
        "MemAvailable: 819200 kB\nSwapFree: 204800 kB\n");
  }

  void put(const std::string& name, const std::string& text) {
    const fs::path path = root_.path() / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }

  std::uint64_t mib() const { return available_memory(root_.path()) / kMiB; }

  test::TempDir root_;
};

TEST_F(AvailableMemoryTest, IsWhatTheKernelCallsSoAndSwap) {
  EXPECT_EQ(mib(), 1000u);
}

TEST_F(AvailableMemoryTest, WithoutThoseFilesNothingIsKnown) {
  const test::TempDir empty;
  EXPECT_EQ(available_memory(empty.path()),
            std::numeric_limits<std::uint64_t>::max());
}

TEST_F(AvailableMemoryTest, ACgroupThatLeavesLessCounts) {
  put("proc/self/cgroup", "0::/jobs/mine\n");
  put("sys/fs/cgroup/jobs/mine/memory.max", "104857600\n");
  put("sys/fs/cgroup/jobs/mine/memory.current", "73400320\n");
  put("sys/fs/cgroup/jobs/mine/memory.stat",
      "anon 41943040\ninactive_file 20971520\nactive_file 10485760\n");
  EXPECT_EQ(mib(), 60u);
}

TEST_F(AvailableMemoryTest, TheGroupsAboveItCountToo) {
  put("proc/self/cgroup", "0::/jobs/mine\n");
  put("sys/fs/cgroup/jobs/memory.max", "52428800\n");
  put("sys/fs/cgroup/jobs/memory.current", "41943040\n");
  put("sys/fs/cgroup/jobs/mine/memory.max", "max\n");
  put("sys/fs/cgroup/jobs/mine/memory.current", "41943040\n");
  EXPECT_EQ(mib(), 10u);
}

TEST_F(AvailableMemoryTest, TheFirstVersionOfCgroupsCountsAsWell) {
  put("proc/self/cgroup", "3:cpu:/x\n2:memory:/x\n1:name=systemd:/\n");
  put("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "104857600\n");
  put("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "104857600\n");
  put("sys/fs/cgroup/memory/x/memory.stat",
      "total_inactive_file 1048576\ntotal_active_file 1048576\n");
  EXPECT_EQ(mib(), 2u);
}

TEST_F(AvailableMemoryTest, InAContainerTheUppermostGroupIsItsOwn) {
  put("proc/self/cgroup", "0::/docker/0123\n");
  put("sys/fs/cgroup/memory.max", "104857600\n");
  put("sys/fs/cgroup/memory.current", "0\n");
  EXPECT_EQ(mib(), 100u);
}

TEST_F(AvailableMemoryTest, HereItIsSomethingAndNotEverything) {
  const std::uint64_t here = available_memory();
  EXPECT_GT(here, kMiB);
  EXPECT_LT(here, std::uint64_t{1} << 50);
}

}  // namespace
}  // namespace torch_ext
