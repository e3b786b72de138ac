#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace torch_ext {

/// State of a run of one parameter's elements, in memory while an
/// UpdateKernel works on it.
struct StateSegment {
  static constexpr std::size_t kMaxFields = 3;
  /// Parameters are cut at multiples of this many elements only: torch's
  /// fused kernels round the last elements of a tensor, fewer than a vector,
  /// differently from the others.
  static constexpr std::uint64_t kCut = 64;

  std::size_t parameter = 0;  ///< As add_parameter() returned it.
  std::uint64_t first = 0;    ///< Element of the parameter; multiple of kCut.
  std::uint64_t count = 0;    ///< Elements.
  std::uint64_t step = 0;     ///< The parameter's steps, this one included.
  /// `count` floats each, at multiples of 64 bytes; null beyond the
  /// parameter's fields. Zeros when the state is new.
  std::array<float*, kMaxFields> fields = {};
};

/// What is done to state while it is in memory.
class UpdateKernel {
 public:
  virtual ~UpdateKernel() = default;

  /// Works on segments of one tile, in place, on the thread that called
  /// OptimizerOffload. No two are of one parameter's same elements. Errors:
  /// any; the state is lost then.
  virtual void update(std::span<const StateSegment> segments) = 0;
};

}  // namespace torch_ext
