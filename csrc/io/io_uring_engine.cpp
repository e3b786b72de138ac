#include "engines.h"
#include "torch_ext/base/error.h"
#include "torch_ext/base/process.h"

#ifdef TORCH_EXT_LIBURING

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <limits>
#include <thread>
#include <vector>

#include "deadline.h"

// We register neither descriptors nor buffers with the ring. The engine borrows
// descriptors, and a registered one outlives a close(): it would go on meaning
// the old file when its number means another. Registered buffers save the
// kernel looking up pages. With the huge pages of a BufferPool, that is too
// little to matter.

namespace torch_ext {
namespace {

using std::chrono::nanoseconds;

/// The most polls of the eventfd in the ring. wake() ends a wait for up to so
/// many completions.
constexpr std::size_t kWakeSlots = 16;

// The user data of completions that belong to no request. A request's user data
// is its slot. The largest number is liburing's.
constexpr std::uint64_t kWake = std::numeric_limits<std::uint64_t>::max() - 1;
constexpr std::uint64_t kNothing = kWake - 1;

/// Linux 5.11 has these. A timeout then needs no request of its own, and no
/// completion is lost.
constexpr std::uint32_t kFeatures = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;

constexpr const char* kTooOld = "Linux 5.11 or newer is needed";

/// What the user can do about a ring that is refused, as far as it is known.
std::string advice(int error) {
  if (error == ENOSYS)
    return "the kernel has no io_uring, or a sandbox hides it";
  if (error == ENOMEM) return "raise the memlock limit (ulimit -l)";
  if (error != EPERM && error != EACCES) return {};
  std::ifstream file("/proc/sys/kernel/io_uring_disabled");
  int value = 0;
  if (file >> value && value != 0) {
    return "sysctl kernel.io_uring_disabled is " + std::to_string(value);
  }
  return "a sandbox such as a container's seccomp profile forbids it";
}

/// Whether the kernel, asked again, may take what it has refused.
bool is_transient(int error) {
  return error == EAGAIN || error == EBUSY || error == ENOMEM;
}

class Ring {
 public:
  explicit Ring(std::size_t entries) {
    io_uring_params params = {};
    params.flags = IORING_SETUP_CLAMP;
    const int rc = io_uring_queue_init_params(static_cast<unsigned>(entries),
                                              &ring_, &params);
    if (rc < 0) {
      throw IoError(
          {.op = "io_uring_setup", .error = -rc, .detail = advice(-rc)});
    }
    if ((params.features & kFeatures) != kFeatures) {
      io_uring_queue_exit(&ring_);
      throw IoError(
          {.op = "io_uring_setup", .error = ENOSYS, .detail = kTooOld});
    }
    completions_ = params.cq_entries;
    // A child inherits the descriptor all the same. A failure changes nothing.
    io_uring_ring_dontfork(&ring_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (is_inherited()) {
      close(ring_.ring_fd);  // A child has no more of it.
    } else {
      io_uring_queue_exit(&ring_);
    }
  }

  io_uring* get() noexcept { return &ring_; }
  std::size_t completions() const noexcept { return completions_; }
  /// True in a forked child, where any use would touch the parent's ring.
  bool is_inherited() const noexcept { return process_id() != owner_; }

  /// Gives the kernel what is prepared. Returns 0, or the error for which it
  /// left some.
  int enter() noexcept {
    int interruptions = 0;
    while (io_uring_sq_ready(&ring_) > 0) {
      const int rc = io_uring_submit(&ring_);
      if (rc == -EINTR && ++interruptions <= kMaxInterruptions) continue;
      if (rc == 0 || rc == -EINTR) return EAGAIN;
      if (rc < 0) return -rc;
    }
    return 0;
  }

 private:
  const pid_t owner_ = process_id();
  io_uring ring_ = {};
  std::size_t completions_ = 0;
};

/// An eventfd that is readable from signal() to clear(). Threads: any.
class Event {
 public:
  Event() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw IoError({.op = "eventfd", .error = errno});
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { close(fd_); }

  int fd() const noexcept { return fd_; }
  // Each fails only if the counter is full, or empty, already, which is what
  // was wanted.
  void signal() const noexcept { eventfd_write(fd_, 1); }
  void clear() const noexcept {
    eventfd_t ignored = 0;
    eventfd_read(fd_, &ignored);
  }

