#include "torch_ext/base/error.h"

#include <cstring>
#include <utility>

namespace torch_ext {
namespace {

std::string reason(const IoFailure& failure) {
  std::string text;
  if (failure.offset) text += " offset=" + std::to_string(*failure.offset);
  if (failure.length) text += " length=" + std::to_string(*failure.length);
  text += ": ";
  text += strerrordesc_np(failure.error) != nullptr
              ? strerrordesc_np(failure.error)
              : "unknown error";
  text += " (" + errno_name(failure.error) + ")";
  if (!failure.detail.empty()) text += "; " + failure.detail;
  return text;
}

std::string full_text(const IoFailure& failure) {
  std::string text = failure.op;
  if (!failure.path.empty()) text += " " + failure.path;
  return text + reason(failure);
}

}  // namespace

IoError::IoError(IoFailure failure)
    : std::runtime_error(full_text(failure)), failure_(std::move(failure)) {}

std::string IoError::text_without_path() const {
  return failure_.op + reason(failure_);
}

std::string errno_name(int error) {
  const char* name = strerrorname_np(error);
  return name != nullptr ? name : "errno " + std::to_string(error);
}

}  // namespace torch_ext
