#include "torch_ext/io/make_queue.h"

#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {

MadeQueue make_queue(const AioConfig& config, const std::string& engine,
                     bool direct, const IoEngineFactory& factory) {
  const auto with = [&](const std::string& name) {
    return MadeQueue{
        std::make_unique<IoQueue>(config, make_engine_factory(name)), name};
  };
  if (factory) return {std::make_unique<IoQueue>(config, factory), "custom"};
  if (engine != "auto") return with(engine);
  std::string why_not_others;
  const auto chosen = [&](const std::string& name) {
    MadeQueue made = with(name);
    made.note = "I/O engine " + name + why_not_others;
    return made;
  };
  if (!direct) {
    why_not_others =
        " instead of libaio or io_uring, which are for files with direct I/O";
    return chosen("threads");
  }
  // These two are equally fast, and the first needs no locked memory.
  for (const std::string name : {"libaio", "io_uring"}) {
    std::string why_not = engine_unavailable_reason(name);
    try {
      if (why_not.empty()) return chosen(name);
    } catch (const IoError& error) {
      // The kernel has the engine, but not enough room for this depth and
      // thread count.
      why_not = error.what();
    }
    why_not_others += (why_not_others.empty() ? " instead of " : "; ") + name +
                      " (" + why_not + ")";
  }
  return chosen("threads");
}

}  // namespace torch_ext
