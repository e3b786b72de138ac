#pragma once

#include <cstddef>
#include <functional>

// uring_call_counter.cpp defines the functions of liburing that call the kernel
// in the test program, before liburing's: they count the calls, refuse or
// change what tests want, and make the rest. Requests on a descriptor that
// HeldDescriptor holds stay in flight.

namespace torch_ext::test {

/// Calls of liburing since the process began.
struct UringCalls {
  std::size_t submits = 0;   ///< io_uring_submit.
  std::size_t requests = 0;  ///< Reads, writes and syncs taken by those.
  std::size_t polls = 0;     ///< Likewise: what waits for wake().
  std::size_t waits = 0;     ///< io_uring_wait_cqes.

  friend UringCalls operator-(const UringCalls& a, const UringCalls& b) {
    return {a.submits - b.submits, a.requests - b.requests, a.polls - b.polls,
            a.waits - b.waits};
  }
};

UringCalls uring_calls();

/// False where the core has no liburing, or one that cannot be replaced.
bool uring_calls_available();

/// Decides about calls while it lives; one at a time. Each function may be
/// null, may be called on any thread, and returns -errno to refuse the call.
struct UringRules {
  std::function<int()> setup = nullptr;  ///< 0: go on.
  unsigned entries = 0;                  ///< If not 0, each ring has so many.
  bool old_kernel = false;               ///< That has no feature.
  std::function<int(int)> submit =
      nullptr;                          ///< Gets a count; how many to pass on.
  std::function<int()> wait = nullptr;  ///< 0: go on.
};

class UringRulesInForce {
 public:
  explicit UringRulesInForce(UringRules rules);
  UringRulesInForce(const UringRulesInForce&) = delete;
  UringRulesInForce& operator=(const UringRulesInForce&) = delete;
  ~UringRulesInForce();
};

/// For HeldDescriptor.
void hold_uring_requests(int fd);
void release_uring_requests();

}  // namespace torch_ext::test
