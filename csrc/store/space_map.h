#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace torch_ext {

/// Which bytes of a file are free. Free neighbours are joined. The lowest space
/// that fits is taken, so that the end of the file becomes free. Threads: one
/// at a time.
class SpaceMap {
 public:
  std::optional<std::uint64_t> take(std::uint64_t bytes) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const auto [offset, size] = *it;
      if (size < bytes) continue;
      free_.erase(it);
      if (size > bytes) free_.emplace(offset + bytes, size - bytes);
      return offset;
    }
    return std::nullopt;
  }

  /// Takes these bytes. Returns false, and takes nothing, if some are not free.
  bool take_at(std::uint64_t offset, std::uint64_t bytes) {
    auto it = free_.upper_bound(offset);
    if (it == free_.begin()) return false;
    --it;
    const auto [begin, size] = *it;
    const std::uint64_t before = offset - begin;
    if (before > size || size - before < bytes) return false;
    if (before == 0) {
      free_.erase(it);
    } else {
      it->second = before;
    }
    if (size - before > bytes) {
      free_.emplace(offset + bytes, size - before - bytes);
    }
    return true;
  }

  void give(std::uint64_t offset, std::uint64_t bytes) {
    auto next = free_.upper_bound(offset);
    if (next != free_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        bytes += before->second;
        free_.erase(before);
      }
    }
    if (next != free_.end() && offset + bytes == next->first) {
      bytes += next->second;
      free_.erase(next);
    }
    free_.emplace(offset, bytes);
  }

  /// How many free bytes end at `end`. Space that the file gains there would
  /// join them.
  std::uint64_t tail(std::uint64_t end) const {
    if (free_.empty()) return 0;
    const auto last = std::prev(free_.end());
    return last->first + last->second == end ? last->second : 0;
  }

  /// Nothing from `end` on is free any more. REQUIRES: no free
  /// range has it inside.
  void cut(std::uint64_t end) {
    free_.erase(free_.lower_bound(end), free_.end());
  }

 private:
  std::map<std::uint64_t, std::uint64_t> free_;  // offset -> bytes
};

}  // namespace torch_ext
