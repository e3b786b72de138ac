#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {

/// What befalls one request; the default is nothing.
struct Fault {
  int error = 0;  ///< Completes with -error; no byte moves.
  std::optional<std::size_t> transfer =
      std::nullopt;  ///< Only so many bytes really move.
  std::optional<std::size_t> claim =
      std::nullopt;          ///< Says that so many moved; none does.
  std::size_t refusals = 0;  ///< submit() stops before it so many times.
  bool hold = false;         ///< Not carried out before release().

  static Fault fail(int error) { return {.error = error}; }
  static Fault cut(std::size_t bytes) { return {.transfer = bytes}; }
  /// Part of a sector: bytes that the next request has to move again.
  static Fault claimed(std::size_t bytes) { return {.claim = bytes}; }
  static Fault refuse(std::size_t times) { return {.refusals = times}; }
  static Fault held() { return {.hold = true}; }
};

/// Decides about the request number `index`, counted from 0 over all engines
/// of a script in the order of acceptance.
using FaultPlan =
    std::function<Fault(std::size_t index, const IoRequest& request)>;

/// `fault` for request `index` only.
inline FaultPlan only(std::size_t index, Fault fault) {
  return [=](std::size_t i, const IoRequest&) {
    return i == index ? fault : Fault();
  };
}

/// `fault` for request `index` and all that follow.
inline FaultPlan from(std::size_t index, Fault fault) {
  return [=](std::size_t i, const IoRequest&) {
    return i >= index ? fault : Fault();
  };
}

class FaultyEngine;

/// Shared by a test and the engines that it scripts. Threads: any.
class FaultScript {
 public:
  explicit FaultScript(FaultPlan plan = nullptr) : plan_(std::move(plan)) {}

  void set_plan(FaultPlan plan) {
    std::lock_guard lock(mutex_);
    plan_ = std::move(plan);
  }

  /// From now on completions that are ready together come in an order drawn
  /// from `seed`.
  void shuffle(std::uint64_t seed) {
    std::lock_guard lock(mutex_);
    random_.emplace(seed);
  }

  /// Lets request `index` go on, now or once it is held.
  void release(std::size_t index);
  /// Lets all held requests go on, and holds none from now on.
  void release_all();

  /// After so many more calls of poll(), the next `times` throw.
  void fail_polls(std::size_t times, std::size_t after = 0) {
    std::lock_guard lock(mutex_);
    good_polls_ = after;
    failing_polls_ = times;
  }
  /// Engines that exist.
  std::size_t engines() const {
    std::lock_guard lock(mutex_);
    return engines_.size();
  }

  /// Calls of submit() with a batch that is not empty.
  std::size_t submits() const { return read(&FaultScript::submits_); }
  /// Requests accepted.
  std::size_t requests() const { return read(&FaultScript::requests_); }
  /// Calls of poll() that threw.
  std::size_t failed_polls() const { return read(&FaultScript::failed_polls_); }
  /// Requests held and not released.
  std::size_t held() const { return read(&FaultScript::held_); }
  /// Most requests that one engine had in flight.
  std::size_t max_in_flight() const {
    return read(&FaultScript::max_in_flight_);
  }
  /// Most requests that all engines together had in flight.
  std::size_t max_total_in_flight() const {
    return read(&FaultScript::max_total_);
  }
  /// Requests accepted per call of submit(), in order.
  std::vector<std::size_t> batches() const {
    return read(&FaultScript::batches_);
  }
  /// All accepted requests as they came, in order. Their memory may be gone.
  std::vector<IoRequest> log() const { return read(&FaultScript::log_); }

 private:
  friend class FaultyEngine;

  bool is_released(std::size_t index) const {
    return all_released_ || released_.count(index) > 0;
  }

