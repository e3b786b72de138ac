#pragma once

#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "swap_operation.h"

namespace torch_ext {

/// Operations that have failed, until somebody has seen their error: through a
/// ticket, or here. What failed before its key was removed is no longer an
/// error of that key. Threads: any.
class UnseenErrors {
 public:
  void add(OperationPtr operation) {
    std::lock_guard lock(mutex_);
    failed_.push_back(std::move(operation));
    // Of removed keys the first will do for take_any(): more of them would
    // gather for as long as keys come and go.
    bool has_one = false;
    std::erase_if(failed_, [&](const OperationPtr& each) {
      return each->error_seen ||
             (is_of_removed_key(*each) && std::exchange(has_one, true));
    });
  }

  /// The key is removed: its errors are left to take_any(). Whether there are
  /// any: its first write may have failed, and nobody know.
  bool leave(const std::string& key) {
    bool any = false;
    std::lock_guard lock(mutex_);
    for (const OperationPtr& each : failed_) {
      if (each->key != key || each->error_seen || is_of_removed_key(*each)) {
        continue;
      }
      *each->key_removed = any = true;
    }
    return any;
  }

  /// The first unseen error of a key, or null; forgets all of the key.
  std::exception_ptr take(const std::string& key) {
    std::exception_ptr unseen;
    std::lock_guard lock(mutex_);
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

  /// The first unseen error of any key, or null; forgets all.
  std::exception_ptr take_any() {
    std::lock_guard lock(mutex_);
    for (const OperationPtr& operation : std::exchange(failed_, {})) {
      if (!operation->error_seen.exchange(true)) return operation->error;
    }
    return nullptr;
  }

 private:
  static bool is_of_removed_key(const SwapOperation& operation) {
    return operation.key_removed != nullptr && *operation.key_removed;
  }

  std::mutex mutex_;
  std::vector<OperationPtr> failed_;
};

}  // namespace torch_ext
