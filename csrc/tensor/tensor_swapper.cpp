#include "torch_ext/tensor/tensor_swapper.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "plain_modes.h"
#include "tensor_bytes.h"
#include "tensor_check.h"

namespace torch_ext {

TensorTicket::TensorTicket(SwapTicket ticket, at::Tensor result)
    : ticket_(std::move(ticket)), result_(std::move(result)) {}

void TensorTicket::wait_source(Timeout timeout) const {
  ticket_.wait_source(timeout);
}

void TensorTicket::wait(Timeout timeout) const {
  ticket_.wait(timeout);
  if (!result_.defined() || result_.is_cpu()) return;
  // The current stream may not be the one on which the memory was allocated.
  // The memory may not be given away before that stream is done with it.
  const c10::impl::VirtualGuardImpl guard(result_.device().type());
  result_.record_stream(guard.getStream(result_.device()));
}

bool TensorTicket::wait_for(std::chrono::nanoseconds timeout) const {
  return ticket_.wait_for(timeout);
}

bool TensorTicket::wait_source_for(std::chrono::nanoseconds timeout) const {
  return ticket_.wait_source_for(timeout);
}

TimeoutError TensorTicket::timed_out(std::chrono::nanoseconds timeout) const {
  return ticket_.timed_out(timeout);
}

bool TensorTicket::done() const { return ticket_.done(); }

at::Tensor TensorTicket::result(Timeout timeout) const {
  wait(timeout);
  return result_;
}

namespace {

struct Meta {
  std::vector<std::int64_t> sizes;
  c10::ScalarType dtype;
  c10::Device device;
};

void check_destination(const std::string& key, const at::Tensor& out,
                       const Meta& meta,
                       const std::optional<c10::Device>& device) {
  check_has_plain_memory(out, "swap_in");
  const auto fail = [&](const auto& what, const auto& stored,
                        const auto& given) {
    std::ostringstream text;
    text << "swap_in of '" << key << "': " << what << " " << stored
         << ", out has " << given;
    throw std::invalid_argument(text.str());
  };
  if (out.sizes() != at::IntArrayRef(meta.sizes)) {
    fail("the stored shape is", at::IntArrayRef(meta.sizes), out.sizes());
  }
  if (out.scalar_type() != meta.dtype) {
    fail("the stored dtype is", meta.dtype, out.scalar_type());
  }
  if (device && *device != out.device()) {
    fail("the device asked for is", *device, out.device());
  }
  check_is_destination(out, "swap_in of '" + key + "'");
}

}  // namespace

class TensorSwapper::Impl {
 public:
  explicit Impl(const SwapperOptions& options) : swapper(options) {}

  TensorBytes bytes;
  Swapper swapper;  // Last: its threads use what stands above.
};

TensorSwapper::TensorSwapper(const SwapperOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}

TensorSwapper::~TensorSwapper() = default;

TensorTicket TensorSwapper::swap_out(const std::string& key,
                                     const at::Tensor& tensor) {
  DeviceBytes bytes = impl_->bytes.source(tensor, "swap_out");
  auto meta = std::make_shared<const Meta>(
      Meta{tensor.sizes().vec(), tensor.scalar_type(), tensor.device()});
  return TensorTicket(
      impl_->swapper.swap_out(key, std::move(bytes), std::move(meta)));
}

TensorTicket TensorSwapper::swap_in(const std::string& key,
                                    const std::optional<at::Tensor>& out,
                                    std::optional<c10::Device> device,
                                    IoPriority priority) {
  const Swapper::Entry entry = impl_->swapper.entry(key);
  const Meta& meta = *static_cast<const Meta*>(entry.tag().get());
  const PlainModes plain;
  at::Tensor result;
  if (out) {
    check_destination(key, *out, meta, device);
    result = *out;
    if (!out->is_inference()) out->unsafeGetTensorImpl()->bump_version();
  } else {
    result = at::empty(meta.sizes, at::TensorOptions()
                                       .dtype(meta.dtype)
                                       .device(device.value_or(meta.device)));
    check_has_plain_memory(result, "swap_in");
  }
  return TensorTicket(
      impl_->swapper.swap_in(entry, impl_->bytes.destination(result, "swap_in"),
                             priority),
      result);
}

void TensorSwapper::remove(const std::string& key) {
  impl_->swapper.remove(key);
}

std::vector<std::string> TensorSwapper::keys() { return impl_->swapper.keys(); }

SwapperStats TensorSwapper::stats() const { return impl_->swapper.stats(); }

std::vector<std::string> TensorSwapper::notes() const {
  return impl_->swapper.notes();
}

const std::string& TensorSwapper::engine() const noexcept {
  return impl_->swapper.engine();
}

void TensorSwapper::close() { impl_->swapper.close(); }

}  // namespace torch_ext
