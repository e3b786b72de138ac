#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "torch_ext/io/io_engine.h"

namespace torch_ext {

/// How often an engine submits again at once after EINTR. After that it reports
/// "no room now". Its owner tries again later, for a limited time.
constexpr int kMaxInterruptions = 100;

/// Moves as many completions as `out` has room for. Returns how many.
inline std::size_t take_first(std::vector<IoCompletion>& from,
                              std::span<IoCompletion> out) {
  const std::size_t count = std::min(out.size(), from.size());
  const auto end = from.begin() + static_cast<std::ptrdiff_t>(count);
  std::copy(from.begin(), end, out.begin());
  from.erase(from.begin(), end);
  return count;
}

/// Errors: IoError where the kernel refuses.
std::unique_ptr<IoEngine> make_libaio_engine(int depth);
/// Why the kernel has no AIO, or no room for one more engine; else empty.
std::string libaio_unavailable_reason();

/// Errors: IoError where the kernel refuses, or liburing was not built in.
std::unique_ptr<IoEngine> make_io_uring_engine(int depth);
/// Why no ring can be made and used; empty if one can.
std::string io_uring_unavailable_reason();

std::unique_ptr<IoEngine> make_thread_engine(int depth);

/// All engines of one factory share a disk.
IoEngineFactory make_memory_engine_factory();

std::unique_ptr<IoEngine> make_null_engine(int depth);

}  // namespace torch_ext
