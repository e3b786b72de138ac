#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>

namespace torch_ext::test {

/// Page-aligned heap memory of exactly `size` bytes, so that ASAN sees the
/// first byte beyond; filled with 0xA5.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(std::size_t size) : size_(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 4096, size) != 0) throw std::bad_alloc();
    data_.reset(static_cast<std::byte*>(memory));
    if (size != 0) std::memset(memory, 0xA5, size);
  }

  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  std::span<std::byte> bytes() const noexcept { return {data(), size_}; }
  std::span<std::byte> bytes(std::size_t from, std::size_t count) const {
    return bytes().subspan(from, count);
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const noexcept { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_;
};

}  // namespace torch_ext::test
