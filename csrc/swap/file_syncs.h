#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "torch_ext/io/file.h"

namespace torch_ext {

/// Syncs files of which bytes went through the page cache. Linux reports pages
/// that it could not write only once, to the next sync of each open descriptor
/// (errseq_t). Operations share a File. So only one sync of it runs at a time,
/// and what that sync hears counts for all that had begun to write. Threads:
/// any.
class FileSyncs {
 public:
  using Done = std::function<void(std::exception_ptr)>;
  /// Starts a sync. Errors: those that are known at once.
  using Start = std::function<void(Done)>;

  /// An operation that writes to a file. Threads: one at a time.
  class Writer;

  /// Makes a Writer, before the first byte is written. Keep it until `done` has
  /// been called.
  std::shared_ptr<Writer> begin(std::shared_ptr<const File> file);

 private:
  struct Request {
    std::shared_ptr<Writer> writer;
    Start start;
    Done done;
  };
  /// The requests of one file.
  struct Line {
    Mutex mutex;
    std::vector<Request> running GUARDED_BY(mutex);  ///< One sync answers all.
    std::vector<Request> waiting GUARDED_BY(mutex);  ///< For the next one.
    std::uint64_t failures GUARDED_BY(mutex) = 0;
    std::exception_ptr failure GUARDED_BY(mutex);  ///< The last.
  };

  static void run(const std::shared_ptr<Line>& line);
  static void end(const std::shared_ptr<Line>& line, std::exception_ptr error);

  Mutex mutex_;
  std::map<const File*, std::weak_ptr<Line>> lines_ GUARDED_BY(mutex_);
  /// Beyond it, unused ones go.
  std::size_t most_lines_ GUARDED_BY(mutex_) = 64;
};

class FileSyncs::Writer : public std::enable_shared_from_this<Writer> {
 public:
  Writer(std::shared_ptr<const File> file, std::shared_ptr<Line> line)
      : file_(std::move(file)), line_(std::move(line)) {
    const MutexLock lock(line_->mutex);
    seen_ = line_->failures;
  }

  /// Syncs the bytes, all of which are written, by `start` or together with
  /// others' bytes. `done` is called once, maybe before this returns. It gets
  /// the error of any sync of the file that ended since begin().
  void sync(Start start, Done done);

 private:
  friend class FileSyncs;

  const std::shared_ptr<const File> file_;  // Keeps its address taken.
  const std::shared_ptr<Line> line_;
  std::uint64_t seen_ = 0;  ///< How many failures there were at begin().
};

}  // namespace torch_ext
