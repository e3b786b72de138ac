#pragma once

#include <sys/types.h>

#include <memory>

#include "torch_ext/base/process.h"

namespace torch_ext {

/// The process that made an object. A child that was forked from it has a copy
/// of the object, but not its threads.
class OwnerProcess {
 public:
  /// `what` names the object in messages.
  explicit OwnerProcess(const char* what) : what_(what) {}

  /// Called before any lock is taken: in a forked child, the lock's holder may
  /// not exist. Errors: StateError in another process.
  void check() const;

  bool is_this() const noexcept { return process_id() == id_; }

  /// Ends an object that has an `impl`, by `close`. Nobody hears of errors of
  /// `close`. In another process, threads, buffers and requests belong to the
  /// parent, so `impl` is left as it is.
  template <typename Impl, typename Close>
  void end(std::unique_ptr<Impl>& impl, Close close) const noexcept {
    if (!is_this()) {
      static_cast<void>(impl.release());
      return;
    }
    try {
      close();
    } catch (...) {
    }
  }

 private:
  const char* what_;
  pid_t id_ = process_id();
};

}  // namespace torch_ext
