#include "support/aio_call_counter.h"

#include <dlfcn.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <ctime>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "support/uring_call_counter.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {
namespace {

std::atomic<std::size_t> submits;
std::atomic<std::size_t> requests;
std::atomic<std::size_t> wakes;
std::atomic<std::size_t> getevents;

std::mutex rules_mutex;
std::shared_ptr<const AioRules> rules;

std::shared_ptr<const AioRules> current_rules() {
  std::lock_guard lock(rules_mutex);
  return rules;
}

int checked(long result) {
  return result < 0 ? -errno : static_cast<int>(result);
}

/// wake() reads nothing.
bool is_wake(long count, iocb** blocks) {
  return count > 0 && blocks[0]->aio_lio_opcode == IOCB_CMD_PREAD &&
         blocks[0]->aio_nbytes == 0;
}

/// What HeldDescriptor holds. Never destroyed: threads may outlive main.
struct Hold {
  std::mutex mutex;
  std::condition_variable released;
  int fd = -1;
  std::vector<std::pair<aio_context_t, iocb>> requests;

  /// How many requests from the first on are held, or else may go on.
  long prefix(long count, iocb** blocks, bool held) const {
    long length = 0;
    while (length < count &&
           (static_cast<int>(blocks[length]->aio_fildes) == fd) == held) {
      ++length;
    }
    return length;
  }

  void wait(int wanted) {
    std::unique_lock lock(mutex);
    released.wait(lock, [&] { return fd < 0 || fd != wanted; });
  }
};

Hold& hold() {
  static auto* const hold = new Hold;
  return *hold;
}

/// Takes the held requests that a batch begins with, or makes the call for
/// those before the first held one.
int submit_or_hold(aio_context_t context, long count, iocb** blocks) {
  std::unique_lock lock(hold().mutex);
  if (hold().fd >= 0 && count > 0) {
    const long held = hold().prefix(count, blocks, true);
    for (long i = 0; i < held; ++i) {
      hold().requests.emplace_back(context, *blocks[i]);
    }
    if (held > 0) return static_cast<int>(held);
    count = hold().prefix(count, blocks, false);
  }
  lock.unlock();
  return checked(syscall(SYS_io_submit, context, count, blocks));
}

/// The next definition: the C library's, or a sanitizer's before it.
template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

AioCalls aio_calls() { return {submits, requests, wakes, getevents}; }

bool aio_calls_available() {
  const std::size_t before = submits;
  // Asks the kernel's AIO, if the core can, whether it is there.
  engine_unavailable_reason("libaio");
  return submits > before;
}

AioRulesInForce::AioRulesInForce(AioRules new_rules) {
  std::lock_guard lock(rules_mutex);
  rules = std::make_shared<const AioRules>(std::move(new_rules));
}

AioRulesInForce::~AioRulesInForce() {
  std::lock_guard lock(rules_mutex);
  rules = nullptr;
}

HeldDescriptor::HeldDescriptor(int fd) {
  std::lock_guard lock(hold().mutex);
  hold().fd = fd;
  hold_uring_requests(fd);
}

void HeldDescriptor::release() {
  release_uring_requests();
  std::lock_guard lock(hold().mutex);
  hold().fd = -1;
  for (auto& [context, block] : hold().requests) {
    iocb* pointer = &block;
    syscall(SYS_io_submit, context, 1, &pointer);
  }
  hold().requests.clear();
  hold().released.notify_all();
}

}  // namespace torch_ext::test

// As libaio and the C library declare them, but for their names of types.
extern "C" {

int io_setup(int count, aio_context_t* context) {
  using namespace torch_ext::test;
  const auto in_force = current_rules();
  if (in_force != nullptr && in_force->setup) {
    if (const int error = in_force->setup(); error < 0) return error;
  }
  return checked(syscall(SYS_io_setup, count, context));
}

int io_submit(aio_context_t context, long count, iocb** blocks) {
  using namespace torch_ext::test;
  if (is_wake(count, blocks)) {
    ++wakes;
    return checked(syscall(SYS_io_submit, context, count, blocks));
  }
  ++submits;
  const auto in_force = current_rules();
  if (in_force != nullptr && in_force->submit) {
    count = in_force->submit(count);
    if (count < 0) return static_cast<int>(count);
  }
  const int taken = submit_or_hold(context, count, blocks);
  if (taken > 0) requests += static_cast<std::size_t>(taken);
  return taken;
}

int io_getevents(aio_context_t context, long at_least, long most,
                 io_event* events, timespec* timeout) {
  using namespace torch_ext::test;
  ++torch_ext::test::getevents;
  const auto in_force = current_rules();
  if (in_force != nullptr && in_force->getevents) {
    if (const int error = in_force->getevents(); error < 0) return error;
  }
  return checked(
      syscall(SYS_io_getevents, context, at_least, most, events, timeout));
}

ssize_t pread(int fd, void* data, std::size_t length, off_t offset) {
  using namespace torch_ext::test;
  static auto* const real = next<decltype(pread)>("pread");
  hold().wait(fd);
  return real(fd, data, length, offset);
}

ssize_t pwrite(int fd, const void* data, std::size_t length, off_t offset) {
  using namespace torch_ext::test;
  static auto* const real = next<decltype(pwrite)>("pwrite");
  hold().wait(fd);
  return real(fd, data, length, offset);
}

}  // extern "C"
