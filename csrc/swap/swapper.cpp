#include "torch_ext/swap/swapper.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "copy_thread.h"
#include "key_table.h"
#include "swap_operation.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/size.h"
#include "torch_ext/memory/buffer_pool.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kBufferSize = std::uint64_t{4} << 20;

// One buffer holds whole blocks, and there are at least two where the memory
// allows it: a single one would take turns between copy and I/O.
std::uint64_t buffer_size(const SwapperOptions& options) {
  const std::uint64_t block = options.store.aio.block_size;
  if (options.host_memory < block) {
    throw std::invalid_argument(
        "swapper: host_memory must be at least block_size (" +
        format_size(block) + "), got " + format_size(options.host_memory));
  }
  const std::uint64_t wanted = align_up(std::max(block, kBufferSize), block);
  return options.host_memory >= 2 * wanted ? wanted : block;
}

void check_process(pid_t owner, const char* what) {
  if (getpid() == owner) return;
  throw StateError(std::string("this ") + what + " was created in process " +
                   std::to_string(owner) +
                   " and cannot be used in a forked child; create one in the "
                   "child");
}

// Throws the operation's own error and remembers that somebody has seen it.
void check(SwapOperation& operation, const Ticket& ticket) {
  if (std::exception_ptr error = ticket.error()) {
    operation.error_seen = true;
    std::rethrow_exception(error);
  }
}

TimeoutError timed_out(const SwapOperation& operation,
                       std::chrono::nanoseconds timeout) {
  std::ostringstream text;
  text << (operation.out() ? "swap_out" : "swap_in") << " of '" << operation.key
       << "' did not end within "
       << std::chrono::duration<double>(timeout).count() << " s; it goes on";
  return TimeoutError(text.str());
}

void wait_for_ticket(SwapOperation& operation, const Ticket& ticket,
                     SwapTicket::Timeout timeout) {
  operation.retired->clear();
  if (!ticket.wait_for(timeout.value_or(std::chrono::nanoseconds::max()))) {
    throw timed_out(operation, *timeout);
  }
  operation.retired->clear();
  check(operation, ticket);
}

void join_current_stream(const SwapOperation& operation) {
  if (operation.last_copy == nullptr) return;
  operation.bytes.device->wait(Device::Stream::kCurrent, operation.last_copy);
}

}  // namespace

SwapTicket::SwapTicket(std::shared_ptr<SwapOperation> operation)
    : operation_(std::move(operation)) {}

void SwapTicket::wait_source(Timeout timeout) const {
  check_process(operation_->owner, "ticket");
  if (!operation_->out()) return;
  wait_for_ticket(*operation_, operation_->staged.ticket(), timeout);
  join_current_stream(*operation_);
}

void SwapTicket::wait(Timeout timeout) const {
  check_process(operation_->owner, "ticket");
  if (operation_->out()) {
    wait_for_ticket(*operation_, operation_->ended.ticket(), timeout);
    return;
  }
  wait_for_ticket(*operation_, operation_->staged.ticket(), timeout);
  check(*operation_, operation_->ended.ticket());
  join_current_stream(*operation_);
}

bool SwapTicket::wait_for(std::chrono::nanoseconds timeout) const {
  check_process(operation_->owner, "ticket");
  const TicketSource& what =
      operation_->out() ? operation_->ended : operation_->staged;
  return what.ticket().wait_for(timeout);
}

bool SwapTicket::wait_source_for(std::chrono::nanoseconds timeout) const {
  check_process(operation_->owner, "ticket");
  return !operation_->out() || operation_->staged.ticket().wait_for(timeout);
}

TimeoutError SwapTicket::timed_out(std::chrono::nanoseconds timeout) const {
  return torch_ext::timed_out(*operation_, timeout);
}

bool SwapTicket::done() const {
  check_process(operation_->owner, "ticket");
  return operation_->ended.ticket().done();
}

class Swapper::Impl {
 public:
  explicit Impl(const SwapperOptions& options)
      : store(std::make_unique<Store>(options.store)),
        pool(std::make_unique<BufferPool>(
            buffer_size(options), options.host_memory / buffer_size(options))),
        copy_thread(std::make_unique<CopyThread>(
            *store, *pool, keys,
            [this](const SwapOperation& operation) { count(operation); },
            [this](std::string note) {
              std::lock_guard lock(mutex);
              notes.push_back(std::move(note));
            })),
        notes(store->notes()),
        engine(store->engine()) {}

  // Before any lock: in a forked child its holder may not exist.
  void check_process() const { torch_ext::check_process(owner, "swapper"); }

  // Holds the lock of the calls, whose order is the keys'.
  [[nodiscard]] std::unique_lock<std::mutex> enter() {
    check_process();
    std::unique_lock lock(calls);
    if (closed) throw StateError("this swapper is closed");
    retired->clear();
    return lock;
  }

  void count(const SwapOperation& operation) {
    std::lock_guard lock(mutex);
    stats.operations += 1;
    stats.in_flight -= 1;
    if (operation.error != nullptr) {
      stats.failures += 1;
    } else {
      (operation.out() ? stats.bytes_out : stats.bytes_in) +=
          operation.bytes.size;
    }
  }

