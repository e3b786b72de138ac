#pragma once

#include <cstddef>

namespace torch_ext::test {

/// While it lives, an allocation of this thread with operator new throws
/// std::bad_alloc: the one after `good` others.
class FailingNew {
 public:
  explicit FailingNew(std::size_t good);
  ~FailingNew();
  FailingNew(const FailingNew&) = delete;
  FailingNew& operator=(const FailingNew&) = delete;
};

}  // namespace torch_ext::test
