#include "torch_ext/swap/file_swapper.h"

#include <cerrno>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "file_cache.h"
#include "file_order.h"
#include "file_syncs.h"
#include "swap_core.h"
#include "swap_operation.h"
#include "swap_target.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/make_queue.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kMaxOffset = std::numeric_limits<std::int64_t>::max();

/// Queues of one FileSwapper: per device, and apart for files with and without
/// direct I/O, which suit different engines. Threads: any.
class QueueSet {
 public:
  QueueSet(const FileSwapperOptions& options,
           std::function<void(std::string)> note)
      : config_(options.aio),
        engine_(options.engine),
        factory_(options.engine_factory),
        note_(std::move(note)) {}

  IoQueue& queue_of(const File& file) {
    std::lock_guard lock(mutex_);
    auto& queue = queues_[{file.identity().device, file.direct()}];
    if (queue == nullptr) {
      MadeQueue made = make_queue(config_, engine_, file.direct(), factory_);
      queue = std::move(made.queue);
      if (!made.note.empty()) note_(std::move(made.note));
      if (!file.direct()) note_(file.path() + ": " + file.buffered_reason());
    }
    return *queue;
  }

 private:
  const AioConfig config_;
  const std::string engine_;
  const IoEngineFactory factory_;
  const std::function<void(std::string)> note_;
  std::mutex mutex_;
  std::map<std::pair<std::uint64_t, bool>, std::unique_ptr<IoQueue>> queues_;
};

/// Bytes of a file of the caller's.
class FileRange final : public SwapTarget {
 public:
  /// A path, or a descriptor.
  using Name = std::variant<std::string, int>;

  FileRange(FileCache& cache, QueueSet& queues, FileOrder& order,
            FileSyncs& syncs, Name name, std::uint64_t begin,
            std::uint64_t size)
      : cache_(cache),
        queues_(queues),
        order_(order),
        syncs_(syncs),
        name_(std::move(name)),
        begin_(begin),
        size_(size) {}

  /// Opens the file for an operation if that can be done at once and no other
  /// operation has to go first. Errors: what is wrong with the file.
  void look(IoRequest::Op op) {
    place_ = {.begin = begin_,
              .end = begin_ + size_,
              .write = op == IoRequest::Op::kWrite};
    Seen seen;
    if (const int* fd = std::get_if<int>(&name_)) {
      place_.file = File::identify(*fd);
    } else {
      place_.path = std::get<std::string>(name_);
      seen.file = File::identify(place_.path, &seen.size);
      place_.file = seen.file;
    }
    if (order_.busy(place_)) return;
    if (!open(op, false, seen)) return;
    prepare(op, false);
    place_.file = file_->identity();
  }

  bool park(const OperationPtr& operation) override {
    const FileOrder::Entered entered = order_.enter(place_, operation);
    order_entry_ = entered.entry;
    // Those that it waits for may need the descriptor.
    if (entered.waits) unprepare();
    return entered.waits;
  }

  void unprepare() override {
    file_ = nullptr;
    grown_ = false;
  }

  std::vector<OperationPtr> ended() override {
    if (order_entry_ == nullptr) return {};
    return order_.leave(std::exchange(order_entry_, nullptr));
  }

  bool prepare(IoRequest::Op op, bool may_block) override {
    if (!file_ && !open(op, may_block, {})) return false;
    if (grown_ || op != IoRequest::Op::kWrite || size_ == 0) return true;
    if (file_->needs_space(begin_, size_)) {
      if (!may_block) return false;
      grow();
    }
    grown_ = true;
    return true;
  }

  std::uint64_t in_place(const std::byte* data, std::uint64_t offset,
                         std::uint64_t rest) const override {
    if (!file_->direct()) return rest;
    const std::uint64_t begin = begin_ + offset;
    const std::uint64_t first = align_up(begin, granule());
    // Too little for direct I/O, which begins and ends at whole granules.
    if (first >= align_down(begin + rest, granule())) return rest;
    return is_aligned(data + (first - begin), file_->memory_alignment()) ? rest
                                                                         : 0;
  }

  std::size_t lead(std::uint64_t offset) const override {
    return (begin_ + offset) % granule();
  }
  std::uint64_t padded(std::uint64_t length) const override { return length; }
  std::size_t granule() const override { return file_->granule(); }

