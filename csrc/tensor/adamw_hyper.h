#pragma once

#include <cmath>
#include <cstdint>

#include "torch_ext/optim/adamw_update.h"

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

/// The coefficients of a step with these numbers.
inline AdamWCoefficients coefficients(const AdamWHyper& hyper,
                                      std::uint64_t step) {
  const auto t = static_cast<double>(step);
  return {.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay),
          .exp_avg = static_cast<float>(1 - hyper.beta1),
          .beta2 = static_cast<float>(hyper.beta2),
          .exp_avg_sq = static_cast<float>(1 - hyper.beta2),
          .inverse_root =
              static_cast<float>(1 / std::sqrt(1 - std::pow(hyper.beta2, t))),
          .eps = static_cast<float>(hyper.eps),
          .step_size =
              static_cast<float>(hyper.lr / (1 - std::pow(hyper.beta1, t))),
          .maximize = hyper.maximize};
}

}  // namespace torch_ext
