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
  // The first two are equally fast.
  std::string note = "I/O engine threads instead of libaio or io_uring";
  if (direct) {
    for (const char* name : {"libaio", "io_uring"}) {
      std::string why_not = engine_unavailable_reason(name);
      try {
        if (why_not.empty()) return with(name);
      } catch (const IoError& error) {
        // The kernel has it, but not enough for this depth and thread count.
        why_not = error.what();
      }
      note += std::string("; ") + name + ": " + why_not;
    }
  } else {
    note += ", which are for files with direct I/O";
  }
  MadeQueue made = with("threads");
  made.note = std::move(note);
  return made;
}

}  // namespace torch_ext
