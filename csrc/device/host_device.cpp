#include <cstring>

#include "torch_ext/device/device.h"

namespace torch_ext {
namespace {

class HostDevice final : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void enter_thread() override {}
  void pin(std::span<std::byte>) override {}
  void unpin(std::span<std::byte>) noexcept override {}

  EventPtr record(Stream) override {
    static const DeviceEvent done;
    return EventPtr(EventPtr(), &done);  // Nobody owns it: no count.
  }
  void wait(Stream, const EventPtr&) override {}
  bool query(const EventPtr&) override { return true; }

  void copy(std::byte* to, const std::byte* from, std::size_t bytes,
            bool) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

std::shared_ptr<Device> host_device() {
  static const auto device = std::make_shared<HostDevice>();
  return device;
}

}  // namespace torch_ext
