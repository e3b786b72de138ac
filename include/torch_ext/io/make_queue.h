#pragma once

#include <memory>
#include <string>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// An IoQueue, and how its engine was chosen.
struct MadeQueue {
  std::unique_ptr<IoQueue> queue = nullptr;
  std::string engine = {};  ///< One of engine_names(), or "custom".
  /// For a log, where "auto" chose the engine: "I/O engine NAME". If that was
  /// not the first choice, " instead of ..." follows, with the reasons.
  std::string note = {};
};

/// Makes a queue. `direct` tells whether its files take direct I/O. `engine` is
/// one of engine_names(), or "auto": the first of those that work here and suit
/// the files. `factory` overrides `engine` if it is set.
/// Errors: those of IoQueue; std::invalid_argument for an unknown engine.
MadeQueue make_queue(const AioConfig& config, const std::string& engine,
                     bool direct, const IoEngineFactory& factory = {});

}  // namespace torch_ext
