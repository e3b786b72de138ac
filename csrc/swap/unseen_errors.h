#pragma once

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "swap_operation.h"

namespace torch_ext {

/// Failed operations whose error nobody has seen, through a ticket or here. An
/// error from before a key was removed is no longer an error of that key.
/// Threads: any.
class UnseenErrors {
 public:
  void add(OperationPtr operation) {
    const MutexLock lock(mutex_);
    failed_.push_back(std::move(operation));
    // The first error of a removed key is enough for take_any(). More of them
    // would pile up as long as keys come and go.
    bool has_one = false;
    std::erase_if(failed_, [&](const OperationPtr& each) {
      return each->error_seen ||
             (is_of_removed_key(*each) && std::exchange(has_one, true));
    });
  }

  /// The key is removed, so its errors are left to take_any(). Returns whether
  /// there are any. The key's first write may have failed without anybody
  /// knowing.
  bool leave(const std::string& key) {
    bool any = false;
    const MutexLock lock(mutex_);
    for (const OperationPtr& each : failed_) {
      if (each->key != key || each->error_seen || is_of_removed_key(*each)) {
        continue;
      }
      *each->key_removed = any = true;
    }
    return any;
  }

  /// The first unseen error of a key, or null. Forgets all errors of the key.
  std::exception_ptr take(const std::string& key) {
    std::exception_ptr unseen;
    const MutexLock lock(mutex_);
    std::erase_if(failed_, [&](const OperationPtr& operation) {
      if (operation->key != key || is_of_removed_key(*operation)) {
        return operation->error_seen.load();
      }
      if (unseen == nullptr && !operation->error_seen.exchange(true)) {
        unseen = operation->error;
      }
      return true;
    });
    return unseen;
  }

  /// The first unseen error of any key, or null. Forgets all errors.
  std::exception_ptr take_any() {
    const MutexLock lock(mutex_);
    for (const OperationPtr& operation : std::exchange(failed_, {})) {
      if (!operation->error_seen.exchange(true)) return operation->error;
    }
    return nullptr;
  }

 private:
  static bool is_of_removed_key(const SwapOperation& operation) {
    return operation.key_removed != nullptr && *operation.key_removed;
  }

  Mutex mutex_;
  std::vector<OperationPtr> failed_ GUARDED_BY(mutex_);
};

}  // namespace torch_ext
