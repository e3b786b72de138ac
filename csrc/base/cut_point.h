#pragma once

#include <atomic>
#include <string_view>

namespace torch_ext {

/// Tests set it, to end the process or to look at the drive where it matters.
inline std::atomic<void (*)(std::string_view name)> on_cut_point = nullptr;

/// A named point at which a crash must lose nothing.
inline void cut_point(std::string_view name) {
  if (auto* const call = on_cut_point.load(std::memory_order_relaxed)) {
    call(name);
  }
}

}  // namespace torch_ext
