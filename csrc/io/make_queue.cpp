#include "torch_ext/io/make_queue.h"

#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

MadeQueue make(const AioConfig& config, const std::string& engine,
               std::string note = {}) {
  return {std::make_unique<IoQueue>(config, make_engine_factory(engine)),
          engine, std::move(note)};
}

MadeQueue threads_instead(const AioConfig& config, const std::string& why_not) {
  return make(config, "threads",
              "I/O engine threads instead of libaio: " + why_not);
}

}  // namespace

MadeQueue make_queue(const AioConfig& config, const std::string& engine,
                     bool direct, const IoEngineFactory& factory) {
  if (factory) {
    return {std::make_unique<IoQueue>(config, factory), "custom", ""};
  }
  if (engine != "auto") return make(config, engine);
  std::string why_not = engine_unavailable_reason("libaio");
  if (why_not.empty() && !direct) {
    why_not = "libaio is synchronous on files without direct I/O";
  }
  if (!why_not.empty()) return threads_instead(config, why_not);
  try {
    return make(config, "libaio");
  } catch (const IoError& error) {
    // The kernel has AIO, but not enough for this depth and thread count.
    return threads_instead(config, error.what());
  }
}

}  // namespace torch_ext
