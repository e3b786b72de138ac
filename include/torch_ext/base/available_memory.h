#pragma once

#include <cstdint>
#include <filesystem>

namespace torch_ext {

/// Bytes of memory that this process may take before the kernel kills somebody
/// for it. This is what the kernel calls available, swap included, or what the
/// process's memory cgroups leave, if that is less. It holds for this moment
/// only: others take memory too. Where the kernel does not say, it is the
/// largest number. `root`: where /proc and /sys are. Threads: any; never fails.
std::uint64_t available_memory(const std::filesystem::path& root = "/");

}  // namespace torch_ext
