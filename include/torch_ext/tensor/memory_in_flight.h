#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace torch_ext {

/// A storage that cannot be resized while one of these lives: PyTorch raises
/// where somebody tries, as it does for memory that is not its own. Holds no
/// reference, so that any thread may drop it. Threads: any.
class StorageLock {
 public:
  explicit StorageLock(c10::StorageImpl* storage) : storage_(storage) {
    const std::lock_guard lock(mutex());
    const auto known = holders().find(storage_);
    if (known != holders().end()) {
      ++known->second;
    } else if (storage_->resizable()) {
      holders().emplace(storage_, 1);
      storage_->set_resizable(false);
    } else {
      storage_ = nullptr;  // Whose memory it is has seen to it.
    }
  }
  ~StorageLock() {
    if (storage_ == nullptr) return;
    const std::lock_guard lock(mutex());
    const auto known = holders().find(storage_);
    if (--known->second > 0) return;
    holders().erase(known);
    storage_->set_resizable(true);
  }
  StorageLock(const StorageLock&) = delete;
  StorageLock& operator=(const StorageLock&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::unordered_map<c10::StorageImpl*, std::size_t>& holders() {
    static std::unordered_map<c10::StorageImpl*, std::size_t> holders;
    return holders;
  }

  c10::StorageImpl* storage_;
};

/// The memory of tensors that operations use: it stays where it is, and what
/// one of them writes no other one reads or writes. Threads: any.
class MemoryInFlight {
 public:
  /// To be kept while the memory is read, and no longer than the storage.
  /// Errors: std::invalid_argument if an operation writes to it.
  std::shared_ptr<void> source(const at::Tensor& tensor,
                               const std::string& operation) const {
    {
      const std::lock_guard lock(written_->mutex);
      check(begin_of(tensor), end_of(tensor), operation);
    }
    return lock_of(tensor);
  }

  /// The same while it is written. `packed`: the elements are without gaps;
  /// views with gaps may lie within each other, and are not compared.
  std::shared_ptr<void> destination(const at::Tensor& tensor, bool packed,
                                    const std::string& operation) {
    std::shared_ptr<void> storage = lock_of(tensor);
    const std::uintptr_t begin = begin_of(tensor), end = end_of(tensor);
    if (!packed || begin == end) return storage;
    const std::lock_guard lock(written_->mutex);
    check(begin, end, operation);
    written_->ranges.emplace(begin, end);
    return {nullptr, [begin, storage, written = written_](void*) {
              const std::lock_guard at_end(written->mutex);
              written->ranges.erase(begin);
            }};
  }

 private:
  struct Ranges {
    std::mutex mutex;
    std::map<std::uintptr_t, std::uintptr_t> ranges;  ///< Begin, end.
  };

  static std::uintptr_t begin_of(const at::Tensor& tensor) {
    return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  }
  static std::uintptr_t end_of(const at::Tensor& tensor) {
    return begin_of(tensor) + tensor.nbytes();
  }
  static std::shared_ptr<void> lock_of(const at::Tensor& tensor) {
    return std::make_shared<StorageLock>(
        tensor.storage().unsafeGetStorageImpl());
  }

  void check(std::uintptr_t begin, std::uintptr_t end,
             const std::string& operation) const {
    const auto next = written_->ranges.lower_bound(end);
    if (next == written_->ranges.begin() || begin == end) return;
    if (std::prev(next)->second <= begin) return;
    throw std::invalid_argument(
        operation +
        ": the tensor's memory is the destination of an operation that has "
        "not ended; wait for it first");
  }

  const std::shared_ptr<Ranges> written_ = std::make_shared<Ranges>();
};

}  // namespace torch_ext
