#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "../base/mutex.h"

namespace torch_ext {

/// Keeps a storage from being resized while it lives. PyTorch raises if
/// somebody tries, as it does for memory that is not its own. It holds no
/// reference, so any thread may drop it. Threads: any.
class StorageLock {
 public:
  explicit StorageLock(c10::StorageImpl* storage) : storage_(storage) {
    All& all = known_storages();
    const MutexLock lock(all.mutex);
    const auto known = all.holders.find(storage_);
    if (known != all.holders.end()) {
      ++known->second;
    } else if (storage_->resizable() && storage_->allocator() != nullptr) {
      all.holders.emplace(storage_, 1);
      storage_->set_resizable(false);
    } else {
      // This storage cannot be resized anyway. Shared memory calls itself
      // resizable and is not: it has no allocator.
      storage_ = nullptr;
    }
  }
  ~StorageLock() {
    if (storage_ == nullptr) return;
    All& all = known_storages();
    const MutexLock lock(all.mutex);
    const auto known = all.holders.find(storage_);
    if (--known->second > 0) return;
    all.holders.erase(known);
    // share_memory_() may have taken the allocator away meanwhile.
    if (storage_->allocator() != nullptr) storage_->set_resizable(true);
  }
  StorageLock(const StorageLock&) = delete;
  StorageLock& operator=(const StorageLock&) = delete;

 private:
  struct All {
    Mutex mutex;
    std::unordered_map<c10::StorageImpl*, std::size_t> holders
        GUARDED_BY(mutex);
  };
  static All& known_storages() {
    // This is never destroyed: a swapper may be closed after everything static.
    // A child that was forked while a thread held the mutex must be able to
    // take it.
    static All* const only = [] {
      auto* const made = new All;
      pthread_atfork(lock_all, unlock_all, unlock_all);
      return made;
    }();
    return *only;
  }
  static void lock_all() UNCHECKED_THREADS { known_storages().mutex.lock(); }
  static void unlock_all() UNCHECKED_THREADS {
    known_storages().mutex.unlock();
  }

  c10::StorageImpl* storage_;
};

/// The memory of tensors that operations use. It stays where it is. What one
/// operation writes, no other one reads or writes. Only contiguous tensors are
/// compared; other views may lie within each other. Nothing keeps
/// share_memory_() from moving memory that is in use: the caller must not call
/// it. Threads: any.
class MemoryInFlight {
 public:
  /// Returns a guard. Keep it while the memory is read, and no longer than the
  /// storage. Errors: std::invalid_argument if an operation writes to the
  /// memory.
  std::shared_ptr<void> source(const at::Tensor& tensor,
                               const std::string& operation) const {
    return claim(tensor, 1, operation);
  }

  /// The same, to keep while the memory is written. It is also an error if an
  /// operation reads the memory.
  std::shared_ptr<void> destination(const at::Tensor& tensor,
                                    const std::string& operation) const {
    return claim(tensor, kWriter, operation);
  }

  /// Returns a guard to keep while a view that is not contiguous is used.
  static std::shared_ptr<void> lock_storage(const at::Tensor& tensor) {
    return std::make_shared<StorageLock>(
        tensor.storage().unsafeGetStorageImpl());
  }

 private:
  static constexpr int kWriter = -1;

  /// Who uses which addresses. Those from a key up to the next key have so many
  /// readers, or one writer.
  class Users {
   public:
    /// Whether a writer is there, or, with `any`, a writer or a reader.
    bool has(std::uintptr_t begin, std::uintptr_t end, bool any) const {
      auto each = users_.upper_bound(begin);
      if (each != users_.begin()) --each;
      for (; each != users_.end() && each->first < end; ++each) {
        if (any ? each->second != 0 : each->second == kWriter) return true;
      }
      return false;
    }

    /// Changes the count of a range. Allocates nothing if its ends are those of
    /// a range that is in use.
    void add(std::uintptr_t begin, std::uintptr_t end, int change) {
      const auto first = key_at(begin);
      const auto last = key_at(end);
      for (auto each = first; each != last; ++each) each->second += change;
      // Keys between unused addresses are not the ends of anything in use.
      bool used = first != users_.begin() && std::prev(first)->second != 0;
      for (auto each = first, stop = std::next(last); each != stop;) {
        const bool used_before = std::exchange(used, each->second != 0);
        each = used_before || used ? std::next(each) : users_.erase(each);
      }
    }

   private:
    std::map<std::uintptr_t, int>::iterator key_at(std::uintptr_t address) {
      const auto next = users_.upper_bound(address);
      if (next == users_.begin()) return users_.emplace_hint(next, address, 0);
      const auto before = std::prev(next);
      if (before->first == address) return before;
      return users_.emplace_hint(next, address, before->second);
    }

    std::map<std::uintptr_t, int> users_;
  };
  struct Shared {
    Mutex mutex;
    Users users GUARDED_BY(mutex);
  };

  std::shared_ptr<void> claim(const at::Tensor& tensor, int change,
                              const std::string& operation) const {
    std::shared_ptr<void> storage = lock_storage(tensor);
    const auto begin =
        reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
    const std::uintptr_t end = begin + tensor.nbytes();
    if (begin == end) return storage;
    {
      const MutexLock lock(shared_->mutex);
      if (shared_->users.has(begin, end, change == kWriter)) {
        throw std::invalid_argument(
            operation +
            ": the tensor's memory is used by an operation that has not ended, "
            "and one of the two writes it; wait for that one first");
      }
      shared_->users.add(begin, end, change);
    }
    return {nullptr, [begin, end, change, storage = std::move(storage),
                      shared = shared_](void*) {
              const MutexLock at_end(shared->mutex);
              shared->users.add(begin, end, -change);
            }};
  }

  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace torch_ext
