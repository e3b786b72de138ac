#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "aio_syscalls.h"
#include "deadline.h"
#include "engines.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using std::chrono::nanoseconds;

/// Slots that are kept for wake(). It ends a wait for up to so many events.
constexpr std::size_t kWakeSlots = 16;

std::optional<long> kernel_setting(const std::string& name) {
  std::ifstream file("/proc/sys/fs/" + name);
  long value = 0;
  return file >> value ? std::optional(value) : std::nullopt;
}

std::string limit_text(std::size_t needed) {
  const auto text = [](std::optional<long> value) {
    return value ? std::to_string(*value) : std::string("unknown");
  };
  return "fs.aio-max-nr is " + text(kernel_setting("aio-max-nr")) +
         ", fs.aio-nr (in use) is " + text(kernel_setting("aio-nr")) +
         ", and " + std::to_string(needed) +
         " more are needed: raise the limit with sysctl, or lower queue_depth "
         "or thread_count";
}

class AioContext {
 public:
  explicit AioContext(std::size_t slots) {
    const int rc = aio::setup(static_cast<unsigned>(slots), &context_);
    if (rc == 0) return;
    throw IoError({.op = "io_setup",
                   .error = -rc,
                   .detail = rc == -EAGAIN ? limit_text(slots) : ""});
  }
  AioContext(const AioContext&) = delete;
  AioContext& operator=(const AioContext&) = delete;
  ~AioContext() { aio::destroy(context_); }

  aio::Context get() const noexcept { return context_; }

 private:
  aio::Context context_ = {};
};

/// An empty file in memory. Reading nothing from it completes at once.
class EmptyFile {
 public:
  EmptyFile() : fd_(memfd_create("torch_ext wake", MFD_CLOEXEC)) {
    if (fd_ < 0) throw IoError({.op = "memfd_create", .error = errno});
  }
  EmptyFile(const EmptyFile&) = delete;
  EmptyFile& operator=(const EmptyFile&) = delete;
  ~EmptyFile() { close(fd_); }

  int fd() const noexcept { return fd_; }

 private:
  const int fd_;
};

class LibaioEngine final : public IoEngine {
 public:
  explicit LibaioEngine(std::size_t depth)
      : depth_(depth),
        context_(depth + kWakeSlots),
        wake_block_(aio::prepare({.fd = empty_.fd()}, 0)),
        blocks_(depth),
        pointers_(depth),
        events_(depth) {
    wake_pointers_.fill(&wake_block_);
    std::transform(blocks_.begin(), blocks_.end(), pointers_.begin(),
                   [](iocb& block) { return &block; });
    refused_.reserve(depth);
  }

  ~LibaioEngine() override {
    // This is not left to io_destroy, which did not wait in some kernels. A
    // forked child has no requests in flight, and the kernel refuses both calls
    // there.
    try {
      std::array<IoCompletion, 64> ignored;
      while (in_kernel_ > 0) reap(ignored, 1, std::chrono::hours(1));
    } catch (const IoError&) {
    }
  }

  std::string_view name() const noexcept override { return "libaio"; }
  std::size_t depth() const noexcept override { return depth_; }

  std::size_t submit(std::span<const IoRequest> batch) override {
    // The kernel's ring has more room than was asked for, so we count
    // ourselves.
    const std::size_t room = depth_ - in_kernel_ - refused_.size();
    batch = batch.first(std::min(batch.size(), room));
    for (std::size_t i = 0; i < batch.size(); ++i) {
      blocks_[i] = aio::prepare(
          batch[i], std::min(batch[i].length, IoRequest::kMaxTransfer));
    }
    std::size_t done = 0;
    int interruptions = 0;
    while (done < batch.size()) {
      const int rc = aio::submit(context_.get(), batch.size() - done,
                                 pointers_.data() + done);
      if (rc > 0) {
        in_kernel_ += static_cast<std::size_t>(rc);
        done += static_cast<std::size_t>(rc);
      } else if (rc == 0 || rc == -EAGAIN) {
        // With nothing in flight, only late wakes can fill the ring.
        if (in_kernel_ > 0 || !discard_wakes()) break;
      } else if (rc != -EINTR) {
        refuse(batch[done++], rc);
      } else if (++interruptions > kMaxInterruptions) {
        break;
      }
    }
    return done;
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t at_least,
                   nanoseconds timeout) override {
    std::size_t count = 0;
    try {
      collect(out, count, at_least, timeout);
    } catch (const IoError&) {
      wanted_ = 0;
      // What was reaped before is not lost. The next call meets the error.
      if (count == 0) throw;
    }
    return count;
  }

