#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/make_queue.h"

namespace torch_ext {

/// The I/O queues of one FileTransfer. Each block device has one for files with
/// direct I/O, and one for files without, since different engines suit them.
/// Threads: any.
class FileQueues {
 public:
  /// `factory`, if it is set, makes the engines instead of `engine`.
  FileQueues(const AioConfig& config, std::string engine,
             IoEngineFactory factory, std::function<void(std::string)> note)
      : config_(config),
        engine_(std::move(engine)),
        factory_(std::move(factory)),
        note_(std::move(note)) {}

  IoQueue& queue_of(const File& file) {
    const MutexLock lock(mutex_);
    auto& queue = queues_[{file.identity().device, file.direct()}];
    if (queue == nullptr) {
      MadeQueue made = make_queue(config_, engine_, file.direct(), factory_);
      queue = std::move(made.queue);
      if (!made.note.empty()) note_(std::move(made.note));
      if (!file.direct()) note_(file.path() + ": " + file.buffered_reason());
    }
    return *queue;
  }

  /// Notes that a file's device has no fallocate, once for each device.
  void note_unreserved(const File& file) {
    const MutexLock lock(mutex_);
    if (unreserved_.insert(file.identity().device).second) {
      note_(file.unreserved_note());
    }
  }

 private:
  const AioConfig config_;
  const std::string engine_;
  const IoEngineFactory factory_;
  const std::function<void(std::string)> note_;
  Mutex mutex_;
  std::map<std::pair<std::uint64_t, bool>, std::unique_ptr<IoQueue>> queues_
      GUARDED_BY(mutex_);
  std::set<std::uint64_t> unreserved_ GUARDED_BY(mutex_);  // Devices.
};

}  // namespace torch_ext
