#pragma once

#include <memory>
#include <string>

#include "torch_ext/config/aio_config.h"
#include "torch_ext/io/io_engine.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// An IoQueue and how it came by its engine.
struct MadeQueue {
  std::unique_ptr<IoQueue> queue = nullptr;
  std::string engine = {};  ///< One of engine_names(), or "custom".
  /// What a log should hold where the engine was chosen here: "I/O engine
  /// NAME", and " instead of ..." with the reasons if it was not the first
  /// choice.
  std::string note = {};
};

/// Makes a queue for files that take direct I/O, or for such as do not.
/// `engine`: one of engine_names(), or "auto": the first of those that work
/// here and suit the files. `factory` overrides it where set.
/// Errors: those of IoQueue; std::invalid_argument for an unknown engine.
MadeQueue make_queue(const AioConfig& config, const std::string& engine,
                     bool direct, const IoEngineFactory& factory = {});

}  // namespace torch_ext