  void wake() noexcept override {
    woken_ = true;
    // The owner's wait ends with as many events as it waits for. EAGAIN means
    // that the ring is full of events, so the wait is ending anyway.
    const std::size_t count = wanted_.exchange(0);
    if (count > 0) aio::submit(context_.get(), count, wake_pointers_.data());
  }

 private:
  void collect(std::span<IoCompletion> out, std::size_t& count,
               std::size_t at_least, nanoseconds timeout) {
    count = take_first(refused_, out);
    out = out.first(std::min(out.size(), count + in_kernel_));
    at_least = std::min(at_least, out.size());
    if (at_least <= count) {
      if (count < out.size()) count += reap(out.subspan(count), 0, {});
      return;
    }
    const Deadline deadline(timeout);
    bool over = false;
    while (count < at_least && !over) {
      const nanoseconds left = deadline.left();
      over = left.count() == 0;
      over |= wait(out, count, at_least, left);
    }
  }

  /// Makes one blocking call of the kernel. True if wake() was called for it,
  /// or for the next one.
  bool wait(std::span<IoCompletion> out, std::size_t& count,
            std::size_t at_least, nanoseconds left) {
    const std::size_t wanted = std::min(at_least - count, kWakeSlots);
    wanted_ = wanted;
    // wake() sets woken_ before it looks at wanted_. So one of the two sees the
    // other.
    const bool early = woken_;
    count += reap(out.subspan(count), early ? 0 : wanted,
                  early ? nanoseconds(0) : left);
    wanted_ = 0;
    return woken_.exchange(false);
  }

  /// Takes completions from the kernel. After a signal or a wake it returns
  /// early, with fewer.
  std::size_t reap(std::span<IoCompletion> out, std::size_t at_least,
                   nanoseconds timeout) {
    timespec time = {
        .tv_sec = static_cast<std::time_t>(timeout.count() / 1'000'000'000),
        .tv_nsec = static_cast<long>(timeout.count() % 1'000'000'000)};
    const int rc = aio::get_events(context_.get(), at_least,
                                   std::min(out.size(), events_.size()),
                                   events_.data(), &time);
    if (rc == -EINTR) return 0;
    if (rc < 0) throw IoError({.op = "io_getevents", .error = -rc});
    std::size_t count = 0;
    for (const io_event& event :
         std::span(events_).first(static_cast<std::size_t>(rc))) {
      if (aio::is_of(event, wake_block_)) continue;
      out[count++] = {aio::cookie(event), aio::result(event)};
      --in_kernel_;
    }
    return count;
  }

  bool discard_wakes() {
    timespec no_time = {};
    return aio::get_events(context_.get(), 0, events_.size(), events_.data(),
                           &no_time) > 0;
  }

  /// Completes a request that io_submit would not take.
  void refuse(const IoRequest& request, std::int64_t result) {
    // Kernels before 4.18 and some file systems have no asynchronous sync.
    if (request.op == IoRequest::Op::kSync && result == -EINVAL) {
      result = fsync(request.fd) == 0 ? 0 : -errno;
    }
    refused_.push_back({request.cookie, result});
  }

  const std::size_t depth_;
  const EmptyFile empty_;
  const AioContext context_;
  iocb wake_block_;
  std::array<iocb*, kWakeSlots> wake_pointers_;
  std::vector<iocb> blocks_;  // The kernel copies them in io_submit.
  std::vector<iocb*> pointers_;
  std::vector<io_event> events_;
  std::vector<IoCompletion> refused_;
  std::size_t in_kernel_ = 0;

  std::atomic<bool> woken_ = false;
  /// How many events the owner blocks for; 0 while it does not block.
  std::atomic<std::size_t> wanted_ = 0;
};

}  // namespace

std::unique_ptr<IoEngine> make_libaio_engine(int depth) {
  return std::make_unique<LibaioEngine>(static_cast<std::size_t>(depth));
}

std::string libaio_unavailable_reason() {
  // A kernel with AIO refuses these calls as senseless. A real context would
  // take tens of milliseconds to destroy.
  aio::Context none = {};
  for (const int rc : {aio::setup(0, &none), aio::submit(none, 0, nullptr)}) {
    if (rc != -EINVAL) {
      return "the kernel refuses its system calls (" + errno_name(-rc) + ")";
    }
  }
  const std::optional<long> in_use = kernel_setting("aio-nr");
  const std::optional<long> most = kernel_setting("aio-max-nr");
  const std::size_t needed = 1 + kWakeSlots;
  if (in_use && most && *most - *in_use < static_cast<long>(needed)) {
    return limit_text(needed);
  }
  return {};
}

}  // namespace torch_ext
