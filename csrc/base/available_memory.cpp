#include "torch_ext/base/available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

namespace torch_ext {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

/// The number that a file holds. None for "max", and where there is no file.
std::optional<std::uint64_t> read_number(const fs::path& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (!(file >> number)) return std::nullopt;
  return number;
}

/// The sum of the numbers behind these two names. The file has a name and a
/// number on each line.
std::uint64_t sum_of(const fs::path& path, std::string_view one,
                     std::string_view other) {
  std::ifstream file(path);
  std::uint64_t sum = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    std::uint64_t number = 0;
    if (words >> name >> number && (name == one || name == other)) {
      sum += number;
    }
  }
  return sum;
}

/// The files in which a version of cgroups says what a group may take, and what
/// it has taken.
struct Files {
  const char* limit;
  const char* used;
  const char* file_pages[2];
};
constexpr Files kVersion1 = {"memory.limit_in_bytes",
                             "memory.usage_in_bytes",
                             {"total_inactive_file", "total_active_file"}};
constexpr Files kVersion2 = {
    "memory.max", "memory.current", {"inactive_file", "active_file"}};

std::uint64_t left_in(const fs::path& group, const Files& files) {
  const auto limit = read_number(group / files.limit);
  const auto used = read_number(group / files.used);
  if (!limit || !used) return kUnlimited;
  // Pages of files are given up before anybody is killed.
  const std::uint64_t given_up = std::min(
      *used,
      sum_of(group / "memory.stat", files.file_pages[0], files.file_pages[1]));
  const std::uint64_t kept = *used - given_up;
  return *limit > kept ? *limit - kept : 0;
}

/// The least that is left in a group and in those above it that can be seen. In
/// a container, the uppermost one that is seen is the container's own.
std::uint64_t left_along(const fs::path& mount, const std::string& path,
                         const Files& files) {
  std::uint64_t left = left_in(mount, files);
  fs::path group = mount;
  for (const fs::path& name : fs::path(path).relative_path()) {
    group /= name;
    left = std::min(left, left_in(group, files));
  }
  return left;
}

}  // namespace

std::uint64_t available_memory(const fs::path& root) {
  const std::uint64_t kib =
      sum_of(root / "proc/meminfo", "MemAvailable:", "SwapFree:");
  std::uint64_t left = kib == 0 ? kUnlimited : kib * 1024;
  const fs::path mount = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    // number:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers =
        "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") {
      left = std::min(left, left_along(mount, path, kVersion2));
    } else if (controllers.find(",memory,") != std::string::npos) {
      left = std::min(left, left_along(mount / "memory", path, kVersion1));
    }
  }
  return left;
}

}  // namespace torch_ext