  void start(const SwapOperation& operation, std::uint64_t offset,
             std::span<std::byte> bytes, Done done) override {
    if (operation.out() && sync_ == nullptr && !is_direct(offset, bytes)) {
      sync_ = syncs_.begin(file_);
    }
    queue_->submit({.op = operation.op(),
                    .file = file_,
                    .offset = begin_ + offset,
                    .bytes = bytes,
                    .priority = operation.priority,
                    .caller = operation.caller,
                    .on_done = std::move(done)});
  }

  // What the page cache has taken may still fail on its way to the drive, and
  // only a sync hears of it.
  bool sync(const SwapOperation& operation, Done done) override {
    if (sync_ == nullptr) return false;
    const auto start = [queue = queue_, file = file_,
                        priority = operation.priority,
                        caller = operation.caller](Done synced) {
      queue->submit({.op = IoRequest::Op::kSync,
                     .file = file,
                     .priority = priority,
                     .caller = caller,
                     .on_done = std::move(synced)});
    };
    sync_->sync(start, std::move(done));
    return true;
  }

  void check_written() const override {
    if (size_ == 0 || file_ == nullptr) return;
    const bool named = std::holds_alternative<std::string>(name_);
    const File::Presence now = file_->presence();
    const bool gone = named && now.links == 0;
    if (!gone && now.size >= begin_ + size_) return;
    throw IoError({.op = "pwrite",
                   .path = file_->path(),
                   .offset = begin_,
                   .length = size_,
                   .error = ESTALE,
                   .detail = gone ? "the file was deleted or replaced meanwhile"
                                  : "the file was cut meanwhile"});
  }

 private:
  bool is_direct(std::uint64_t offset, std::span<const std::byte> bytes) const {
    return file_->direct() && is_aligned(begin_ + offset, granule()) &&
           is_aligned(bytes.size(), granule()) &&
           is_aligned(bytes.data(), file_->memory_alignment());
  }

  /// What the path leads to, for whoever has just seen it.
  struct Seen {
    std::optional<File::Identity> file;
    std::uint64_t size = 0;
  };

  bool open(IoRequest::Op op, bool waits, const Seen& seen) {
    const bool write = op == IoRequest::Op::kWrite;
    FileCache::Lease file = find(write, waits, seen);
    if (!file) return false;
    queue_ = &queues_.queue_of(*file);
    if (!write) check_holds(*file, seen);
    file_ = std::move(file);
    return true;
  }

  FileCache::Lease find(bool write, bool waits, const Seen& seen) {
    const FileCache::Request request{
        .mode = write ? File::Mode::kWrite : File::Mode::kRead,
        // Granules are seldom larger than that.
        .buffered =
            !is_aligned(begin_, page_size()) || !is_aligned(size_, page_size()),
        .waits = waits,
        .now = seen.file};
    if (const int* fd = std::get_if<int>(&name_)) {
      return cache_.open(*fd, request);
    }
    return cache_.open(std::get<std::string>(name_), request);
  }

  void grow() const {
    try {
      file_->grow(begin_, size_);
    } catch (const IoError& error) {
      // Deleted files take up space as long as they are kept open here.
      if (error.error() != ENOSPC || !cache_.drop_deleted()) throw;
      file_->grow(begin_, size_);
    }
  }

  void check_holds(const File& file, const Seen& seen) const {
    if (size_ == 0) return;
    // A file that was too short may have grown since.
    if (seen.file == file.identity() && begin_ + size_ <= seen.size) return;
    const std::uint64_t end = file.size();
    if (begin_ + size_ <= end) return;
    throw IoError({.op = "pread",
                   .path = file.path(),
                   .offset = begin_,
                   .length = size_,
                   .error = EIO,
                   .detail = "the file ends at byte " + std::to_string(end)});
  }

  FileCache& cache_;
  QueueSet& queues_;
  FileOrder& order_;
  FileSyncs& syncs_;
  FilePlace place_;
  FileOrder::Entry* order_entry_ = nullptr;
  const Name name_;
  const std::uint64_t begin_;
  const std::uint64_t size_;
  bool grown_ = false;
  /// If some of it goes through the page cache.
  std::shared_ptr<FileSyncs::Writer> sync_;
  FileCache::Lease file_;
  IoQueue* queue_ = nullptr;
};

std::string text_of(const FileRange::Name& name) {
  if (const int* fd = std::get_if<int>(&name)) {
    return "descriptor " + std::to_string(*fd);
  }
  return std::get<std::string>(name);
}

}  // namespace

