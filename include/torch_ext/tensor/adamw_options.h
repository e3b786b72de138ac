#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace torch_ext {

/// Where parameters on a device are updated. The two round differently.
enum class UpdateOn {
  kCpu,     ///< They and their gradients are copied to the host and back.
  kDevice,  ///< Their state is copied to the device and back.
};

/// Reads "cpu" or "cuda". "cuda" means the parameter's own device. Errors:
/// std::invalid_argument.
inline UpdateOn parse_update_on(const std::string& name) {
  if (name == "cpu") return UpdateOn::kCpu;
  if (name == "cuda") return UpdateOn::kDevice;
  throw std::invalid_argument("update_on must be \"cpu\" or \"cuda\", got \"" +
                              name + "\"");
}

/// Where the tensors of a state_dict() are.
enum class StateDictMode {
  /// In memory of their own, as any tensor's.
  kTensors,
  /// In a mapped file, for state larger than memory. They cost memory as far as
  /// they are touched. If the drive fails while they are touched, that is
  /// SIGBUS.
  kMapped,
};

/// Reads "tensors" or "mapped". Errors: std::invalid_argument.
inline StateDictMode parse_state_dict_mode(const std::string& name) {
  if (name == "tensors") return StateDictMode::kTensors;
  if (name == "mapped") return StateDictMode::kMapped;
  throw std::invalid_argument(
      "state_dict_mode must be \"tensors\" or \"mapped\", got \"" + name +
      "\"");
}

/// A parameter's state as tensors.
struct AdamWState {
  std::uint64_t step = 0;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  /// The float32 master of a 16-bit parameter. If it is undefined, the
  /// parameter is its own master.
  at::Tensor master;
};

}  // namespace torch_ext
