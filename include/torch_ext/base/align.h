#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace torch_ext {

/// Smallest multiple of `unit` (> 0) that is >= `value`.
constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

/// Largest multiple of `unit` (> 0) that is <= `value`.
constexpr std::uint64_t align_down(std::uint64_t value, std::uint64_t unit) {
  return value / unit * unit;
}

constexpr bool is_aligned(std::uint64_t value, std::uint64_t unit) {
  return value % unit == 0;
}

inline bool is_aligned(const void* address, std::uint64_t unit) {
  return reinterpret_cast<std::uintptr_t>(address) % unit == 0;
}

/// Bytes of a page. Direct and buffered I/O may meet at its multiples, since
/// the page cache works in pages.
inline std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace torch_ext
