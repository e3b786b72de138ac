#include "torch_ext/io/io_queue.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/owner_process.h"
#include "io_backlog.h"
#include "io_operation.h"
#include "io_worker.h"

namespace torch_ext {

namespace {

// A turn is long enough for one of the optimizer's tiles. They must come one
// after the other, to be worked on one by one.
constexpr std::uint64_t kTurn = std::uint64_t{32} << 20;

const AioConfig& validated(const AioConfig& config) {
  config.validate();
  return config;
}

std::size_t turn_of(const AioConfig& config) {
  return std::max<std::size_t>(static_cast<std::size_t>(config.queue_depth),
                               kTurn / config.block_size);
}

}  // namespace

std::uint64_t this_caller() noexcept {
  static std::atomic<std::uint64_t> callers = 0;
  thread_local const std::uint64_t number = ++callers;
  return number;
}

class IoQueue::Impl {
 public:
  Impl(const AioConfig& config, const IoEngineFactory& factory)
      : config_(validated(config)), backlog_(turn_of(config)) {
    try {
      for (int i = 0; i < config.thread_count; ++i) {
        workers_.push_back(std::make_unique<IoWorker>(
            backlog_, config, factory(config.queue_depth)));
        workers_.back()->start();
      }
    } catch (...) {
      stop();
      throw;
    }
  }

  void stop() {
    backlog_.close();
    for (auto& worker : workers_) worker->join();
  }

  AioConfig config_;
  const OwnerProcess owner_{"I/O queue"};
  IoBacklog backlog_;
  std::vector<std::unique_ptr<IoWorker>> workers_;
};

IoQueue::IoQueue(const AioConfig& config, const IoEngineFactory& factory)
    : impl_(std::make_unique<Impl>(config, factory)) {}

IoQueue::~IoQueue() {
  impl_->owner_.end(impl_, [this] { impl_->stop(); });
}

Ticket IoQueue::submit(IoOperation operation) {
  return start(prepare(std::move(operation)));
}

IoQueue::Prepared IoQueue::prepare(IoOperation operation) {
  impl_->owner_.check();
  if (operation.caller == 0) operation.caller = this_caller();
  Prepared prepared;
  prepared.operation_ = std::make_shared<RunningOperation>(
      std::move(operation), impl_->config_.block_size);
  return prepared;
}

Ticket IoQueue::start(Prepared prepared) noexcept {
  impl_->backlog_.push(prepared.operation_);
  return prepared.operation_->ticket();
}

bool IoQueue::cancel(const Ticket& ticket) {
  impl_->owner_.check();
  auto* operation = dynamic_cast<RunningOperation*>(ticket.state_.get());
  return operation != nullptr && impl_->backlog_.cancel(*operation);
}

bool IoQueue::promote(const Ticket& ticket, IoPriority priority) {
  impl_->owner_.check();
  auto* operation = dynamic_cast<RunningOperation*>(ticket.state_.get());
  return operation != nullptr && impl_->backlog_.promote(*operation, priority);
}

IoQueueStats IoQueue::stats() const {
  impl_->owner_.check();
  std::vector<const IoCounters*> counters;
  for (const auto& worker : impl_->workers_) {
    counters.push_back(&worker->counters());
  }
  return impl_->backlog_.stats(counters);
}

const AioConfig& IoQueue::config() const noexcept { return impl_->config_; }

}  // namespace torch_ext