  template <typename T>
  T read(T FaultScript::*member) const {
    std::lock_guard lock(mutex_);
    return this->*member;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  FaultPlan plan_;
  std::optional<std::mt19937_64> random_;
  std::set<FaultyEngine*> engines_;
  std::map<std::size_t, std::size_t> refused_;
  std::set<std::size_t> released_;
  bool all_released_ = false;
  std::size_t good_polls_ = 0;
  std::size_t failing_polls_ = 0;
  std::size_t failed_polls_ = 0;
  std::size_t submits_ = 0;
  std::size_t requests_ = 0;
  std::size_t held_ = 0;
  std::size_t max_in_flight_ = 0;
  std::size_t total_in_flight_ = 0;
  std::size_t max_total_ = 0;
  std::vector<std::size_t> batches_;
  std::vector<IoRequest> log_;
};

/// An engine that does what another does, but for the faults of a script.
/// Its destructor waits for held requests too: release them before.
class FaultyEngine final : public IoEngine {
 public:
  FaultyEngine(std::unique_ptr<IoEngine> inner,
               std::shared_ptr<FaultScript> script)
      : inner_(std::move(inner)), script_(std::move(script)) {
    std::lock_guard lock(script_->mutex_);
    script_->engines_.insert(this);
  }

  ~FaultyEngine() override {
    IoCompletion ignored;
    while (in_flight_ > 0) collect({&ignored, 1}, 1, std::chrono::hours(1));
    std::lock_guard lock(script_->mutex_);
    script_->engines_.erase(this);
  }

  std::string_view name() const noexcept override { return inner_->name(); }
  std::size_t depth() const noexcept override { return inner_->depth(); }

  std::size_t submit(std::span<const IoRequest> batch) override {
    const std::size_t accepted = accept(batch);
    carry_out();
    return accepted;
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   std::chrono::nanoseconds timeout) override {
    {
      std::lock_guard lock(script_->mutex_);
      if (script_->good_polls_ > 0) {
        --script_->good_polls_;
      } else if (script_->failing_polls_ > 0) {
        --script_->failing_polls_;
        ++script_->failed_polls_;
        throw IoError({.op = "io_getevents", .error = EINVAL});
      }
    }
    return collect(out, at_least, timeout);
  }

  void wake() noexcept override {
    std::lock_guard lock(script_->mutex_);
    woken_ = true;
    nudge();
  }

 private:
  friend class FaultScript;

  struct Entry {
    std::size_t index;
    IoRequest request;
    std::optional<std::int64_t> result;  // Without the engine within.
  };

  std::size_t collect(std::span<IoCompletion> out, std::size_t at_least,
                      std::chrono::nanoseconds timeout) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    at_least = std::min(at_least, out.size());
    std::size_t count = 0;
    while (true) {
      admit_released();
      carry_out();
      reap(0, std::chrono::nanoseconds(0));
      count += deliver(out.subspan(count));
      if (count >= at_least || in_flight_ == 0) return count;
      const auto left = timeout - (Clock::now() - start);
      if (left.count() <= 0 || woken_.exchange(false)) return count;
      if (inner_in_flight_ > 0) {
        reap(1, left);
      } else {
        pause(left);
      }
    }
  }

  std::size_t accept(std::span<const IoRequest> batch) {
    if (batch.empty()) return 0;
    std::lock_guard lock(script_->mutex_);
    FaultScript& script = *script_;
    std::size_t accepted = 0;
    while (accepted < batch.size() && in_flight_ < depth() &&
           accept_one(batch[accepted])) {
      ++accepted;
    }
    ++script.submits_;
    script.batches_.push_back(accepted);
    script.max_in_flight_ = std::max(script.max_in_flight_, in_flight_);
    script.max_total_ = std::max(script.max_total_, script.total_in_flight_);
    return accepted;
  }

  bool accept_one(const IoRequest& request) {
    FaultScript& script = *script_;
    const std::size_t index = script.requests_;
    const Fault fault = script.plan_ ? script.plan_(index, request) : Fault();
    if (script.refused_[index] < fault.refusals) {
      ++script.refused_[index];
      return false;
    }
    ++script.requests_;
    script.log_.push_back(request);
    ++in_flight_;
    ++script.total_in_flight_;
    Entry entry{index, request, std::nullopt};
    if (fault.error != 0) {
      entry.result = -fault.error;
    } else if (fault.claim) {
      entry.result =
          static_cast<std::int64_t>(std::min(request.length, *fault.claim));
    }
    if (fault.transfer) {
      entry.request.length = std::min(request.length, *fault.transfer);
    }
    if (fault.hold && !script.is_released(index)) {
      ++script.held_;
      held_.push_back(entry);
    } else {
      waiting_.push_back(entry);
    }
    return true;
  }

