#pragma once

#include <ATen/core/Tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor_check.h"
#include "torch_ext/base/error.h"

// Checks what an optimizer with its state on a drive takes. `optimizer` is its
// name, with which texts begin. Errors: TypeError, std::invalid_argument and
// StateError, with what is wrong.
namespace torch_ext {

template <typename Error, typename... Parts>
[[noreturn]] inline void fail(const std::string& optimizer,
                              const Parts&... parts) {
  std::ostringstream text;
  text << optimizer << ": ";
  (text << ... << parts);
  throw Error(text.str());
}

/// Whether parameters may have this dtype.
inline bool is_supported(c10::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline void check_parameter(const std::string& optimizer,
                            const at::Tensor& tensor) {
  check_has_plain_memory(tensor, optimizer);
  const c10::ScalarType dtype = tensor.scalar_type();
  if (!is_supported(dtype)) {
    fail<TypeError>(optimizer, "a parameter of dtype ", dtype,
                    " is not supported, only float32, bfloat16 and float16");
  }
  if (tensor.is_neg() || !tensor.is_non_overlapping_and_dense()) {
    fail<std::invalid_argument>(
        optimizer, "a parameter with sizes ", tensor.sizes(), " and strides ",
        tensor.strides(), " is not dense: its elements overlap or have gaps");
  }
}

inline void check_sizes(const std::string& optimizer, const char* what,
                        const at::Tensor& tensor, const at::Tensor& parameter) {
  if (tensor.sizes() == parameter.sizes()) return;
  fail<std::invalid_argument>(optimizer, what, " has sizes ", tensor.sizes(),
                              ", its parameter ", parameter.sizes());
}

/// Checks a gradient, but not its dtype and device.
inline void check_gradient(const std::string& optimizer,
                           const at::Tensor& gradient,
                           const at::Tensor& parameter) {
  if (gradient.defined() && gradient.layout() != c10::Layout::Strided) {
    fail<StateError>(optimizer, "sparse gradients are not supported");
  }
  check_has_plain_memory(gradient, optimizer + ": gradient");
  check_sizes(optimizer, "gradient", gradient, parameter);
}

[[noreturn]] inline void refuse_dtype(const std::string& optimizer,
                                      const at::Tensor& gradient) {
  fail<TypeError>(optimizer, "a gradient of dtype ", gradient.scalar_type(),
                  " is not supported");
}

/// Checks a tensor of a state that is loaded.
inline void check_saved(const std::string& optimizer, const char* name,
                        const at::Tensor& tensor, const at::Tensor& parameter) {
  check_has_plain_memory(tensor, optimizer + ": " + name);
  check_sizes(optimizer, name, tensor, parameter);
  if (!c10::isFloatingType(tensor.scalar_type()) || tensor.element_size() > 8) {
    fail<TypeError>(optimizer, name, " has dtype ", tensor.scalar_type());
  }
}

}  // namespace torch_ext
