// Replaces operator new, and with it operator delete, in the core's tests.

#include "support/failing_new.h"

#include <cstdlib>
#include <new>

namespace {

thread_local std::size_t allocations_left = 0;  // 0: nothing is to fail.

void* allocate(std::size_t bytes) {
  if (allocations_left > 0 && --allocations_left == 0) throw std::bad_alloc();
  void* const memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace torch_ext::test {

FailingNew::FailingNew(std::size_t good) { allocations_left = good + 1; }

FailingNew::~FailingNew() { allocations_left = 0; }

}  // namespace torch_ext::test
