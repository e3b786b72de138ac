#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// Host memory for a chunk of elements on their way, or for two.
class AdamWScratch {
 public:
  explicit AdamWScratch(std::span<std::byte> memory, std::size_t chunks = 1)
      : parts_(1 + 2 * chunks),
        small_(
            memory.first(align_down(std::min(memory.size() / 3, kSmall), 64))),
        large_(memory.subspan(small_.size())) {}

  /// For what is needed for a moment only.
  std::span<std::byte> small() const { return small_; }

  /// Elements of a chunk, for which there are parts of 4 bytes each.
  std::uint64_t chunk() const {
    return align_down(large_.size() / (4 * parts_), StateFields::kCut);
  }
  float* gradient(std::size_t i = 0) const {
    return reinterpret_cast<float*>(part(3 * i).data());
  }
  /// Parameters from a device.
  std::span<std::byte> staging(std::size_t i = 0) const {
    return part(3 * i + 1);
  }
  /// State as float.
  float* state() const { return reinterpret_cast<float*>(part(2).data()); }

 private:
  std::span<std::byte> part(std::size_t i) const {
    return large_.subspan(i * chunk() * 4, chunk() * 4);
  }

  static constexpr std::size_t kSmall = std::size_t{128} << 10;
  std::size_t parts_;
  std::span<std::byte> small_;
  std::span<std::byte> large_;
};

}  // namespace torch_ext
