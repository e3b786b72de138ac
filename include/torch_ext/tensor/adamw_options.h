#pragma once

#include <stdexcept>
#include <string>

namespace torch_ext {

/// What the parameters of a group have in common in a step.
struct AdamWHyper {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool maximize = false;

  bool operator==(const AdamWHyper&) const = default;
};

/// Where parameters on a device are updated. The two round differently.
enum class UpdateOn {
  kCpu,     ///< They and their gradients are copied to the host and back.
  kDevice,  ///< Their state is copied to the device and back.
};

/// From "cpu" or "cuda", which means the parameter's own device.
/// Errors: std::invalid_argument.
inline UpdateOn parse_update_on(const std::string& name) {
  if (name == "cpu") return UpdateOn::kCpu;
  if (name == "cuda") return UpdateOn::kDevice;
  throw std::invalid_argument("update_on must be \"cpu\" or \"cuda\", got \"" +
                              name + "\"");
}

}  // namespace torch_ext
