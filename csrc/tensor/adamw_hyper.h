#pragma once

namespace torch_ext {

/// The numbers that the parameters of a group share in a step.
struct AdamWHyper {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool maximize = false;

  bool operator==(const AdamWHyper&) const = default;
};

}  // namespace torch_ext
