#pragma once

#include <cstddef>
#include <functional>

// aio_call_counter.cpp defines io_setup, io_submit and io_getevents in the test
// program, before libaio's. It also defines pread and pwrite before the C
// library's. They count the calls, refuse or hold back what tests want, and
// make the rest.

namespace torch_ext::test {

/// Kernel calls since the process began.
struct AioCalls {
  std::size_t submits = 0;    ///< io_submit, but for those of wake().
  std::size_t requests = 0;   ///< Taken by those.
  std::size_t wakes = 0;      ///< io_submit of wake().
  std::size_t getevents = 0;  ///< io_getevents.

  friend AioCalls operator-(const AioCalls& a, const AioCalls& b) {
    return {a.submits - b.submits, a.requests - b.requests, a.wakes - b.wakes,
            a.getevents - b.getevents};
  }
};

AioCalls aio_calls();

/// False where the core makes its kernel calls without libaio, or has none.
bool aio_calls_available();

/// Decides about calls while it lives; one at a time. Each function may be
/// null, may be called on any thread, and returns -errno to refuse the call.
struct AioRules {
  std::function<int()> setup = nullptr;  ///< 0: go on.
  std::function<long(long)> submit =
      nullptr;  ///< Gets a count; how many to pass on.
  std::function<int()> getevents = nullptr;  ///< 0: go on.
};

class AioRulesInForce {
 public:
  explicit AioRulesInForce(AioRules rules);
  AioRulesInForce(const AioRulesInForce&) = delete;
  AioRulesInForce& operator=(const AioRulesInForce&) = delete;
  ~AioRulesInForce();
};

/// Holds back all reads and writes of one descriptor, as a very slow device
/// would, until it is released or destroyed. Those through libaio and liburing
/// are in flight meanwhile; pread and pwrite block. Only one may live at a
/// time.
class HeldDescriptor {
 public:
  explicit HeldDescriptor(int fd);
  HeldDescriptor(const HeldDescriptor&) = delete;
  HeldDescriptor& operator=(const HeldDescriptor&) = delete;
  ~HeldDescriptor() { release(); }

  void release();
};

}  // namespace torch_ext::test
