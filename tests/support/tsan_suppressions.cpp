// Read by the thread sanitizer's run-time; nothing elsewhere.
//
// libstdc++.so counts the references of an exception_ptr with atomic
// operations that the sanitizer cannot see, because that library is not
// instrumented: the thread that drops the last one seems to race with those
// that read the exception before.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n";
}
