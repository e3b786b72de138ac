#include <algorithm>
#include <array>
#include <stdexcept>

#include "engines.h"

namespace torch_ext {
namespace {

constexpr std::array<std::string_view, 5> kNames = {
    "libaio", "io_uring", "threads", "memory", "null"};

std::string unknown_engine(std::string_view name) {
  std::string text = "unknown I/O engine '" + std::string(name) + "': one of";
  for (std::string_view known : kNames) text += " " + std::string(known);
  return text;
}

void check_name(std::string_view name) {
  if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
    throw std::invalid_argument(unknown_engine(name));
  }
}

IoEngineFactory unchecked_factory(std::string_view name) {
  if (name == "libaio") return make_libaio_engine;
  if (name == "io_uring") return make_io_uring_engine;
  if (name == "threads") return make_thread_engine;
  if (name == "memory") return make_memory_engine_factory();
  return make_null_engine;
}

}  // namespace

std::span<const std::string_view> engine_names() noexcept { return kNames; }

IoEngineFactory make_engine_factory(std::string_view name) {
  check_name(name);
  return [make = unchecked_factory(name)](int depth) {
    if (depth < 1) {
      throw std::invalid_argument("an I/O engine's depth must be at least 1, " +
                                  std::to_string(depth) + " was given");
    }
    return make(depth);
  };
}

std::string engine_unavailable_reason(std::string_view name) {
  check_name(name);
  if (name == "libaio") return libaio_unavailable_reason();
  if (name == "io_uring") return io_uring_unavailable_reason();
  return {};
}

}  // namespace torch_ext
