#include "swap_core.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/size.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kBufferSize = std::uint64_t{4} << 20;

// A buffer holds whole blocks. There are at least two where the memory allows
// it, since with a single one copy and I/O would take turns. A file's block may
// have any size, but a buffer has whole pages.
std::uint64_t buffer_size(const char* what, const AioConfig& aio,
                          std::uint64_t host_memory) {
  const std::uint64_t block = align_up(aio.block_size, page_size());
  if (host_memory < block) {
    throw std::invalid_argument(
        std::string(what) + ": host_memory is " + format_size(host_memory) +
        ", which does not hold one block: raise host_memory to " +
        format_size(block) + ", or lower block_size, which is " +
        format_size(aio.block_size));
  }
  const std::uint64_t wanted = align_up(std::max(block, kBufferSize), block);
  return host_memory >= 2 * wanted ? wanted : block;
}

std::unique_ptr<BufferPool> make_pool(const char* what, const AioConfig& aio,
                                      std::uint64_t host_memory) {
  const std::uint64_t size = buffer_size(what, aio, host_memory);
  return std::make_unique<BufferPool>(size, host_memory / size);
}

}  // namespace

SwapCore::SwapCore(const char* what, const AioConfig& aio,
                   std::uint64_t host_memory)
    : what_(what),
      owner_(what),
      pool_(make_pool(what, aio, host_memory)),
      thread_(std::make_unique<TransferThread>(
          *pool_, [this](const OperationPtr& operation) { ended(operation); },
          [this](std::string note) { add_note(std::move(note)); })) {}

void SwapCore::check_open() const {
  if (closed_) throw StateError(std::string("this ") + what_ + " is closed");
  retired_->clear();
}

OperationPtr SwapCore::make_operation(
    SwapOperation::Kind kind, std::string key, DeviceBytes bytes,
    std::shared_ptr<SwapTarget> target) const {
  auto operation = std::make_shared<SwapOperation>();
  operation->kind = kind;
  operation->key = std::move(key);
  operation->on_host = bytes.device->name() == "cpu";
  operation->bytes = std::move(bytes);
  operation->target = std::move(target);
  operation->retired = retired_;
  operation->caller = this_caller();
  operation->start = operation->bytes.device->record(Device::Stream::kCurrent);
  return operation;
}

void SwapCore::start(OperationPtr operation) {
  {
    const MutexLock lock(mutex_);
    counts_.in_flight += 1;
  }
  thread_->submit(std::move(operation));
}

void SwapCore::ended(const OperationPtr& operation) {
  if (operation->error != nullptr) unseen_.add(operation);
  const MutexLock lock(mutex_);
  counts_.operations += 1;
  counts_.in_flight -= 1;
  if (operation->error != nullptr) {
    counts_.failures += 1;
  } else {
    (operation->out() ? counts_.bytes_out : counts_.bytes_in) +=
        operation->bytes.size;
  }
}

void SwapCore::add_note(std::string note) {
  const MutexLock lock(mutex_);
  if (std::find(notes_.begin(), notes_.end(), note) == notes_.end()) {
    notes_.push_back(std::move(note));
  }
}

std::vector<std::string> SwapCore::notes() const {
  owner_.check();
  const MutexLock lock(mutex_);
  return notes_;
}

SwapCore::Counts SwapCore::counts() const {
  const MutexLock lock(mutex_);
  return counts_locked();
}

SwapCore::Counts SwapCore::counts_locked() const {
  Counts now = counts_;
  if (pool_ == nullptr) return now;
  now.host_bytes = pool_->buffer_size() * pool_->count();
  now.host_bytes_peak = pool_->buffer_size() * pool_->peak_in_use();
  return now;
}

std::exception_ptr SwapCore::close(const std::function<void()>& release) {
  const MutexLock lock(own_calls());
  if (closed_) return nullptr;
  closed_ = true;
  thread_.reset();
  {
    const MutexLock state(mutex_);
    counts_ = counts_locked();
    pool_.reset();
  }
  release();
  retired_->clear();
  return unseen_.take_any();
}

}  // namespace torch_ext
