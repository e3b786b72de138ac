#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/mutex.h"
#include "space_map.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// What a store has in one of its directories: a file, and which bytes of it
/// are free. The first Store::kHeadBytes are never given out. Threads: any.
class Drive {
 public:
  /// A scratch file has nothing yet. All of another file is free, but for the
  /// head: take_at() says what is not. Errors: IoError.
  explicit Drive(File file);

  /// The offset of `bytes` bytes in the file, reserved on the disk. Null where
  /// the file would have to grow and `may_grow` is false. Errors: IoError;
  /// nothing has changed then.
  std::optional<std::uint64_t> take(std::uint64_t bytes, bool may_grow);
  /// Takes these bytes. Returns false if some are not free.
  bool take_at(std::uint64_t offset, std::uint64_t bytes);
  /// Makes space free again. Where host memory is short, the space is lost.
  void give(std::uint64_t offset, std::uint64_t bytes) noexcept;
  /// Gives the disk back what is free at the end of the file.
  void trim() noexcept;
  /// Errors: IoError (ENOSPC) where the file's free space and the disk clearly
  /// have no room for `bytes` bytes.
  void check_room(std::uint64_t bytes) const;
  /// Ends the use of space without offering it again.
  void give_up(std::uint64_t bytes);

  std::uint64_t allocated() const;  ///< Bytes taken and not given back.
  std::uint64_t file_size() const;  ///< Without the head.
  /// As File::give_name().
  void give_name(const std::string& name) {
    has_head_ = true;
    named_->give_name(name);
  }

 private:
  const std::shared_ptr<File> named_;

 public:
  const std::shared_ptr<const File> file;
  IoQueue* queue = nullptr;  ///< Its block device's; the store owns it.

 private:
  std::optional<std::uint64_t> take_free(std::uint64_t bytes);

  Mutex growth_mutex_ ACQUIRED_BEFORE(mutex_);
  mutable Mutex mutex_;
  SpaceMap space_ GUARDED_BY(mutex_);
  std::uint64_t allocated_ GUARDED_BY(mutex_) = 0;
  std::uint64_t file_size_ GUARDED_BY(mutex_) = 0;
  std::atomic<bool> has_head_ = false;  ///< Something is written there.
};

}  // namespace torch_ext
