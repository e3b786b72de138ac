// Read by the thread sanitizer's run-time; nothing elsewhere.
//
// libstdc++.so is not instrumented. It counts the references of an
// exception_ptr with atomic operations that the sanitizer cannot see. So the
// thread that drops the last one seems to race with those that read the
// exception before.
//
// liburing unmaps a ring by a system call that it does not see either: the next
// ring at the same address, another thread's, seems to race with the old one.
// Each ring has one thread. (The memory cannot be named here: the sanitizer
// knows suppressed memory by the variable it belongs to.)
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n"
         "race:csrc/io/io_uring_engine.cpp\n";
}
