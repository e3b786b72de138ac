#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace torch_ext::test {

/// The inside of the stand-in for the CUDA run-time (device/fake_cudart.cpp),
/// one per process.
class FakeCuda {
 public:
  explicit FakeCuda(std::string path = TORCH_EXT_FAKE_CUDART_PATH)
      : path_(std::move(path)),
        library_(dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL), dlclose) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
  }

  const std::string& path() const noexcept { return path_; }

  /// The next call that can fail does, with this cudaError_t.
  void fail_next(int error) { call<void>("fake_fail_next", error); }
  void set_capturing(void* stream, bool capturing) {
    call<void>("fake_set_capturing", stream, capturing);
  }
  /// Bytes now registered.
  std::size_t registered_bytes() {
    return call<std::size_t>("fake_registered_bytes");
  }
  /// Flags of the last registration.
  unsigned register_flags() { return call<unsigned>("fake_register_flags"); }
  /// The calling thread's mode.
  int capture_mode() { return call<int>("fake_capture_mode"); }
  /// The calling thread's last error. It is not cleared.
  int last_error() { return call<int>("fake_last_error"); }

 private:
  template <class Result, class... Arguments>
  Result call(const char* name, Arguments... arguments) {
    void* function = dlsym(library_.get(), name);
    if (function == nullptr) throw std::runtime_error(dlerror());
    return reinterpret_cast<Result (*)(Arguments...)>(function)(arguments...);
  }

  std::string path_;
  std::unique_ptr<void, int (*)(void*)> library_;
};

}  // namespace torch_ext::test
