#pragma once

#include <exception>
#include <string>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {

/// The error of a step, as later calls shall throw it.
inline std::exception_ptr with_remedy(const std::exception_ptr& error) {
  const std::string remedy =
      "the optimizer state may be half updated: load it anew";
  try {
    std::rethrow_exception(error);
  } catch (const IoError& e) {
    IoFailure failure = e.failure();
    if (!failure.detail.empty()) failure.detail += "; ";
    failure.detail += remedy;
    return std::make_exception_ptr(IoError(std::move(failure)));
  } catch (const std::exception& e) {
    return std::make_exception_ptr(
        StateError(std::string(e.what()) + "; " + remedy));
  } catch (...) {
    return error;
  }
}

}  // namespace torch_ext
