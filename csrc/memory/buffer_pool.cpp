#include "torch_ext/memory/buffer_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"

namespace torch_ext {

struct BufferPool::State {
  State(std::size_t size, std::size_t buffers)
      : buffer_size(size), count(buffers) {
    free.reserve(buffers);
    base = map(size * buffers);
    // This only tunes. On a kernel without it the results are the same.
    madvise(base, size * buffers, MADV_DONTFORK);
    for (std::size_t i = buffers; i > 0; --i) {
      free.push_back(base + (i - 1) * size);
    }
  }

  ~State() {
    // A forked child does not have this mapping. What lies at its address there
    // is not ours.
    if (process_id() != owner) return;
    for (const auto& device : pinned) device->unpin(memory());
    unmap_pages(base, buffer_size * count);
  }

  static std::byte* map(std::size_t bytes) {
    try {
      return map_pages(bytes);
    } catch (const IoError& error) {
      IoFailure failure = error.failure();
      failure.detail = "memory for buffers: host_memory is too large";
      throw IoError(std::move(failure));
    }
  }

  std::span<std::byte> memory() const { return {base, buffer_size * count}; }

  void give_back(std::byte* data) {
    const MutexLock lock(mutex);
    free.push_back(data);
  }

  const std::size_t buffer_size;
  const std::size_t count;
  const pid_t owner = process_id();
  std::byte* base = nullptr;

  Mutex mutex;
  std::vector<std::byte*> free GUARDED_BY(mutex);
  std::size_t peak GUARDED_BY(mutex) = 0;
  std::vector<std::shared_ptr<Device>> pinned GUARDED_BY(mutex);
  std::map<std::string, std::string> pin_result GUARDED_BY(mutex);
};

Buffer::Buffer(Buffer&& other) noexcept
    : pool_(std::move(other.pool_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  Buffer old = std::move(*this);
  pool_ = std::move(other.pool_);
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) {
    static_cast<BufferPool::State*>(pool_.get())->give_back(data_);
  }
}

BufferPool::BufferPool(std::size_t buffer_size, std::size_t count) {
  if (buffer_size == 0 || !is_aligned(buffer_size, page_size()) || count == 0 ||
      count > std::numeric_limits<std::ptrdiff_t>::max() / buffer_size) {
    throw std::invalid_argument(
        "buffer pool: buffer_size must be a positive multiple of " +
        std::to_string(page_size()) + " and count at least 1, got " +
        std::to_string(buffer_size) + " x " + std::to_string(count));
  }
  state_ = std::make_shared<State>(buffer_size, count);
}

Buffer BufferPool::try_take() {
  Buffer buffer;
  const MutexLock lock(state_->mutex);
  if (state_->free.empty()) return buffer;
  buffer.data_ = state_->free.back();
  buffer.size_ = state_->buffer_size;
  buffer.pool_ = state_;
  state_->free.pop_back();
  state_->peak = std::max(state_->peak, state_->count - state_->free.size());
  return buffer;
}

std::string BufferPool::pin(std::shared_ptr<Device> device) {
  const std::string name = device->name();
  const std::string type = name.substr(0, name.find(':'));
  {
    const MutexLock lock(state_->mutex);
    if (auto known = state_->pin_result.find(type);
        known != state_->pin_result.end()) {
      return known->second;
    }
  }
  std::string reason;
  try {
    device->pin(state_->memory());
  } catch (const std::exception& error) {
    reason =
        "host buffers are not page-locked for " + name + ": " + error.what();
  }
  const MutexLock lock(state_->mutex);
  state_->pin_result[type] = reason;
  if (reason.empty()) state_->pinned.push_back(std::move(device));
  return reason;
}

std::size_t BufferPool::buffer_size() const noexcept {
  return state_->buffer_size;
}

std::size_t BufferPool::count() const noexcept { return state_->count; }

std::size_t BufferPool::in_use() const noexcept {
  const MutexLock lock(state_->mutex);
  return state_->count - state_->free.size();
}

std::size_t BufferPool::peak_in_use() const noexcept {
  const MutexLock lock(state_->mutex);
  return state_->peak;
}

std::span<std::byte> BufferPool::memory() const noexcept {
  return state_->memory();
}

}  // namespace torch_ext
