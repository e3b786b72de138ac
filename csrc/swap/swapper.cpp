#include "torch_ext/swap/swapper.h"

#include <chrono>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "key_table.h"
#include "swap_core.h"
#include "swap_operation.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

// Throws the operation's own error, and remembers that somebody has seen it.
void check(SwapOperation& operation, const Ticket& ticket) {
  if (std::exception_ptr error = ticket.error()) {
    operation.error_seen = true;
    std::rethrow_exception(error);
  }
}

TimeoutError timed_out(const SwapOperation& operation,
                       std::chrono::nanoseconds timeout) {
  std::ostringstream text;
  text << operation.name << " of '" << operation.key << "' did not end within "
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
  operation_->owner.check();
  if (!operation_->out()) return;
  wait_for_ticket(*operation_, operation_->staged.ticket(), timeout);
  join_current_stream(*operation_);
}

void SwapTicket::wait(Timeout timeout) const {
  operation_->owner.check();
  if (operation_->out()) {
    wait_for_ticket(*operation_, operation_->ended.ticket(), timeout);
    return;
  }
  wait_for_ticket(*operation_, operation_->staged.ticket(), timeout);
  check(*operation_, operation_->ended.ticket());
  join_current_stream(*operation_);
}

bool SwapTicket::wait_for(std::chrono::nanoseconds timeout) const {
  operation_->owner.check();
  const TicketSource& what =
      operation_->out() ? operation_->ended : operation_->staged;
  return what.ticket().wait_for(timeout);
}

bool SwapTicket::wait_source_for(std::chrono::nanoseconds timeout) const {
  operation_->owner.check();
  return !operation_->out() || operation_->ended.ticket().done() ||
         operation_->staged.ticket().wait_for(timeout);
}

TimeoutError SwapTicket::timed_out(std::chrono::nanoseconds timeout) const {
  return torch_ext::timed_out(*operation_, timeout);
}

bool SwapTicket::done() const {
  operation_->owner.check();
  return operation_->ended.ticket().done();
}

class Swapper::Impl {
 public:
  explicit Impl(const SwapperOptions& options)
      : store(std::make_unique<Store>(options.store)),
        core("swapper", options.store.aio, options.host_memory),
        engine(store->engine()) {
    for (const std::string& note : store->notes()) core.add_note(note);
  }

  SwapTicket start(OperationPtr operation) REQUIRES(core.calls()) {
    SwapTicket ticket(operation);
    core.start(std::move(operation));
    return ticket;
  }

  /// close() holds both locks.
  Store& open_store() REQUIRES(core.calls()) UNCHECKED_THREADS {
    return *store;
  }

  OperationPtr make_operation(SwapOperation::Kind kind, const std::string& key,
                              DeviceBytes bytes,
                              std::shared_ptr<StoredValue> value,
                              IoPriority priority) {
    OperationPtr operation =
        core.make_operation(kind, key, std::move(bytes), std::move(value));
    operation->name = operation->out() ? "swap_out" : "swap_in";
    operation->priority = priority;
    return operation;
  }

  void throw_unseen(const std::string& key) {
    const std::exception_ptr error = core.unseen().take(key);
    if (error != nullptr) std::rethrow_exception(error);
  }

  mutable Mutex mutex;
  std::unique_ptr<Store> store GUARDED_BY(mutex);
  /// For when the store is gone.
  StoreStats last_stats GUARDED_BY(mutex);
  KeyTable keys;
  SwapCore core;  // Its threads use the store and the keys.
  const std::string engine;
};

Swapper::Swapper(const SwapperOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

Swapper::~Swapper() {
  impl_->core.owner().end(impl_, [this] { close(); });
}

SwapTicket Swapper::swap_out(const std::string& key, DeviceBytes source,
                             std::shared_ptr<const void> tag) {
  const SwapCore::Call call(impl_->core);
  impl_->throw_unseen(key);
  const auto value = std::make_shared<StoredValue>(
      impl_->keys, impl_->open_store(), source.size, std::move(tag));
  auto operation =
      impl_->make_operation(SwapOperation::Kind::kOut, key, std::move(source),
                            value, IoPriority::kWriteBack);
  impl_->keys.add(key, value);
  operation->key_removed = value->key_removed();
  return impl_->start(std::move(operation));
}

SwapTicket Swapper::swap_in(const std::string& key, DeviceBytes destination,
                            IoPriority priority) {
  return swap_in(entry(key), std::move(destination), priority);
}

SwapTicket Swapper::swap_in(const Entry& entry, DeviceBytes destination,
                            IoPriority priority) {
  const SwapCore::Call call(impl_->core);
  const std::string& key = entry.key_;
  impl_->throw_unseen(key);
  if (entry.size() != destination.size) {
    throw std::invalid_argument("swap_in of '" + key +
                                "': " + std::to_string(entry.size()) +
                                " bytes are stored, the destination has " +
                                std::to_string(destination.size));
  }
  auto operation =
      impl_->make_operation(SwapOperation::Kind::kIn, key,
                            std::move(destination), entry.value_, priority);
  operation->key_removed = entry.value_->key_removed();
  return impl_->start(std::move(operation));
}

std::uint64_t Swapper::Entry::size() const { return value_->size(); }

const std::shared_ptr<const void>& Swapper::Entry::tag() const {
  return value_->tag();
}

Swapper::Entry Swapper::entry(const std::string& key) {
  const SwapCore::Call call(impl_->core);
  impl_->throw_unseen(key);
  Entry entry;
  entry.key_ = key;
  entry.value_ = impl_->keys.find(key);
  return entry;
}

void Swapper::remove(const std::string& key) {
  const SwapCore::Call call(impl_->core);
  const bool has_failed = impl_->core.unseen().leave(key);
  try {
    impl_->keys.remove(key);
  } catch (const KeyError&) {
    // The failed write was the key's first. To its user, the key is there.
    if (!has_failed) throw;
  }
}

std::vector<std::string> Swapper::keys() {
  const SwapCore::Call call(impl_->core);
  return impl_->keys.keys();
}

SwapperStats Swapper::stats() const {
  impl_->core.owner().check();
  const MutexLock lock(impl_->mutex);
  const SwapCore::Counts counts = impl_->core.counts();
  return {.bytes_out = counts.bytes_out,
          .bytes_in = counts.bytes_in,
          .operations = counts.operations,
          .failures = counts.failures,
          .in_flight = counts.in_flight,
          .host_bytes = counts.host_bytes,
          .host_bytes_peak = counts.host_bytes_peak,
          .store = impl_->store ? impl_->store->stats() : impl_->last_stats};
}

std::vector<std::string> Swapper::notes() const { return impl_->core.notes(); }

const std::string& Swapper::engine() const noexcept { return impl_->engine; }

void Swapper::close() {
  const auto error = impl_->core.close([this] {
    impl_->keys.clear();
    const MutexLock lock(impl_->mutex);
    impl_->last_stats = impl_->store->stats();
    impl_->store.reset();
  });
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace torch_ext
