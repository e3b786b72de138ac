#pragma once

#include <exception>
#include <string>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {

/// An error with words added about what it means. An IoError stays one; any
/// other exception becomes a StateError with its text.
inline std::exception_ptr with_detail(const std::exception_ptr& error,
                                      const std::string& detail) {
  try {
    std::rethrow_exception(error);
  } catch (const IoError& e) {
    IoFailure failure = e.failure();
    if (!failure.detail.empty()) failure.detail += "; ";
    failure.detail += detail;
    return std::make_exception_ptr(IoError(std::move(failure)));
  } catch (const std::exception& e) {
    return std::make_exception_ptr(
        StateError(std::string(e.what()) + "; " + detail));
  } catch (...) {
    return error;
  }
}

}  // namespace torch_ext
