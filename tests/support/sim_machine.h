#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace torch_ext::test {

/// The simulated device of sim/sim_device.cpp, from C++; its functions are
/// explained there. Loading it makes c10::Device("sim") known to torch.
class SimMachine {
 public:
  explicit SimMachine(const std::string& path = TORCH_EXT_SIM_PATH)
      : library_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
  }

  void hold(int device, std::int64_t stream) {
    call<void>("sim_hold", device, stream);
  }
  void release(int device, std::int64_t stream) {
    call<void>("sim_release", device, stream);
  }
  void hold_copies(bool hold) { call<void>("sim_hold_copies", hold); }
  bool await_copies(std::int64_t count, double seconds = 20) {
    return call<bool>("sim_await_copies", count, seconds);
  }
  void settle() { call<void>("sim_settle"); }
  void fail_copy(std::int64_t more) { call<void>("sim_fail_copy", more); }
  void reset() { call<void>("sim_reset"); }
  std::int64_t count(const char* name) {
    return call<std::int64_t>("sim_count", name);
  }

 private:
  template <class Result, class... Arguments>
  Result call(const char* name, Arguments... arguments) {
    void* function = dlsym(library_, name);
    if (function == nullptr) throw std::runtime_error(dlerror());
    return reinterpret_cast<Result (*)(Arguments...)>(function)(arguments...);
  }

  void* const library_;  // Never closed: torch keeps pointers into it.
};

}  // namespace torch_ext::test
