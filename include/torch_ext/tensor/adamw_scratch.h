#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// Host memory for a chunk of elements on their way, or for two.
class AdamWScratch {
 public:
  static constexpr std::size_t kMostChunks = 2;

  explicit AdamWScratch(std::span<std::byte> memory, std::size_t chunks = 1)
      : chunk_(align_down(memory.size() / (4 * (1 + 2 * chunks)),
                          StateFields::kCut)) {
    std::byte* next = memory.data();
    const auto take = [&] { return std::exchange(next, next + 4 * chunk_); };
    state_ = take();
    for (std::size_t i = 0; i < chunks; ++i) {
      gradients_.at(i) = take();
      staging_.at(i) = take();
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
    }
    return rest;
  }

  /// Elements of a chunk, for which there are parts of 4 bytes each.
  std::uint64_t chunk() const { return chunk_; }
  float* gradient(std::size_t i = 0) const {
    return reinterpret_cast<float*>(gradients_.at(i));
  }
  /// Where a whole chunk's gradients from a device come to: those of 16 bits
  /// share `staging` with parameters of 16 bits, and become floats in
  /// `gradient`.
  std::byte* brought_gradient(std::size_t i, std::size_t element_size) const {
    return element_size == 4 ? gradients_.at(i) : staging_.at(i) + 2 * chunk_;
  }
  /// Parameters from a device.
  std::span<std::byte> staging(std::size_t i = 0) const {
    return {staging_.at(i), 4 * chunk_};
  }
  /// State as float.
  float* state() const { return reinterpret_cast<float*>(state_); }

 private:
  std::uint64_t chunk_;
  std::byte* state_ = nullptr;
  std::array<std::byte*, kMostChunks> gradients_ = {};
  std::array<std::byte*, kMostChunks> staging_ = {};
};

}  // namespace torch_ext