 private:
  const int fd_;
};

void prepare(io_uring_sqe* entry, const IoRequest& request) {
  const auto length =
      static_cast<unsigned>(std::min(request.length, IoRequest::kMaxTransfer));
  // The largest offset would mean the file's position. The kernel refuses all
  // that are near it.
  const std::uint64_t offset =
      std::min(request.offset, std::numeric_limits<std::uint64_t>::max() - 1);
  switch (request.op) {
    case IoRequest::Op::kRead:
      io_uring_prep_read(entry, request.fd, request.data, length, offset);
      break;
    case IoRequest::Op::kWrite:
      io_uring_prep_write(entry, request.fd, request.data, length, offset);
      break;
    case IoRequest::Op::kSync:
      io_uring_prep_fsync(entry, request.fd, 0);
      break;
  }
}

class IoUringEngine final : public IoEngine {
 public:
  explicit IoUringEngine(std::size_t depth)
      : depth_(depth),
        ring_(depth + kWakeSlots),
        most_(std::min(depth, ring_.completions() - kWakeSlots)),
        cookies_(depth) {
    free_.reserve(depth);
    for (std::size_t slot = depth; slot > 0; --slot) free_.push_back(slot - 1);
    prepared_.reserve(depth);
    refused_.reserve(depth);
  }

