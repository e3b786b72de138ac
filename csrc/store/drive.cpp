#include "drive.h"

#include <cerrno>
#include <new>
#include <utility>

#include "base/cut_point.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/store/store.h"

namespace torch_ext {
namespace {

// The file grows in steps, so that not every small extent costs a system call.
constexpr std::uint64_t kGrowth = std::uint64_t{16} << 20;

}  // namespace

Drive::Drive(File scratch_or_other)
    : named_(std::make_shared<File>(std::move(scratch_or_other))),
      file(named_) {
  const std::uint64_t size = file->size();
  has_head_ = size > 0;
  if (size <= Store::kHeadBytes) return;
  file_size_ = size - Store::kHeadBytes;
  space_.give(0, file_size_);
}

std::optional<std::uint64_t> Drive::take_free(std::uint64_t bytes) {
  const MutexLock lock(mutex_);
  const auto offset = space_.take(bytes);
  if (!offset) return std::nullopt;
  allocated_ += bytes;
  return Store::kHeadBytes + *offset;
}

bool Drive::take_at(std::uint64_t offset, std::uint64_t bytes) {
  if (offset < Store::kHeadBytes) return false;
  const MutexLock lock(mutex_);
  if (!space_.take_at(offset - Store::kHeadBytes, bytes)) return false;
  allocated_ += bytes;
  return true;
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
      file->reserve(Store::kHeadBytes + old_size, growth);
    } catch (const IoError& error) {
      const bool limit = error.error() == ENOSPC || error.error() == EFBIG ||
                         error.error() == EDQUOT;
      if (!limit || growth == missing) throw;
      growth = missing;
      file->reserve(Store::kHeadBytes + old_size, growth);
    }
    cut_point("space reserved");
    lock.lock();
    file_size_ += growth;
    space_.give(old_size, growth);
  }
}

void Drive::give(std::uint64_t offset, std::uint64_t bytes) noexcept {
  const MutexLock lock(mutex_);
  allocated_ -= bytes;
  try {
    space_.give(offset - Store::kHeadBytes, bytes);
  } catch (const std::bad_alloc&) {
    // As after give_up(). A destructor calls this.
  }
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
    const bool empty = size == 0 && !has_head_;
    file->shrink(empty ? 0 : Store::kHeadBytes + size);
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
