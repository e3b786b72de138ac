#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// State of a run of one parameter's elements, in memory while an
/// UpdateKernel works on it.
struct StateSegment {
  std::size_t parameter = 0;  ///< As add_parameter() returned it.
  std::uint64_t first =
      0;  ///< Element of the parameter; a multiple of StateFields::kCut.
  std::uint64_t count = 0;  ///< Elements.
  std::uint64_t step = 0;   ///< The parameter's steps, this one included.
  /// At multiples of 64 bytes; null where the parameter has no such field.
  /// Zeros when the state is new.
  std::array<std::byte*, StateFields::kMax> fields = {};

  /// A field as an array of its elements.
  template <typename T = float>
  T* field(std::size_t i) const {
    return reinterpret_cast<T*>(fields[i]);
  }
};

/// What is done to state while it is in memory.
class UpdateKernel {
 public:
  virtual ~UpdateKernel() = default;

  /// Called on a thread of OptimizerOffload before update() is, in each step
  /// that begin_step() began.
  virtual void enter_thread() {}

  /// Works on segments of one tile, in place, on the thread that called
  /// OptimizerOffload or, between begin_step() and end_step(), on its own. No
  /// two are of one parameter's same elements. Errors: any; the state is lost
  /// then.
  virtual void update(std::span<const StateSegment> segments) = 0;
};

}  // namespace torch_ext