  ~IoUringEngine() override {
    // Closing the ring would not wait for what is in flight.
    while (!ring_.is_inherited() && in_kernel() > 0) {
      std::array<IoCompletion, 64> ignored;
      try {
        poll(ignored, 1, std::chrono::hours(1));
      } catch (const IoError&) {
        // Completions come through shared memory, whatever the kernel refuses.
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }

  std::string_view name() const noexcept override { return "io_uring"; }
  std::size_t depth() const noexcept override { return depth_; }

  std::size_t submit(std::span<const IoRequest> batch) override {
    const std::size_t room = most_ - in_kernel() - refused_.size();
    batch = batch.first(std::min(batch.size(), room));
    std::size_t done = 0;
    int error = 0;
    while (done < batch.size() && error == 0) {
      prepare_some(batch.subspan(done));
      error = ring_.enter();
      done += prepared_.size() - take_back();
    }
    if (error != 0 && !is_transient(error)) {
      for (; done < batch.size(); ++done) {
        refused_.push_back({batch[done].cookie, -error});
      }
    }
    return done;
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   nanoseconds timeout) override {
    const std::size_t ready = take_first(refused_, out);
    out = out.first(std::min(out.size(), ready + in_kernel()));
    at_least = std::min(at_least, out.size());
    std::size_t count = ready + reap(out.subspan(ready));
    if (count >= at_least) return count;
    const Deadline deadline(timeout);
    bool over = false;
    while (count < at_least && !over) {
      const nanoseconds left = deadline.left();
      over = left.count() == 0;
      try {
        over |= wait(at_least - count, left);
      } catch (const IoError&) {
        // What was reaped before is not lost. The next call meets the error.
        if (count == 0) throw;
        over = true;
      }
      count += reap(out.subspan(count));
    }
    return count;
  }

  void wake() noexcept override {
    woken_ = true;
    if (waiting_.exchange(false)) event_.signal();
  }

 private:
  std::size_t in_kernel() const { return depth_ - free_.size(); }

  /// Prepares as many requests as the ring has room for.
  void prepare_some(std::span<const IoRequest> batch) {
    prepared_.clear();
    for (const IoRequest& request : batch) {
      io_uring_sqe* const entry = io_uring_get_sqe(ring_.get());
      if (entry == nullptr) return;
      prepare(entry, request);
      entry->user_data = free_.back();
      cookies_[free_.back()] = request.cookie;
      free_.pop_back();
      prepared_.push_back(entry);
    }
  }

  /// Takes back the requests that the kernel has left in the ring, which are
  /// the last ones. Returns how many there are. An entry cannot be removed, so
  /// it is made to do nothing.
  std::size_t take_back() {
    const std::size_t count =
        std::min<std::size_t>(io_uring_sq_ready(ring_.get()), prepared_.size());
    for (io_uring_sqe* const entry : std::span(prepared_).last(count)) {
      free_.push_back(entry->user_data);
      io_uring_prep_nop(entry);
      entry->user_data = kNothing;
    }
    return count;
  }

  /// Makes one blocking call of the kernel. True if wake() was called for it,
  /// or for the next one.
  bool wait(std::size_t wanted, nanoseconds left) {
    wanted = std::min(wanted, kWakeSlots);
    // A wait that cannot be woken must be short.
    if (!arm(wanted)) left = std::min<nanoseconds>(left, kUnarmedWait);
    waiting_ = true;
    // wake() sets woken_ before it looks at waiting_. So one of the two sees
    // the other.
    int rc = 0;
    if (!woken_ && left.count() > 0) {
      __kernel_timespec time = {.tv_sec = left.count() / 1'000'000'000,
                                .tv_nsec = left.count() % 1'000'000'000};
      io_uring_cqe* ignored = nullptr;
      rc = io_uring_wait_cqes(ring_.get(), &ignored,
                              static_cast<unsigned>(wanted), &time, nullptr);
    }
    waiting_ = false;
    if (rc < 0 && rc != -ETIME && rc != -EINTR && !is_transient(-rc)) {
      throw IoError({.op = "io_uring_enter", .error = -rc});
    }
    return woken_.exchange(false);
  }

  /// Sees to it that wake() makes `wanted` completions. False if the kernel has
  /// no room for that now.
  bool arm(std::size_t wanted) {
    if (armed_ < wanted && signalled_) {
      event_.clear();
      signalled_ = false;
    }
    while (armed_ < wanted) {
      io_uring_sqe* const entry = io_uring_get_sqe(ring_.get());
      if (entry == nullptr) break;
      io_uring_prep_poll_add(entry, event_.fd(), POLLIN);
      entry->user_data = kWake;
      ++armed_;
    }
    const int error = ring_.enter();
    if (error != 0 && !is_transient(error)) {
      throw IoError({.op = "io_uring_enter", .error = error});
    }
    return error == 0 && armed_ >= wanted;
  }

  /// Takes completions from the ring. It calls the kernel only if that holds
  /// completions back.
  std::size_t reap(std::span<IoCompletion> out) {
    std::size_t count = 0;
    while (count < out.size()) {
      std::array<io_uring_cqe*, 64> entries;
      const std::size_t most = std::min(entries.size(), out.size() - count);
      const unsigned found = io_uring_peek_batch_cqe(
          ring_.get(), entries.data(), static_cast<unsigned>(most));
      if (found == 0) break;
      for (const io_uring_cqe* entry : std::span(entries).first(found)) {
        if (entry->user_data == kWake) {
          --armed_;
          signalled_ = true;
        } else if (entry->user_data != kNothing) {
          out[count++] = {cookies_[entry->user_data], entry->res};
          free_.push_back(entry->user_data);
        }
      }
      io_uring_cq_advance(ring_.get(), found);
    }
    return count;
  }

  static constexpr nanoseconds kUnarmedWait = std::chrono::milliseconds(1);

  const std::size_t depth_;
  const Event event_;
  Ring ring_;
  /// The most requests in flight: as many as there is room for completions. A
  /// kernel that has to keep completions elsewhere may find no memory for it.
  /// It is less than the depth only where the depth is beyond the kernel's
  /// largest ring.
  const std::size_t most_;
  std::vector<std::uint64_t> cookies_;  ///< By slot.
  std::vector<std::size_t> free_;       ///< Slots.
  std::vector<io_uring_sqe*> prepared_;
  std::vector<IoCompletion> refused_;

  std::size_t armed_ = 0;   ///< Polls of the event in the ring.
  bool signalled_ = false;  ///< A poll has ended: the event may be readable.
  std::atomic<bool> woken_ = false;
  std::atomic<bool> waiting_ = false;
};

}  // namespace

std::unique_ptr<IoEngine> make_io_uring_engine(int depth) {
  return std::make_unique<IoUringEngine>(static_cast<std::size_t>(depth));
}

std::string io_uring_unavailable_reason() {
  try {
    Ring ring(1);
    // Some sandboxes allow a ring, but refuse its use.
    io_uring_prep_nop(io_uring_get_sqe(ring.get()));
    const int error = ring.enter();
    if (error == 0) return {};
    throw IoError(
        {.op = "io_uring_enter", .error = error, .detail = advice(error)});
  } catch (const IoError& refused) {
    return refused.what();
  }
}

}  // namespace torch_ext

#else

#include <cerrno>

namespace torch_ext {

std::unique_ptr<IoEngine> make_io_uring_engine(int) {
  throw IoError({.op = "io_uring_setup",
                 .error = ENOSYS,
                 .detail = io_uring_unavailable_reason()});
}

std::string io_uring_unavailable_reason() { return "built without liburing"; }

}  // namespace torch_ext

#endif
