#include "torch_ext/store/store.h"

#include <atomic>
#include <cerrno>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "space_map.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/make_queue.h"

namespace torch_ext {
namespace {

// The file grows in steps, so that small extents do not cost a system call
// each.
constexpr std::uint64_t kGrowth = std::uint64_t{16} << 20;

}  // namespace

struct Store::Impl {
  explicit Impl(const StoreOptions& options)
      : file(std::make_shared<File>(File::scratch(options.directory))),
        config(options.aio),
        verify(options.verify) {
    config.validate();
    if (!is_aligned(config.block_size, file->granule())) {
      throw std::invalid_argument("aio: block_size must be a multiple of " +
                                  std::to_string(file->granule()) +
                                  " for files in " +
                                  options.directory.string() + ", got " +
                                  std::to_string(config.block_size));
    }
    MadeQueue made = make_queue(config, options.engine, file->direct(),
                                options.engine_factory);
    queue = std::move(made.queue);
    engine = std::move(made.engine);
    if (!made.note.empty()) notes.push_back(std::move(made.note));
    if (!file->direct()) notes.push_back(file->buffered_reason());
  }

  std::optional<std::uint64_t> take_free(std::uint64_t bytes);
  std::uint64_t take_space(std::uint64_t bytes);
  std::span<std::uint64_t> checksums_of(Extent& extent, std::uint64_t offset,
                                        std::uint64_t length) const;
  void check(const Extent* extent, std::uint64_t offset,
             std::span<const std::byte> bytes) const;
  Ticket submit(IoRequest::Op op, std::shared_ptr<Extent> extent,
                std::uint64_t offset, std::span<std::byte> bytes, Done done,
                IoPriority priority);
  void ended(IoRequest::Op op, Extent& extent, std::uint64_t length,
             const std::exception_ptr& error);

  std::shared_ptr<const File> file;
  AioConfig config;
  bool verify;
  std::string engine;
  std::vector<std::string> notes;
  std::unique_ptr<IoQueue> queue;

