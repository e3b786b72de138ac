#include "torch_ext/device/cuda_runtime.h"

#include <dlfcn.h>

#include <cerrno>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_ext/base/error.h"

// Only types come from here: nothing of the run-time is linked. PyTorch's
// wheels bring the first header without the second, which the first includes.
#if __has_include(<cuda_runtime_api.h>) && __has_include(<crt/host_defines.h>)
#include <cuda_runtime_api.h>
#define TORCH_EXT_HAS_CUDA_HEADER
#endif

namespace torch_ext {
namespace {

// These numbers are from driver_types.h. They are part of the run-time's ABI.
constexpr int kSuccess = 0;                       // cudaSuccess
constexpr int kErrorMemoryAllocation = 2;         // cudaErrorMemoryAllocation
constexpr int kErrorStreamCaptureImplicit = 906;  // cuda... of that name
constexpr unsigned kHostRegisterPortable = 1;     // cudaHostRegisterPortable
constexpr int kCaptureModeThreadLocal = 1;  // cudaStreamCaptureModeThreadLocal
constexpr int kCaptureStatusNone = 0;       // cudaStreamCaptureStatusNone

// The functions of the run-time, with enumerations as int and cudaStream_t as
// void*.
using HostRegister = int(void*, std::size_t, unsigned);
using HostUnregister = int(void*);
using ThreadExchangeStreamCaptureMode = int(int*);
using StreamIsCapturing = int(void*, int*);
using GetLastError = int();
using GetErrorString = const char*(int);
using RuntimeGetVersion = int(int*);

#ifdef TORCH_EXT_HAS_CUDA_HEADER
static_assert(kSuccess == cudaSuccess);
static_assert(kErrorMemoryAllocation == cudaErrorMemoryAllocation);
static_assert(kErrorStreamCaptureImplicit == cudaErrorStreamCaptureImplicit);
static_assert(kHostRegisterPortable == cudaHostRegisterPortable);
static_assert(kCaptureModeThreadLocal == cudaStreamCaptureModeThreadLocal);
static_assert(kCaptureStatusNone == cudaStreamCaptureStatusNone);

// Translates a parameter's or result's type from the header's to ours.
template <class T>
struct Plain {
  using type = T;
};
template <class T>
requires std::is_enum_v<T>
struct Plain<T> {
  static_assert(sizeof(T) == sizeof(int));
  using type = int;
};
template <class T>
requires std::is_enum_v<T>
struct Plain<T*> {
  static_assert(sizeof(T) == sizeof(int));
  using type = int*;
};
template <>
struct Plain<cudaStream_t> {
  using type = void*;
};

template <class Ours, class Result, class... Arguments>
constexpr bool same(Result (*)(Arguments...)) {
  return std::is_same_v<Ours, typename Plain<Result>::type(
                                  typename Plain<Arguments>::type...)>;
}
static_assert(same<HostRegister>(cudaHostRegister));
static_assert(same<HostUnregister>(cudaHostUnregister));
static_assert(
    same<ThreadExchangeStreamCaptureMode>(cudaThreadExchangeStreamCaptureMode));
static_assert(same<StreamIsCapturing>(cudaStreamIsCapturing));
static_assert(same<GetLastError>(cudaGetLastError));
static_assert(same<GetErrorString>(cudaGetErrorString));
static_assert(same<RuntimeGetVersion>(cudaRuntimeGetVersion));
#endif

struct CloseLibrary {
  void operator()(void* library) const { dlclose(library); }
};
using Library = std::unique_ptr<void, CloseLibrary>;

std::string last_dl_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "unknown error";
}

Library open_library(const std::string& name, std::string& why_not) {
  if (!name.empty()) {
    Library library(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL));
    if (library == nullptr) why_not = last_dl_error();
    return library;
  }
  // A copy that is loaded already is PyTorch's own. Another copy would not know
  // PyTorch's streams.
  for (const int flags : {RTLD_NOLOAD, 0}) {
    for (const char* known : {"libcudart.so.13", "libcudart.so.12"}) {
      Library library(dlopen(known, RTLD_NOW | RTLD_LOCAL | flags));
      if (library != nullptr) return library;
    }
  }
  why_not = "neither libcudart.so.13 nor libcudart.so.12 can be loaded";
  return nullptr;
}

}  // namespace

