#include "torch_ext/swap/file_transfer.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "file_cache.h"
#include "file_order.h"
#include "file_queues.h"
#include "file_range.h"
#include "file_syncs.h"
#include "swap_core.h"
#include "swap_operation.h"
#include "torch_ext/base/align.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kMaxOffset = std::numeric_limits<std::int64_t>::max();

std::string text_of(const FileRange::Name& name) {
  if (const int* fd = std::get_if<int>(&name)) {
    return "descriptor " + std::to_string(*fd);
  }
  return std::get<std::string>(name);
}

}  // namespace

class FileTransfer::Impl {
 public:
  explicit Impl(const FileTransferOptions& options)
      : queues(std::make_shared<FileQueues>(
            checked(options).aio, options.engine, options.engine_factory,
            [this](std::string text) { core.add_note(std::move(text)); })),
        core("file swapper", options.aio,
             std::max(options.host_memory,
                      align_up(options.aio.block_size, page_size()))) {}

  static const FileTransferOptions& checked(
      const FileTransferOptions& options) {
    options.aio.validate();
    // An unknown engine shall be an error of this call, not of the first
    // transfer.
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
    // They live until the file is open, even if close() is called meanwhile.
    const auto [cache, queue_set] = opened();
    auto range = std::make_shared<FileRange>(
        SharedFiles{*cache, *queue_set, order, syncs}, std::move(name), offset,
        bytes.size);
    const auto op = kind == SwapOperation::Kind::kOut ? IoRequest::Op::kWrite
                                                      : IoRequest::Op::kRead;
    // This call itself reports what is wrong with the file, if it can. The lock
    // of the calls is not held, since a file system may not answer.
    range->look(op);
    // close() may hold the lock until an operation has got this very
    // descriptor.
    const SwapCore::Call call(core, [&] { range->unprepare(); });
    OperationPtr operation =
        core.make_operation(kind, text, std::move(bytes), std::move(range));
    operation->name = operation->out() ? "write" : "read";
    SwapTicket ticket(operation);
    core.start(std::move(operation));
    return ticket;
  }

  std::pair<std::shared_ptr<FileCache>, std::shared_ptr<FileQueues>> opened() {
    const SwapCore::Call call(core);
    const MutexLock lock(mutex);
    return {files, queues};
  }

  FileOrder order;
  FileSyncs syncs;
  mutable Mutex mutex;
  std::shared_ptr<FileCache> files GUARDED_BY(mutex) =
      std::make_shared<FileCache>();
  std::shared_ptr<FileQueues> queues GUARDED_BY(mutex);
  SwapCore core;  // Its threads use all four.
};

FileTransfer::FileTransfer(const FileTransferOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

FileTransfer::~FileTransfer() {
  impl_->core.owner().end(impl_, [this] { close(); });
}

SwapTicket FileTransfer::write(const std::filesystem::path& path,
                               std::uint64_t offset, DeviceBytes source) {
  return impl_->start(SwapOperation::Kind::kOut, absolute_path(path), offset,
                      std::move(source));
}

SwapTicket FileTransfer::write(int fd, std::uint64_t offset,
                               DeviceBytes source) {
  return impl_->start(SwapOperation::Kind::kOut, fd, offset, std::move(source));
}

SwapTicket FileTransfer::read(const std::filesystem::path& path,
                              std::uint64_t offset, DeviceBytes destination) {
  return impl_->start(SwapOperation::Kind::kIn, absolute_path(path), offset,
                      std::move(destination));
}

SwapTicket FileTransfer::read(int fd, std::uint64_t offset,
                              DeviceBytes destination) {
  return impl_->start(SwapOperation::Kind::kIn, fd, offset,
                      std::move(destination));
}

void FileTransfer::drop_deleted() {
  impl_->core.owner().check();
  std::shared_ptr<FileCache> files;
  {
    const MutexLock lock(impl_->mutex);
    files = impl_->files;
  }
  if (files != nullptr) files->drop_deleted();
}

FileTransferStats FileTransfer::stats() const {
  impl_->core.owner().check();
  const MutexLock lock(impl_->mutex);
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

std::vector<std::string> FileTransfer::notes() const {
  return impl_->core.notes();
}

void FileTransfer::close() {
  const auto error = impl_->core.close([this] {
    const MutexLock lock(impl_->mutex);
    impl_->queues.reset();
    impl_->files.reset();
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace torch_ext