  void admit_released() {
    if (held_.empty()) return;
    std::lock_guard lock(script_->mutex_);
    for (auto entry = held_.begin(); entry != held_.end();) {
      if (script_->is_released(entry->index)) {
        --script_->held_;
        waiting_.push_back(*entry);
        entry = held_.erase(entry);
      } else {
        ++entry;
      }
    }
  }

  void carry_out() {
    std::vector<IoRequest> real;
    for (const Entry& entry : waiting_) {
      if (entry.result) {
        ready_.push_back({entry.request.cookie, *entry.result});
      } else {
        real.push_back(entry.request);
      }
    }
    std::erase_if(waiting_,
                  [](const Entry& e) { return e.result.has_value(); });
    if (real.empty()) return;
    const std::size_t taken = inner_->submit(real);
    inner_in_flight_ += taken;
    waiting_.erase(waiting_.begin(),
                   waiting_.begin() + static_cast<std::ptrdiff_t>(taken));
  }

  void reap(std::size_t at_least, std::chrono::nanoseconds timeout) {
    if (inner_in_flight_ == 0) return;
    std::vector<IoCompletion> some(inner_in_flight_);
    some.resize(inner_->poll(some, at_least, timeout));
    inner_in_flight_ -= some.size();
    ready_.insert(ready_.end(), some.begin(), some.end());
  }

  std::size_t deliver(std::span<IoCompletion> out) {
    if (ready_.empty() || out.empty()) return 0;
    std::lock_guard lock(script_->mutex_);
    if (script_->random_) {
      std::shuffle(ready_.begin(), ready_.end(), *script_->random_);
    }
    const std::size_t count = std::min(out.size(), ready_.size());
    const auto end = ready_.begin() + static_cast<std::ptrdiff_t>(count);
    std::copy(ready_.begin(), end, out.begin());
    ready_.erase(ready_.begin(), end);
    in_flight_ -= count;
    script_->total_in_flight_ -= count;
    return count;
  }

  /// Until a held request is released, a wake or the timeout; at most 1 ms
  /// where requests wait for room in the inner engine.
  void pause(std::chrono::nanoseconds timeout) {
    timeout = std::min<std::chrono::nanoseconds>(
        timeout, waiting_.empty() ? std::chrono::nanoseconds(3600000000000)
                                  : std::chrono::nanoseconds(1000000));
    std::unique_lock lock(script_->mutex_);
    script_->changed_.wait_for(lock, timeout, [this] {
      return woken_ || std::any_of(held_.begin(), held_.end(), [this](auto& e) {
               return script_->is_released(e.index);
             });
    });
  }

  /// Ends whichever wait poll() is in. With the script's mutex held.
  void nudge() noexcept {
    inner_->wake();
    script_->changed_.notify_all();
  }

  const std::unique_ptr<IoEngine> inner_;
  const std::shared_ptr<FaultScript> script_;
  std::vector<Entry> held_;          // until released
  std::vector<Entry> waiting_;       // to be carried out
  std::vector<IoCompletion> ready_;  // to be delivered
  std::size_t in_flight_ = 0;        // in any of the three, or inside
  std::size_t inner_in_flight_ = 0;
  std::atomic<bool> woken_ = false;
};

inline void FaultScript::release(std::size_t index) {
  std::lock_guard lock(mutex_);
  released_.insert(index);
  for (FaultyEngine* engine : engines_) engine->nudge();
}

inline void FaultScript::release_all() {
  std::lock_guard lock(mutex_);
  all_released_ = true;
  for (FaultyEngine* engine : engines_) engine->nudge();
}

/// A factory whose engines share `script`'s faults.
inline IoEngineFactory faulty_factory(IoEngineFactory inner,
                                      std::shared_ptr<FaultScript> script) {
  return [=](int depth) -> std::unique_ptr<IoEngine> {
    return std::make_unique<FaultyEngine>(inner(depth), script);
  };
}

/// As above, over the engine `name`.
inline IoEngineFactory faulty_factory(std::string_view name,
                                      std::shared_ptr<FaultScript> script) {
  return faulty_factory(make_engine_factory(name), std::move(script));
}

}  // namespace torch_ext::test