  std::mutex growth_mutex;  // Before the other.
  mutable std::mutex mutex;
  SpaceMap space;
  StoreStats stats;
};

std::optional<std::uint64_t> Store::Impl::take_free(std::uint64_t bytes) {
  std::lock_guard lock(mutex);
  const auto offset = space.take(bytes);
  if (offset) stats.allocated += bytes;
  return offset;
}

std::uint64_t Store::Impl::take_space(std::uint64_t bytes) {
  // Without the lock of the space map, which those who do not wait take.
  std::lock_guard one_grows(growth_mutex);
  for (;;) {
    if (const auto offset = take_free(bytes)) return *offset;
    std::unique_lock lock(mutex);
    const std::uint64_t old_size = stats.file_size;
    const std::uint64_t tail = space.tail(old_size);
    lock.unlock();
    if (tail >= bytes) continue;
    const std::uint64_t missing = bytes - tail;
    std::uint64_t growth = align_up(missing, kGrowth);
    try {
      file->reserve(old_size, growth);
    } catch (const IoError& error) {
      const bool limit = error.error() == ENOSPC || error.error() == EFBIG ||
                         error.error() == EDQUOT;
      if (!limit || growth == missing) throw;
      growth = missing;
      file->reserve(old_size, growth);
    }
    lock.lock();
    stats.file_size += growth;
    space.give(old_size, growth);
  }
}

void Store::Impl::check(const Extent* extent, std::uint64_t offset,
                        std::span<const std::byte> bytes) const {
  if (extent == nullptr || extent->store_.get() != this) {
    throw std::invalid_argument("store: the extent is not of this store");
  }
  const std::uint64_t padded = extent->padded_size_;
  if (!is_aligned(offset, config.block_size) || offset > padded ||
      bytes.size() > padded - offset ||
      (!is_aligned(bytes.size(), config.block_size) &&
       offset + bytes.size() != padded) ||
      !is_aligned(bytes.data(), file->memory_alignment())) {
    throw std::invalid_argument(
        "store: offset " + std::to_string(offset) + " and length " +
        std::to_string(bytes.size()) + " do not fit an extent of " +
        std::to_string(padded) + " bytes in blocks of " +
        std::to_string(config.block_size) +
        ", or the address is not a multiple of " +
        std::to_string(file->memory_alignment()));
  }
}

std::span<std::uint64_t> Store::Impl::checksums_of(Extent& extent,
                                                   std::uint64_t offset,
                                                   std::uint64_t length) const {
  if (!verify || length == 0) return {};
  const std::uint64_t first = offset / config.block_size;
  const std::uint64_t last =
      align_up(offset + length, config.block_size) / config.block_size;
  return std::span(extent.checksums_).subspan(first, last - first);
}

Ticket Store::Impl::submit(IoRequest::Op op, std::shared_ptr<Extent> extent,
                           std::uint64_t offset, std::span<std::byte> bytes,
                           Done done, IoPriority priority) {
  check(extent.get(), offset, bytes);
  IoOperation operation;
  operation.op = op;
  operation.file = file;
  operation.offset = extent->offset_ + offset;
  operation.bytes = bytes;
  operation.checksums = checksums_of(*extent, offset, bytes.size());
  operation.priority = priority;
  operation.on_done =
      [this, op, length = bytes.size(), extent = std::move(extent),
       done = std::move(done)](std::exception_ptr error) mutable {
        ended(op, *extent, length, error);
        // Whoever hears of the end may count on the space.
        extent.reset();
        if (done) done(error);
      };
  return queue->submit(std::move(operation));
}

void Store::Impl::ended(IoRequest::Op op, Extent& extent, std::uint64_t length,
                        const std::exception_ptr& error) {
  std::lock_guard lock(mutex);
  if (error == nullptr) {
    const bool read = op == IoRequest::Op::kRead;
    (read ? stats.bytes_read : stats.bytes_written) += length;
    (read ? stats.read_ops : stats.write_ops) += 1;
    return;
  }
  try {
    std::rethrow_exception(error);
  } catch (const IoError& failed) {
    // A place that the device could not write is not offered again.
    if (op == IoRequest::Op::kWrite && failed.error() == EIO) {
      extent.quarantined_ = true;
    }
  } catch (...) {
  }
}

Store::Store(const StoreOptions& options)
    : impl_(std::make_shared<Impl>(options)) {}

Store::~Store() {
  // Extents may live on and keep the space map; the threads may not.
  impl_->queue.reset();
}

std::shared_ptr<Extent> Store::allocate(std::uint64_t bytes) {
  return allocate(bytes, true);
}

std::shared_ptr<Extent> Store::try_allocate(std::uint64_t bytes) {
  return allocate(bytes, false);
}

std::shared_ptr<Extent> Store::allocate(std::uint64_t bytes, bool may_grow) {
  if (bytes > std::uint64_t{1} << 62) {
    throw std::invalid_argument("store: an extent of " + std::to_string(bytes) +
                                " bytes");
  }
  std::shared_ptr<Extent> extent(new Extent);
  const std::uint64_t padded = align_up(bytes, granule());
  if (impl_->verify) {
    const std::uint64_t block = impl_->config.block_size;
    extent->checksums_.resize(align_up(padded, block) / block);
  }
  if (padded > 0) {
    const auto offset =
        may_grow ? impl_->take_space(padded) : impl_->take_free(padded);
    if (!offset) return nullptr;
    extent->offset_ = *offset;
  }
  extent->size_ = bytes;
  extent->padded_size_ = padded;
  extent->store_ = impl_;
  return extent;
}

Extent::~Extent() {
  if (store_ == nullptr || padded_size_ == 0) return;
  std::lock_guard lock(store_->mutex);
  store_->stats.allocated -= padded_size_;
  if (!quarantined_) store_->space.give(offset_, padded_size_);
}

Ticket Store::write(std::shared_ptr<Extent> extent, std::uint64_t offset,
                    std::span<const std::byte> bytes, Done done,
                    IoPriority priority) {
  // The queue does not write through the pointer of a write.
  std::span<std::byte> writable{const_cast<std::byte*>(bytes.data()),
                                bytes.size()};
  return impl_->submit(IoRequest::Op::kWrite, std::move(extent), offset,
                       writable, std::move(done), priority);
}

Ticket Store::read(std::shared_ptr<Extent> extent, std::uint64_t offset,
                   std::span<std::byte> bytes, Done done, IoPriority priority) {
  return impl_->submit(IoRequest::Op::kRead, std::move(extent), offset, bytes,
                       std::move(done), priority);
}

const AioConfig& Store::config() const noexcept { return impl_->config; }

std::size_t Store::granule() const noexcept { return impl_->file->granule(); }

std::size_t Store::memory_alignment() const noexcept {
  return impl_->file->memory_alignment();
}

const std::string& Store::engine() const noexcept { return impl_->engine; }

const std::string& Store::path() const noexcept { return impl_->file->path(); }

const std::vector<std::string>& Store::notes() const noexcept {
  return impl_->notes;
}

StoreStats Store::stats() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->stats;
}

}  // namespace torch_ext
