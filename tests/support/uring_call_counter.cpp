#include "support/uring_call_counter.h"

#ifdef TORCH_EXT_LIBURING

#include <dlfcn.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <utility>

#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {
namespace {

std::atomic<std::size_t> submits;
std::atomic<std::size_t> requests;
std::atomic<std::size_t> polls;
std::atomic<std::size_t> waits;

std::mutex rules_mutex;
std::shared_ptr<const UringRules> rules;

std::shared_ptr<const UringRules> current_rules() {
  std::lock_guard lock(rules_mutex);
  return rules;
}

/// liburing's own.
template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

/// Held requests are polls of an event until it is released; the bytes are
/// moved when that poll is reaped. Never destroyed: threads may outlive main.
class Hold {
 public:
  void begin(int fd) {
    std::lock_guard lock(mutex_);
    fd_ = fd;
    event_ = eventfd(0, EFD_CLOEXEC);
  }

  void end() {
    std::lock_guard lock(mutex_);
    if (fd_ < 0) return;
    fd_ = -1;
    eventfd_write(event_, 1);
    close(event_);
  }

  void take(io_uring* ring, io_uring_sqe& entry) {
    std::lock_guard lock(mutex_);
    const bool moves =
        entry.opcode == IORING_OP_READ || entry.opcode == IORING_OP_WRITE;
    if (fd_ < 0 || entry.fd != fd_ || !moves) return;
    const std::uint64_t cookie = entry.user_data;
    held_[{ring, cookie}] = entry;
    io_uring_prep_poll_add(&entry, event_, POLLIN);
    entry.user_data = cookie;
  }

  void give(io_uring* ring, io_uring_cqe& entry) {
    std::lock_guard lock(mutex_);
    const auto found = held_.find({ring, entry.user_data});
    if (found == held_.end()) return;
    const io_uring_sqe& request = found->second;
    const long call =
        request.opcode == IORING_OP_READ ? SYS_pread64 : SYS_pwrite64;
    const long result =
        syscall(call, request.fd, request.addr, request.len, request.off);
    entry.res = static_cast<int>(result < 0 ? -errno : result);
    held_.erase(found);
  }

 private:
  std::mutex mutex_;
  int fd_ = -1;
  int event_ = -1;
  std::map<std::pair<io_uring*, std::uint64_t>, io_uring_sqe> held_;
};

Hold& hold() {
  static auto* const hold = new Hold;
  return *hold;
}

/// Request `index` of those that the ring has not flushed yet.
io_uring_sqe& entry_at(const io_uring_sq& queue, unsigned index) {
  return queue.sqes[(queue.sqe_head + index) & *queue.kring_mask];
}

}  // namespace

UringCalls uring_calls() { return {submits, requests, polls, waits}; }

bool uring_calls_available() {
  const std::size_t before = submits;
  // Makes a ring, if the core can, and asks it to do nothing.
  engine_unavailable_reason("io_uring");
  return submits > before;
}

UringRulesInForce::UringRulesInForce(UringRules new_rules) {
  std::lock_guard lock(rules_mutex);
  rules = std::make_shared<const UringRules>(std::move(new_rules));
}

UringRulesInForce::~UringRulesInForce() {
  std::lock_guard lock(rules_mutex);
  rules = nullptr;
}

void hold_uring_requests(int fd) { hold().begin(fd); }
void release_uring_requests() { hold().end(); }

}  // namespace torch_ext::test

// Newer versions of liburing declare their functions so.
constexpr bool kNoexcept = noexcept(io_uring_submit(nullptr));

extern "C" {

int io_uring_queue_init_params(unsigned entries, io_uring* ring,
                               io_uring_params* params) noexcept(kNoexcept) {
  using namespace torch_ext::test;
  static auto* const real =
      next<decltype(io_uring_queue_init_params)>("io_uring_queue_init_params");
  const auto in_force = current_rules();
  if (in_force == nullptr) return real(entries, ring, params);
  if (in_force->setup) {
    if (const int error = in_force->setup(); error < 0) return error;
  }
  if (in_force->entries != 0) entries = in_force->entries;
  const int rc = real(entries, ring, params);
  if (in_force->old_kernel) params->features = 0;
  return rc;
}

int io_uring_submit(io_uring* ring) noexcept(kNoexcept) {
  using namespace torch_ext::test;
  static auto* const real = next<decltype(io_uring_submit)>("io_uring_submit");
  ++submits;
  io_uring_sq& queue = ring->sq;
  unsigned count = queue.sqe_tail - queue.sqe_head;
  const unsigned left = count;
  const auto in_force = current_rules();
  if (in_force != nullptr && in_force->submit) {
    const int most = in_force->submit(static_cast<int>(count));
    if (most < 0) return most;
    count = std::min(count, static_cast<unsigned>(most));
    if (count == 0) return 0;
  }
  for (unsigned i = 0; i < count; ++i) {
    const auto opcode = entry_at(queue, i).opcode;
    if (opcode == IORING_OP_POLL_ADD) ++polls;
    if (opcode != IORING_OP_POLL_ADD && opcode != IORING_OP_NOP) ++requests;
    hold().take(ring, entry_at(queue, i));
  }
  // The kernel is not shown the others.
  queue.sqe_tail -= left - count;
  const int rc = real(ring);
  queue.sqe_tail += left - count;
  return rc;
}

int io_uring_wait_cqes(io_uring* ring, io_uring_cqe** entry, unsigned count,
                       __kernel_timespec* timeout,
                       sigset_t* mask) noexcept(kNoexcept) {
  using namespace torch_ext::test;
  static auto* const real =
      next<decltype(io_uring_wait_cqes)>("io_uring_wait_cqes");
  ++waits;
  const auto in_force = current_rules();
  if (in_force != nullptr && in_force->wait) {
    if (const int error = in_force->wait(); error < 0) return error;
  }
  return real(ring, entry, count, timeout, mask);
}

unsigned io_uring_peek_batch_cqe(io_uring* ring, io_uring_cqe** entries,
                                 unsigned count) noexcept(kNoexcept) {
  using namespace torch_ext::test;
  static auto* const real =
      next<decltype(io_uring_peek_batch_cqe)>("io_uring_peek_batch_cqe");
  const unsigned found = real(ring, entries, count);
  for (io_uring_cqe* entry : std::span(entries, found)) {
    hold().give(ring, *entry);
  }
  return found;
}

}  // extern "C"

#else

namespace torch_ext::test {

UringCalls uring_calls() { return {}; }
bool uring_calls_available() { return false; }
UringRulesInForce::UringRulesInForce(UringRules) {}
UringRulesInForce::~UringRulesInForce() = default;
void hold_uring_requests(int) {}
void release_uring_requests() {}

}  // namespace torch_ext::test

#endif
