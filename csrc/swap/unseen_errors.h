#pragma once

#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "swap_operation.h"

namespace torch_ext {

/// Operations that have failed, until somebody has seen their error: through a
/// ticket, or here. Threads: any.
class UnseenErrors {
 public:
  void add(OperationPtr operation) {
    std::lock_guard lock(mutex_);
    std::erase_if(failed_, [](const OperationPtr& each) {
      return each->error_seen.load();
    });
    failed_.push_back(std::move(operation));
  }

  /// The first unseen error of a key, or null; forgets all of the key.
  std::exception_ptr take(const std::string& key) {
    std::exception_ptr unseen;
    std::lock_guard lock(mutex_);
    std::erase_if(failed_, [&](const OperationPtr& operation) {
      if (operation->key != key) return operation->error_seen.load();
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
  std::mutex mutex_;
  std::vector<OperationPtr> failed_;
};

}  // namespace torch_ext
