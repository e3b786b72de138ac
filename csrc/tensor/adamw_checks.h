#pragma once

#include <ATen/core/Tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "adamw_state.h"
#include "tensor_check.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/tensor/adamw_options.h"

// Checks what OffloadedAdamW takes. Errors: TypeError, std::invalid_argument
// and StateError, with what is wrong.
namespace torch_ext::adamw {

template <typename Error, typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "OffloadedAdamW: ";
  (text << ... << parts);
  throw Error(text.str());
}

/// Whether parameters and gradients may have this dtype.
inline bool is_supported(c10::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_parameter(const at::Tensor& tensor) {
  check_has_plain_memory(tensor, "OffloadedAdamW");
  const c10::ScalarType dtype = tensor.scalar_type();
  if (!is_supported(dtype)) {
    fail<TypeError>("a parameter of dtype ", dtype,
                    " is not supported, only float32, bfloat16 and float16");
  }
  if (tensor.is_neg() || !tensor.is_non_overlapping_and_dense()) {
    fail<std::invalid_argument>(
        "a parameter with sizes ", tensor.sizes(), " and strides ",
        tensor.strides(), " is not dense: its elements overlap or have gaps");
  }
}

inline void check_update_on(UpdateOn update_on, StateFormat format) {
  if (update_on == UpdateOn::kCpu || format == StateFormat::kExact) return;
  fail<std::invalid_argument>(
      "update_on \"cuda\" is for state_format \"exact\"; with \"",
      state_format_name(format), "\" the update is on the CPU");
}

inline void check_place(const at::Tensor& parameter, UpdateOn update_on) {
  if (update_on == UpdateOn::kCpu || !parameter.is_cpu()) return;
  fail<std::invalid_argument>(
      "a parameter is on the CPU, and update_on is \"cuda\": move the model "
      "to the device first, or take update_on \"cpu\"");
}

inline void check_sizes(const char* what, const at::Tensor& tensor,
                        const at::Tensor& parameter) {
  if (tensor.sizes() == parameter.sizes()) return;
  fail<std::invalid_argument>(what, " has sizes ", tensor.sizes(),
                              ", its parameter ", parameter.sizes());
}

inline void check_gradient(const at::Tensor& gradient,
                           const at::Tensor& parameter) {
  if (gradient.defined() && gradient.layout() != c10::Layout::Strided) {
    fail<StateError>("sparse gradients are not supported");
  }
  check_has_plain_memory(gradient, "OffloadedAdamW: gradient");
  const c10::ScalarType dtype = gradient.scalar_type();
  if (!is_supported(dtype)) {
    fail<TypeError>("a gradient of dtype ", dtype, " is not supported");
  }
  if (gradient.device() != parameter.device()) {
    fail<std::invalid_argument>("a gradient is on ", gradient.device(),
                                ", its parameter on ", parameter.device());
  }
  check_sizes("gradient", gradient, parameter);
}

/// Checks a state that is loaded. `partly`: tensors may be undefined.
inline void check_saved(const at::Tensor& parameter, const AdamWState& state,
                        bool partly = false) {
  check_parameter(parameter);
  const auto check_one = [&](const char* name, const at::Tensor& tensor) {
    if (partly && !tensor.defined()) return;
    check_has_plain_memory(tensor, std::string("OffloadedAdamW: ") + name);
    check_sizes(name, tensor, parameter);
    if (!c10::isFloatingType(tensor.scalar_type()) ||
        tensor.element_size() > 8) {
      fail<TypeError>(name, " has dtype ", tensor.scalar_type());
    }
  };
  check_one("exp_avg", state.exp_avg);
  check_one("exp_avg_sq", state.exp_avg_sq);
  if (state.master.defined()) {
    check_one("master_param", state.master);
  }
}

}  // namespace torch_ext::adamw
