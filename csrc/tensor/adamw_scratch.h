#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// Gives host memory for a call of a kernel. It is asked for in each call.
using MakeScratch = std::function<std::span<std::byte>()>;

/// Host memory for one chunk of elements on their way, or for two.
class AdamWScratch {
 public:
  static constexpr std::size_t kMostChunks = 2;

  explicit AdamWScratch(std::span<std::byte> memory, std::size_t chunks = 1)
      : chunk_(
            align_down(memory.size() / (4 + 10 * chunks), StateFields::kCut)) {
    std::byte* next = memory.data();
    const auto take = [&](std::size_t element) {
      return std::exchange(next, next + element * chunk_);
    };
    state_ = take(4);
    for (std::size_t i = 0; i < chunks; ++i) {
      gradients_.at(i) = take(4);
      staging_.at(i) = take(4);
      gradients_16_.at(i) = take(2);
    }
  }

  /// The memory of a chunk's elements from `element` on.
  AdamWScratch from(std::uint64_t element) const {
    AdamWScratch rest = *this;
    rest.chunk_ -= element;
    rest.state_ += 4 * element;
    for (std::size_t i = 0; i < kMostChunks; ++i) {
      if (gradients_[i] == nullptr) continue;
      rest.gradients_[i] += 4 * element;
      rest.staging_[i] += 4 * element;
      rest.gradients_16_[i] += 2 * element;
    }
    return rest;
  }

  /// How many elements a chunk has. For each there are parts of 4 bytes and of
  /// 2 bytes.
  std::uint64_t chunk() const { return chunk_; }
  float* gradient(std::size_t i = 0) const {
    return reinterpret_cast<float*>(gradients_.at(i));
  }
  /// The place of 16-bit gradients from a device.
  std::byte* gradient_16(std::size_t i) const { return gradients_16_.at(i); }
  /// The place of parameters from a device.
  std::span<std::byte> staging(std::size_t i = 0) const {
    return {staging_.at(i), 4 * chunk_};
  }
  /// The place of state as float.
  float* state() const { return reinterpret_cast<float*>(state_); }

 private:
  std::uint64_t chunk_;
  std::byte* state_ = nullptr;
  std::array<std::byte*, kMostChunks> gradients_ = {};
  std::array<std::byte*, kMostChunks> staging_ = {};
  std::array<std::byte*, kMostChunks> gradients_16_ = {};
};

}  // namespace torch_ext
