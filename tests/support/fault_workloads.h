#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <span>
#include <string>

#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {

/// What a workload runs on.
struct WorkloadPlace {
  std::filesystem::path directory = {};  ///< See prepare().
  std::string engine = "auto";
  IoEngineFactory factory = {};  ///< Overrides `engine` where set.
  /// Takes the fault away. Called at the end, and with `repair_at_once` after
  /// the first error. Afterwards all must work again, unless `engine_is_lost`.
  std::function<void()> repair = {};
  bool repair_at_once = false;
  std::function<bool()> engine_is_lost = [] { return false; };
};

/// What came of it.
struct Outcome {
  std::size_t errors = 0;  ///< Reported: IoError with an errno, or bad_alloc.
  /// A promise that was broken: wrong bytes, an old value that is gone, an
  /// exception of another type, a wait without end. Else empty.
  std::string wrong = {};
};

/// A small use of one of the library's classes that compares every byte that
/// it reads with what the calls before it should have left.
struct Workload {
  const char* name;
  Outcome (*run)(const WorkloadPlace& place);
  /// Makes reads that nobody may come to need: their errors are nobody's.
  bool reads_ahead = false;
};

/// Puts into the directory what workloads expect there.
void prepare(const std::filesystem::path& directory);

/// Store, Swapper, FileTransfer, OptimizerOffload.
std::span<const Workload> workloads();

}  // namespace torch_ext::test
