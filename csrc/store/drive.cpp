#include "drive.h"

#include <cerrno>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

// The file grows in steps, so that not every small extent costs a system call.
constexpr std::uint64_t kGrowth = std::uint64_t{16} << 20;

}  // namespace

std::optional<std::uint64_t> Drive::take_free(std::uint64_t bytes) {
  const MutexLock lock(mutex_);
  const auto offset = space_.take(bytes);
  if (offset) allocated_ += bytes;
  return offset;
}

std::optional<std::uint64_t> Drive::take(std::uint64_t bytes, bool may_grow) {
  if (!may_grow) return take_free(bytes);
  // Growing does not hold the lock of the space map, since those who must not
  // wait take that lock.
  const MutexLock one_grows(growth_mutex_);
  for (;;) {
    if (const auto offset = take_free(bytes)) return offset;
    MutexLock lock(mutex_);
    const std::uint64_t old_size = file_size_;
    const std::uint64_t tail = space_.tail(old_size);
    lock.unlock();
    if (tail >= bytes) continue;
    const std::uint64_t missing = bytes - tail;
    std::uint64_t growth = align_up(missing, kGrowth);
    try {
      file->reserve(old_size, growth);
    } catch (const IoError& error) {
      const bool limit = error.error() == ENOSPC || error.error() == EFBIG ||
                         error.error() == EDQUOT;
      if (!limit || growth == missing) throw;
      growth = missing;
      file->reserve(old_size, growth);
    }
    lock.lock();
    file_size_ += growth;
    space_.give(old_size, growth);
  }
}

void Drive::give(std::uint64_t offset, std::uint64_t bytes) {
  const MutexLock lock(mutex_);
  allocated_ -= bytes;
  space_.give(offset, bytes);
}

void Drive::trim() noexcept {
  const MutexLock one_grows(growth_mutex_);
  std::uint64_t size = 0;
  {
    const MutexLock lock(mutex_);
    const std::uint64_t tail = space_.tail(file_size_);
    if (tail == 0) return;
    file_size_ -= tail;
    space_.cut(file_size_);
    size = file_size_;
  }
  try {
    file->shrink(size);
  } catch (...) {
    // The file stays longer than it counts. It will grow from where it counts
    // to.
  }
}

void Drive::check_room(std::uint64_t bytes) const {
  MutexLock lock(mutex_);
  const std::uint64_t free = file_size_ - allocated_;
  lock.unlock();
  if (bytes > free) file->check_room(bytes - free);
}

void Drive::give_up(std::uint64_t bytes) {
  const MutexLock lock(mutex_);
  allocated_ -= bytes;
}

std::uint64_t Drive::allocated() const {
  const MutexLock lock(mutex_);
  return allocated_;
}

std::uint64_t Drive::file_size() const {
  const MutexLock lock(mutex_);
  return file_size_;
}

}  // namespace torch_ext
