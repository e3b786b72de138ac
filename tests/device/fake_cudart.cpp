// A stand-in for the CUDA run-time: the functions of it that torch_ext uses,
// and functions that let a test script and inspect them. Built as a shared
// library, opened by path.

#include <cstddef>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr int kErrorInvalidValue = 1;
constexpr int kErrorHostMemoryAlreadyRegistered = 712;
constexpr int kErrorHostMemoryNotRegistered = 713;

struct State {
  std::mutex mutex;
  std::map<void*, std::size_t> registered;
  std::set<void*> capturing;
  int next_error = 0;
  unsigned flags = 0;
};

State& state() {
  static State only;
  return only;
}

// Puts a variable into the static TLS block. A library that is opened at run
// time would get a block of its own. LeakSanitizer guesses that block's size
// from what lies before it. Now and then it ends the process on a wrong guess.
#define STATIC_TLS [[gnu::tls_model("initial-exec")]] thread_local

STATIC_TLS int capture_mode = 0;  // Global, as in the real one.
STATIC_TLS int last_error = 0;

int finish(int error) {
  if (error != 0) last_error = error;
  return error;
}

// With the mutex held. The error that a test has set for the next call.
int take_error() {
  const int error = state().next_error;
  state().next_error = 0;
  return error;
}

}  // namespace

extern "C" {

int cudaHostRegister(void* memory, std::size_t bytes, unsigned flags) {
  std::lock_guard lock(state().mutex);
  if (const int error = take_error()) return finish(error);
  state().flags = flags;
  if (memory == nullptr || bytes == 0) return finish(kErrorInvalidValue);
  const bool is_new = state().registered.emplace(memory, bytes).second;
  return finish(is_new ? 0 : kErrorHostMemoryAlreadyRegistered);
}

int cudaHostUnregister(void* memory) {
  std::lock_guard lock(state().mutex);
  if (const int error = take_error()) return finish(error);
  const bool was_there = state().registered.erase(memory) > 0;
  return finish(was_there ? 0 : kErrorHostMemoryNotRegistered);
}

int cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::lock_guard lock(state().mutex);
  if (const int error = take_error()) return finish(error);
  const int old = capture_mode;
  capture_mode = *mode;
  *mode = old;
  return 0;
}

int cudaStreamIsCapturing(void* stream, int* status) {
  std::lock_guard lock(state().mutex);
  if (const int error = take_error()) return finish(error);
  *status = state().capturing.count(stream) > 0 ? 1 : 0;
  return 0;
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}

const char* cudaGetErrorString(int error) {
  switch (error) {
    case kErrorInvalidValue:
      return "invalid argument";
    case 2:
      return "out of memory";
    case kErrorHostMemoryAlreadyRegistered:
      return "part or all of the requested memory range is already mapped";
    case kErrorHostMemoryNotRegistered:
      return "pointer does not correspond to a registered memory region";
    default:
      return "unrecognized error code";
  }
}

int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return 0;
}

/// The next call of the calling process that can fail does, with `error`.
void fake_fail_next(int error) {
  std::lock_guard lock(state().mutex);
  state().next_error = error;
}

void fake_set_capturing(void* stream, bool capturing) {
  std::lock_guard lock(state().mutex);
  if (capturing) {
    state().capturing.insert(stream);
  } else {
    state().capturing.erase(stream);
  }
}

/// Bytes now registered.
std::size_t fake_registered_bytes() {
  std::lock_guard lock(state().mutex);
  std::size_t bytes = 0;
  for (const auto& entry : state().registered) bytes += entry.second;
  return bytes;
}

/// Flags of the last registration.
unsigned fake_register_flags() {
  std::lock_guard lock(state().mutex);
  return state().flags;
}

/// The calling thread's mode.
int fake_capture_mode() { return capture_mode; }

/// The calling thread's last error. It is not cleared.
int fake_last_error() { return last_error; }

}  // extern "C"
