#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

namespace torch_ext {

/// The few functions of the CUDA run-time that torch_ext needs. They are found
/// by dlopen, so that one binary serves machines with and without a GPU. A copy
/// of the run-time that the process (PyTorch) has loaded already is preferred.
/// Threads: any.
class CudaRuntime {
 public:
  /// Opens `library`. With an empty name it opens libcudart.so.13, else
  /// libcudart.so.12. Returns null if there is none, or if it lacks a function;
  /// `why_not` then says so.
  static std::shared_ptr<CudaRuntime> open(const std::string& library = {},
                                           std::string* why_not = nullptr);
  ~CudaRuntime();
  CudaRuntime(const CudaRuntime&) = delete;
  CudaRuntime& operator=(const CudaRuntime&) = delete;

  /// Calls cudaHostRegister, portable between devices.
  /// Errors: IoError with the run-time's own text. The run-time's sticky last
  /// error is cleared.
  void host_register(void* memory, std::size_t bytes);
  void host_unregister(void* memory) noexcept;

  /// Switches the calling thread to cudaStreamCaptureModeThreadLocal for good.
  /// So its event queries do not break the capture of a graph on another
  /// thread.
  void use_thread_local_capture_mode();

  /// True while `stream` (a cudaStream_t) is being captured into a graph.
  bool is_capturing(void* stream);

  /// The run-time's version, such as 13000.
  int version() const noexcept;

 private:
  struct Table;
  explicit CudaRuntime(std::unique_ptr<Table> table);
  void check(int code, const char* function,
             std::optional<std::size_t> bytes = std::nullopt);
  std::unique_ptr<Table> table_;
};

}  // namespace torch_ext
