#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <list>
#include <utility>

#include "swap_operation.h"

namespace torch_ext {

/// Operations in the order of the calls, of which each calling thread has one
/// in turn. For one thread.
class CallerTurns {
 public:
  bool empty() const { return callers_.empty(); }
  const OperationPtr& front() const {
    return callers_.front().operations.front();
  }

  void push(OperationPtr operation) {
    const std::uint64_t caller = operation->caller;
    auto known = std::find_if(
        callers_.begin(), callers_.end(),
        [caller](const Caller& each) { return each.number == caller; });
    if (known == callers_.end()) {
      known = callers_.insert(callers_.end(), {caller, {}});
    }
    known->operations.push_back(std::move(operation));
  }

  /// Takes the first away; the next caller is first then.
  void pop() {
    callers_.front().operations.pop_front();
    if (callers_.front().operations.empty()) {
      callers_.pop_front();
    } else {
      callers_.splice(callers_.end(), callers_, callers_.begin());
    }
  }

 private:
  struct Caller {
    std::uint64_t number;
    std::deque<OperationPtr> operations;
  };
  std::list<Caller> callers_;
};

}  // namespace torch_ext
