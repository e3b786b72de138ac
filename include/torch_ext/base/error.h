#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace torch_ext {

/// What was tried, and why the system refused it. Every field may be left out.
struct IoFailure {
  std::string op = {};  ///< The call: "pwrite", "io_submit", "fallocate", ...
  std::string path =
      {};  ///< File or directory; "DIR/[scratch]" for unnamed files.
  std::optional<std::uint64_t> offset = std::nullopt;  ///< Bytes into the file.
  std::optional<std::uint64_t> length = std::nullopt;  ///< Bytes asked for.
  int error = 0;                                       ///< errno, positive.
  std::string detail = {};  ///< What errno cannot say, e.g. the remedy.
};

/// A failed system operation. what() reads
/// `pwrite /nvme/x offset=4096 length=1048576: No space left on device
/// (ENOSPC)`. Becomes OSError(errno, text, path) in Python.
class IoError : public std::runtime_error {
 public:
  explicit IoError(IoFailure failure);

  const IoFailure& failure() const noexcept { return failure_; }
  int error() const noexcept { return failure_.error; }
  /// what() without the path, which OSError shows by itself.
  std::string text_without_path() const;

 private:
  IoFailure failure_;
};

/// A wait ran out of time. The operation goes on. TimeoutError in Python.
class TimeoutError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// No such key. KeyError in Python.
class KeyError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument of a kind that cannot work. TypeError in Python.
class TypeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The object's state forbids the call: closed, failed before, used in a
/// forked child. RuntimeError in Python.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// More memory is needed at once than the caller has allowed. MemoryError in
/// Python.
class BudgetError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Symbolic name of an errno, e.g. "ENOSPC"; "errno 4242" when unknown.
std::string errno_name(int error);

}  // namespace torch_ext
