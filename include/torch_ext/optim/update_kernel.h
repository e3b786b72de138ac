#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// The state of a run of one parameter's elements, in memory while an
/// UpdateKernel works on it.
struct StateSegment {
  std::size_t parameter = 0;  ///< As add_parameter() returned it.
  std::uint64_t first =
      0;  ///< Index of the first element; a multiple of StateFields::kCut.
  std::uint64_t count = 0;  ///< Elements.
  std::uint64_t step = 0;   ///< The parameter's steps, this one included.
  /// Aligned to 64 bytes. Null where the parameter has no such field. New state
  /// is zeros.
  std::array<std::byte*, StateFields::kMax> fields = {};

  /// A field as an array of its elements.
  template <typename T = float>
  T* field(std::size_t i) const {
    return reinterpret_cast<T*>(fields[i]);
  }
};

/// Works on state while it is in memory.
class UpdateKernel {
 public:
  virtual ~UpdateKernel() = default;

  /// A thread of OptimizerOffload calls this before it calls update(): in each
  /// step that begin_step() began, and in each commit that start_commit()
  /// began.
  virtual void enter_thread() {}

  /// Works on segments of one tile, in place. No two of them have elements in
  /// common. Threads: the one that called OptimizerOffload or, between
  /// begin_step() and end_step() and after start_commit(), OptimizerOffload's
  /// own. Errors: any; the state is lost then, but not where it is only read.
  virtual void update(std::span<const StateSegment> segments) = 0;
};

}  // namespace torch_ext