struct CudaRuntime::Table {
  Library library;
  HostRegister* host_register = nullptr;
  HostUnregister* host_unregister = nullptr;
  ThreadExchangeStreamCaptureMode* exchange_capture_mode = nullptr;
  StreamIsCapturing* is_capturing = nullptr;
  GetLastError* get_last_error = nullptr;
  GetErrorString* get_error_string = nullptr;
  RuntimeGetVersion* get_version = nullptr;
  int version = 0;

  /// Finds all functions. Returns the name of the first that the library lacks,
  /// or null.
  const char* fill() {
    const char* missing = nullptr;
    const auto find = [&](const char* name, auto*& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
          dlsym(library.get(), name));
      if (function == nullptr && missing == nullptr) missing = name;
    };
    find("cudaHostRegister", host_register);
    find("cudaHostUnregister", host_unregister);
    find("cudaThreadExchangeStreamCaptureMode", exchange_capture_mode);
    find("cudaStreamIsCapturing", is_capturing);
    find("cudaGetLastError", get_last_error);
    find("cudaGetErrorString", get_error_string);
    find("cudaRuntimeGetVersion", get_version);
    return missing;
  }
};

std::shared_ptr<CudaRuntime> CudaRuntime::open(const std::string& library,
                                               std::string* why_not) {
  std::string reason;
  auto table = std::make_unique<Table>();
  table->library = open_library(library, reason);
  if (table->library != nullptr) {
    const char* missing = table->fill();
    if (missing == nullptr) {
      table->get_version(&table->version);
      return std::shared_ptr<CudaRuntime>(new CudaRuntime(std::move(table)));
    }
    reason = (library.empty() ? "the CUDA run-time" : library) +
             std::string(" has no ") + missing;
  }
  if (why_not != nullptr) *why_not = std::move(reason);
  return nullptr;
}

CudaRuntime::CudaRuntime(std::unique_ptr<Table> table)
    : table_(std::move(table)) {}

CudaRuntime::~CudaRuntime() = default;

void CudaRuntime::host_register(void* memory, std::size_t bytes) {
  check(table_->host_register(memory, bytes, kHostRegisterPortable),
        "cudaHostRegister", bytes);
}

void CudaRuntime::host_unregister(void* memory) noexcept {
  // Nobody can act on a failure. At exit the run-time may be gone already.
  if (table_->host_unregister(memory) != kSuccess) table_->get_last_error();
}

void CudaRuntime::use_thread_local_capture_mode() {
  int mode = kCaptureModeThreadLocal;
  check(table_->exchange_capture_mode(&mode),
        "cudaThreadExchangeStreamCaptureMode");
}

bool CudaRuntime::is_capturing(void* stream) {
  int status = kCaptureStatusNone;
  const int code = table_->is_capturing(stream, &status);
  if (code == kErrorStreamCaptureImplicit) {
    // This is the legacy stream, and a stream that it waits for is being
    // captured.
    table_->get_last_error();
    return true;
  }
  check(code, "cudaStreamIsCapturing");
  return status != kCaptureStatusNone;
}

int CudaRuntime::version() const noexcept { return table_->version; }

void CudaRuntime::check(int code, const char* function,
                        std::optional<std::size_t> bytes) {
  if (code == kSuccess) return;
  table_->get_last_error();
  throw IoError({.op = function,
                 .length = bytes,
                 .error = code == kErrorMemoryAllocation ? ENOMEM : EIO,
                 .detail = std::string(table_->get_error_string(code)) +
                           " (CUDA error " + std::to_string(code) + ")"});
}

}  // namespace torch_ext