class FileSwapper::Impl {
 public:
  explicit Impl(const FileSwapperOptions& options)
      : queues(std::make_shared<QueueSet>(
            checked(options),
            [this](std::string text) { core.add_note(std::move(text)); })),
        core("file swapper", options.aio, options.host_memory) {}

  static const FileSwapperOptions& checked(const FileSwapperOptions& options) {
    options.aio.validate();
    // An unknown engine is an error of this call, not of the first transfer.
    if (options.engine != "auto") make_engine_factory(options.engine);
    return options;
  }

  SwapTicket start(SwapOperation::Kind kind, FileRange::Name name,
                   std::uint64_t offset, DeviceBytes bytes) {
    const std::string text = text_of(name);
    if (offset > kMaxOffset || bytes.size > kMaxOffset - offset) {
      throw std::invalid_argument(text + ": offset " + std::to_string(offset) +
                                  " and length " + std::to_string(bytes.size) +
                                  " reach beyond the largest file");
    }
    // They live until the file is open, though close() were called meanwhile.
    const auto [cache, queue_set] = opened();
    auto range = std::make_shared<FileRange>(
        *cache, *queue_set, order, syncs, std::move(name), offset, bytes.size);
    const auto op = kind == SwapOperation::Kind::kOut ? IoRequest::Op::kWrite
                                                      : IoRequest::Op::kRead;
    // What is wrong with the file is this call's error where it can be. Without
    // the lock of the calls, since a file system may not answer.
    range->look(op);
    auto lock = core.try_enter();
    if (!lock) {
      // close() may hold it until an operation has got this very descriptor.
      range->unprepare();
      lock = core.enter();
    }
    OperationPtr operation =
        core.make_operation(kind, text, std::move(bytes), std::move(range));
    operation->name = operation->out() ? "write" : "read";
    SwapTicket ticket(operation);
    core.start(std::move(operation));
    return ticket;
  }

  std::pair<std::shared_ptr<FileCache>, std::shared_ptr<QueueSet>> opened() {
    const auto lock = core.enter();
    return {files, queues};
  }

  FileOrder order;
  FileSyncs syncs;
  mutable std::mutex mutex;  // Of the two below.
  std::shared_ptr<FileCache> files = std::make_shared<FileCache>();
  std::shared_ptr<QueueSet> queues;
  SwapCore core;  // Its threads use all four.
};

FileSwapper::FileSwapper(const FileSwapperOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

FileSwapper::~FileSwapper() {
  if (!impl_->core.in_own_process()) {
    // Threads, buffers and requests belong to the parent.
    static_cast<void>(impl_.release());
    return;
  }
  try {
    close();
  } catch (...) {
    // A destructor has nobody to tell; close() does.
  }
}

SwapTicket FileSwapper::write(const std::filesystem::path& path,
                              std::uint64_t offset, DeviceBytes source) {
  return impl_->start(SwapOperation::Kind::kOut, absolute_path(path), offset,
                      std::move(source));
}

SwapTicket FileSwapper::write(int fd, std::uint64_t offset,
                              DeviceBytes source) {
  return impl_->start(SwapOperation::Kind::kOut, fd, offset, std::move(source));
}

SwapTicket FileSwapper::read(const std::filesystem::path& path,
                             std::uint64_t offset, DeviceBytes destination) {
  return impl_->start(SwapOperation::Kind::kIn, absolute_path(path), offset,
                      std::move(destination));
}

void FileSwapper::drop_deleted() {
  impl_->core.check_process();
  std::shared_ptr<FileCache> files;
  {
    std::lock_guard lock(impl_->mutex);
    files = impl_->files;
  }
  if (files != nullptr) files->drop_deleted();
}

FileSwapperStats FileSwapper::stats() const {
  impl_->core.check_process();
  std::lock_guard lock(impl_->mutex);
  const SwapCore::Counts counts = impl_->core.counts();
  return {.bytes_read = counts.bytes_in,
          .bytes_written = counts.bytes_out,
          .operations = counts.operations,
          .failures = counts.failures,
          .in_flight = counts.in_flight,
          .host_bytes = counts.host_bytes,
          .host_bytes_peak = counts.host_bytes_peak,
          .descriptors = static_cast<std::uint64_t>(
              impl_->files ? impl_->files->descriptors() : 0)};
}

std::vector<std::string> FileSwapper::notes() const {
  return impl_->core.notes();
}

void FileSwapper::close() {
  const auto error = impl_->core.close([this] {
    std::lock_guard lock(impl_->mutex);
    impl_->queues.reset();
    impl_->files.reset();
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace torch_ext
