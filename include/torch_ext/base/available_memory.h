#pragma once

#include <cstdint>
#include <filesystem>

namespace torch_ext {

/// Bytes of memory that this process may take before somebody is killed for
/// it: what the kernel calls available, swap included, or what its memory
/// cgroups leave, if that is less. As of now: others take memory too. The
/// largest number where the kernel does not say. `root`: where /proc and /sys
/// are. Threads: any; never fails.
std::uint64_t available_memory(const std::filesystem::path& root = "/");

}  // namespace torch_ext