  OperationPtr make_operation(SwapOperation::Kind kind, const std::string& key,
                              DeviceBytes bytes) {
    auto operation = std::make_shared<SwapOperation>();
    operation->kind = kind;
    operation->key = key;
    operation->on_host = bytes.device->name() == "cpu";
    operation->bytes = std::move(bytes);
    operation->retired = retired;
    operation->owner = owner;
    operation->start =
        operation->bytes.device->record(Device::Stream::kCurrent);
    return operation;
  }

  SwapTicket start(OperationPtr operation) {
    {
      std::lock_guard lock(mutex);
      stats.in_flight += 1;
    }
    SwapTicket ticket(operation);
    try {
      copy_thread->submit(std::move(operation));
    } catch (...) {
      std::lock_guard lock(mutex);
      stats.in_flight -= 1;
      throw;
    }
    return ticket;
  }

  SwapperStats snapshot() const {
    std::lock_guard lock(mutex);
    SwapperStats now = stats;
    if (store == nullptr) return now;
    now.host_bytes = pool->buffer_size() * pool->count();
    now.host_bytes_peak = pool->buffer_size() * pool->peak_in_use();
    now.store = store->stats();
    return now;
  }

  const pid_t owner = getpid();
  KeyTable keys;
  std::shared_ptr<RetireList> retired = std::make_shared<RetireList>();
  mutable std::mutex mutex;  // Of stats, notes and the pointers' reset.
  SwapperStats stats;
  std::unique_ptr<Store> store;
  std::unique_ptr<BufferPool> pool;
  std::unique_ptr<CopyThread> copy_thread;
  std::vector<std::string> notes;
  const std::string engine;
  std::mutex calls;
  bool closed = false;
};

Swapper::Swapper(const SwapperOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

Swapper::~Swapper() {
  if (impl_->owner != getpid()) {
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

SwapTicket Swapper::swap_out(const std::string& key, DeviceBytes source,
                             std::shared_ptr<const void> tag) {
  const auto lock = impl_->enter();
  impl_->keys.throw_unseen(key);
  auto operation =
      impl_->make_operation(SwapOperation::Kind::kOut, key, std::move(source));
  const auto version =
      impl_->keys.add(key, operation->bytes.size, std::move(tag));
  operation->version = version;
  try {
    return impl_->start(std::move(operation));
  } catch (...) {
    impl_->keys.resolve(version, std::current_exception());
    throw;
  }
}

SwapTicket Swapper::swap_in(const std::string& key, DeviceBytes destination) {
  return swap_in(entry(key), std::move(destination));
}

SwapTicket Swapper::swap_in(const Entry& entry, DeviceBytes destination) {
  const auto lock = impl_->enter();
  const std::string& key = entry.key_;
  impl_->keys.throw_unseen(key);
  if (entry.size() != destination.size) {
    throw std::invalid_argument("swap_in of '" + key +
                                "': " + std::to_string(entry.size()) +
                                " bytes are stored, the destination has " +
                                std::to_string(destination.size));
  }
  auto operation = impl_->make_operation(SwapOperation::Kind::kIn, key,
                                         std::move(destination));
  operation->version = entry.version_;
  try {
    return impl_->start(std::move(operation));
  } catch (...) {
    // The write failed between the two looks; this call reports it.
    static_cast<void>(impl_->keys.take_unseen(key));
    throw;
  }
}

std::uint64_t Swapper::Entry::size() const { return version_->size; }

const std::shared_ptr<const void>& Swapper::Entry::tag() const {
  return version_->tag;
}

Swapper::Entry Swapper::entry(const std::string& key) {
  const auto lock = impl_->enter();
  impl_->keys.throw_unseen(key);
  Entry entry;
  entry.key_ = key;
  entry.version_ = impl_->keys.find(key);
  return entry;
}

void Swapper::remove(const std::string& key) {
  const auto lock = impl_->enter();
  try {
    impl_->keys.throw_unseen(key);
  } catch (...) {
    try {
      impl_->keys.remove(key);
    } catch (const KeyError&) {
      // The write that failed was the key's first.
    }
    throw;
  }
  impl_->keys.remove(key);
}

std::vector<std::string> Swapper::keys() {
  const auto lock = impl_->enter();
  return impl_->keys.keys();
}

SwapperStats Swapper::stats() const {
  impl_->check_process();
  return impl_->snapshot();
}

std::vector<std::string> Swapper::notes() const {
  impl_->check_process();
  std::lock_guard lock(impl_->mutex);
  return impl_->notes;
}

const std::string& Swapper::engine() const noexcept { return impl_->engine; }

void Swapper::close() {
  impl_->check_process();
  std::lock_guard lock(impl_->calls);
  if (impl_->closed) return;
  impl_->closed = true;
  impl_->copy_thread->stop();
  impl_->keys.clear();
  {
    const SwapperStats last = impl_->snapshot();
    std::lock_guard state(impl_->mutex);
    impl_->stats = last;
    impl_->copy_thread.reset();
    impl_->pool.reset();
    impl_->store.reset();
  }
  impl_->retired->clear();
  if (auto error = impl_->keys.take_unseen()) std::rethrow_exception(error);
}

}  // namespace torch_ext
