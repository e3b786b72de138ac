// PyTorch device type "sim": a simulated accelerator for tests. Its streams are
// truly asynchronous, and its copies hold raw pointers. Its allocator reuses
// and overwrites freed memory at once. Faults can be injected. Operators that
// it lacks run on the CPU, after a wait for the current stream.
//
// Two things are stricter than CUDA. Copies to and from host memory that is not
// page-locked are asynchronous too. And page-locked memory is overwritten if it
// is dropped while a copy uses it.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "sim/sim_runtime.h"

namespace torch_ext::sim {
namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

Machine& machine() { return Machine::get(); }

LateStream& late(const c10::Stream& stream) {
  return machine().streams(stream.device_index()).at(stream.id());
}

int index_of(c10::Device device) {
  return device.has_index() ? device.index() : machine().current_device();
}

// As PyTorch's other devices report it.
[[noreturn]] void rethrow(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& failure) {
    TORCH_CHECK(false, failure.what());
  }
}

void synchronize(LateStream& stream) {
  try {
    stream.synchronize();
  } catch (...) {
    rethrow(std::current_exception());
  }
}

// What a c10::Event points to: recording again makes a new version and leaves
// those alone who wait for the old one.
struct EventBox {
  LateEventPtr version;
};

struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  SimGuard() = default;
  explicit SimGuard(c10::DeviceType) {}

  c10::DeviceType type() const override { return kSim; }
  c10::Device getDevice() const override {
    return {kSim, static_cast<c10::DeviceIndex>(machine().current_device())};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) < kDevices, "sim: no device ", device);
    machine().current_device() = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    machine().current_device() = index_of(device);
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device old = getDevice();
    setDevice(device);
    return old;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  static c10::Stream make(c10::Device device, std::int64_t id) {
    const auto index = static_cast<c10::DeviceIndex>(index_of(device));
    return c10::Stream(c10::Stream::UNSAFE, {kSim, index}, id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return make(device, machine().current_stream(index_of(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return make(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return make(device, machine().streams(index_of(device)).add());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device,
                                      bool urgent) const override {
    if (urgent) ++machine().counts().urgent_streams;
    return make(device, machine().streams(index_of(device)).next_of_pool());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream old = getStream(stream.device());
    machine().current_stream(stream.device_index()) = stream.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return &late(stream);
  }
  bool queryStream(const c10::Stream& stream) const override {
    LateStream& asked = late(stream);
    std::lock_guard lock(machine().clock().mutex);
    return asked.is_idle();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize(late(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    machine().streams(index).for_each(synchronize);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new EventBox;
    static_cast<EventBox*>(*event)->version = late(stream).record();
  }
  void block(void* event, const c10::Stream& stream) const override {
    late(stream).wait(static_cast<EventBox*>(event)->version);
  }
  bool queryEvent(void* event) const override {
    const auto& version = static_cast<EventBox*>(event)->version;
    std::lock_guard lock(machine().clock().mutex);
    if (version->error != nullptr) rethrow(version->error);
    return version->done;
  }
  void synchronizeEvent(void* event) const override {
    const auto version = static_cast<EventBox*>(event)->version;
    std::unique_lock lock(machine().clock().mutex);
    machine().clock().changed.wait(lock, [&] { return version->done; });
    if (version->error != nullptr) rethrow(version->error);
  }
  void destroyEvent(void* event,
                    const c10::DeviceIndex) const noexcept override {
    delete static_cast<EventBox*>(event);
  }
  double elapsedTime(void* from, void* to,
                     const c10::DeviceIndex) const override {
    std::lock_guard lock(machine().clock().mutex);
    const auto elapsed = static_cast<EventBox*>(to)->version->time -
                         static_cast<EventBox*>(from)->version->time;
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }

  void recordDataPtrOnStream(const c10::DataPtr& data,
                             const c10::Stream& stream) const override {
    machine().use_on(data.get(), stream.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard)

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device = SimGuard().getDevice();
    if (bytes == 0) return {nullptr, device};
    Block* block = machine().allocate(bytes);
    return {block->data, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    synchronize(machine().current(machine().current_device()));
    default_copy_data(to, from, bytes);
  }
  static void release(void* block) {
    machine().free(static_cast<Block*>(block));
  }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(kSim, &device_allocator)

// Page-locked host memory; never given back, so that what still uses it after
// it was freed shows as wrong bytes instead of a crash.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::kCPU};
    const std::size_t size = (bytes + 4095) / 4096 * 4096;
    std::lock_guard lock(mutex);
    auto& unused = free[size];
    void* data = nullptr;
    if (unused.empty()) {
      data = std::aligned_alloc(4096, size);
      if (data == nullptr) throw std::bad_alloc();
      sizes[data] = size;
    } else {
      data = unused.back();
      unused.pop_back();
    }
    return {data, data, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  bool owns(const void* data) {
    std::lock_guard lock(mutex);
    auto next = sizes.upper_bound(const_cast<void*>(data));
    if (next == sizes.begin()) return false;
    const auto& [begin, size] = *std::prev(next);
    return data < static_cast<std::byte*>(begin) + size;
  }
  static void release(void* data);

  std::mutex mutex;
  std::map<void*, std::size_t> sizes;
  std::map<std::size_t, std::vector<void*>> free;
};

PinnedAllocator& pinned_allocator() {
  static auto* const only = new PinnedAllocator;  // Outlives all tensors.
  return *only;
}

void PinnedAllocator::release(void* data) {
  PinnedAllocator& self = pinned_allocator();
  std::lock_guard lock(self.mutex);
  const std::size_t size = self.sizes.at(data);
  std::fill_n(static_cast<std::byte*>(data), size, kFreed);
  self.free[size].push_back(data);
}

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    SimGuard().setDevice({kSim, index});
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return SimGuard().getDevice().index();
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return SimGuard().exchangeDevice({kSim, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator();
  }
  bool isPinnedPtr(const void* data) const override {
    return pinned_allocator().owns(data);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage,
                              std::size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    c10::DataPtr data = device_allocator.allocate(bytes);
    const std::size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) device_allocator.copy_data(data.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
};

// The tensor's memory as a CPU tensor that owns nothing.
at::Tensor host_view(const at::Tensor& tensor) {
  const c10::Device cpu(c10::kCPU);
  at::Tensor view = at::for_blob(tensor.data_ptr(), tensor.sizes())
                        .strides(tensor.strides())
                        .options(tensor.options().device(cpu))
                        .target_device(cpu)
                        .make_tensor();
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

bool is_sim(const at::Tensor& tensor) { return tensor.device().type() == kSim; }

void join(LateStream& later, LateStream& earlier) {
  if (&later != &earlier) later.wait(earlier.record());
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to,
                     bool non_blocking) {
  if (to.numel() == 0) return to;
  const at::Tensor source = host_view(from).expand(to.sizes());
  const at::Tensor target = host_view(to);
  const auto copy = [source, target] {
    const at::NoGradGuard no_grad;
    target.copy_(source);
  };
  if (is_sim(from) && is_sim(to)) {
    LateStream& stream = machine().current(from.device().index());
    LateStream& other = machine().current(to.device().index());
    join(stream, other);
    stream.run(copy);
    join(other, stream);
    return to;
  }
  const at::Tensor& on_device = is_sim(from) ? from : to;
  LateStream& stream = machine().current(on_device.device().index());
  if (non_blocking) {
    machine().queue_async_copy(stream, on_device.data_ptr(), on_device.nbytes(),
                               copy);
  } else {
    ++machine().counts().sync_copies;
    stream.run(copy);
    synchronize(stream);
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, /*non_blocking=*/false);
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<c10::Device> device,
                 std::optional<bool>,
                 std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(device.value_or(SimGuard().getDevice()));
  return at::detail::empty_generic(
      sizes, &device_allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), memory_format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                         std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>,
                         std::optional<c10::Device> device,
                         std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(SimGuard().getDevice()));
  return at::detail::empty_strided_generic(
      sizes, strides, &device_allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> memory_format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  if (memory_format) impl->empty_tensor_restride(*memory_format);
  const std::size_t bytes = at::detail::computeStorageNbytes(
      self.sizes(), self.strides(), self.dtype().itemsize(),
      static_cast<std::size_t>(self.storage_offset()));
  if (bytes > self.storage().nbytes()) {
    SimHooks().resizePrivateUse1Bytes(self.storage(), bytes);
  }
  return self;
}

// A late kernel.
at::Tensor& fill(at::Tensor& self, const at::Scalar& value) {
  machine().current(self.device().index()).run([view = host_view(self), value] {
    const at::NoGradGuard no_grad;
    view.fill_(value);
  });
  return self;
}

at::Tensor& zero(at::Tensor& self) { return fill(self, 0); }

// A late kernel of an operator that takes lists of tensors, all on the device,
// and changes them.
void run_late(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::Device device = stack->at(0).toTensorVector().at(0).device();
  for (c10::IValue& argument : *stack) {
    if (!argument.isTensorList()) continue;
    std::vector<at::Tensor> tensors = argument.toTensorVector();
    for (at::Tensor& tensor : tensors) {
      TORCH_CHECK(tensor.device() == device, "sim: an argument is elsewhere");
      tensor = host_view(tensor);
    }
    argument = std::move(tensors);
  }
  machine().current(device.index()).run([op, args = std::move(*stack)] {
    const at::NoGradGuard no_grad;
    torch::jit::Stack own = args;
    op.callBoxed(&own);
  });
  stack->clear();
}

at::Scalar local_scalar(const at::Tensor& self) {
  const at::Tensor host =
      at::empty(self.sizes(), self.options().device(c10::kCPU));
  copy_from(self, host, /*non_blocking=*/false);
  return at::_local_scalar_dense(host);
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  SimGuard().recordDataPtrOnStream(self.storage().data_ptr(), stream);
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("fill_.Scalar", fill);
  m.impl("_fused_adamw_",
         torch::CppFunction::makeFromBoxedFunction<&run_late>());
  m.impl("zero_", zero);
  m.impl("record_stream", record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

const bool registered = [] {
  c10::register_privateuse1_backend("sim");
  at::RegisterPrivateUse1HooksInterface(new SimHooks);
  return true;
}();

}  // namespace
}  // namespace torch_ext::sim

// For ctypes and dlsym. A stream is a device index and c10::Stream::id().
extern "C" {

using torch_ext::sim::machine;

/// Nothing of the stream runs until sim_release.
void sim_hold(int device, std::int64_t stream) {
  machine().streams(device).at(stream).hold();
}
void sim_release(int device, std::int64_t stream) {
  machine().streams(device).at(stream).release();
}

/// No asynchronous copy starts on any stream while held.
void sim_hold_copies(bool hold) { machine().clock().hold_copies(hold); }

/// Returns when all streams have done all that they can.
void sim_settle() { machine().settle(); }

/// Blocks until `count` asynchronous copies have been queued since the last
/// reset; false if that takes more than `seconds`.
bool sim_await_copies(std::int64_t count, double seconds) {
  std::unique_lock lock(machine().clock().mutex);
  return machine().clock().changed.wait_for(
      lock, std::chrono::duration<double>(seconds),
      [count] { return machine().counts().async_copies >= count; });
}

/// A kernel that takes so long, on the device's current stream.
void sim_sleep(int device, double seconds) {
  machine().current(device).run([seconds] {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  });
}

/// See Machine::fail_copy.
void sim_fail_copy(std::int64_t more) { machine().fail_copy(more); }

/// See Machine::hold_copies_after.
void sim_hold_copies_after(std::int64_t n) { machine().hold_copies_after(n); }

/// See Machine::reset.
void sim_reset() { machine().reset(); }

/// A field of Counts; -1 if there is none of that name.
std::int64_t sim_count(const char* name) {
  return machine().counts().named(name);
}

}  // extern "C"
