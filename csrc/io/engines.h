#pragma once

#include <memory>
#include <string>

#include "torch_ext/io/io_engine.h"

namespace torch_ext {

/// Times that an engine submits again at once after EINTR. Then the kernel has
/// no room: whoever submits tries again later, and not for ever.
constexpr int kMaxInterruptions = 100;

/// Errors: IoError where the kernel refuses.
std::unique_ptr<IoEngine> make_libaio_engine(int depth);
/// Empty if the kernel has AIO and room for one more engine, else why not.
std::string libaio_unavailable_reason();

/// Errors: IoError where the kernel refuses, or liburing was not built in.
std::unique_ptr<IoEngine> make_io_uring_engine(int depth);
/// Empty if a ring can be made and used, else why not.
std::string io_uring_unavailable_reason();

std::unique_ptr<IoEngine> make_thread_engine(int depth);

/// All engines of one factory share a disk.
IoEngineFactory make_memory_engine_factory();

std::unique_ptr<IoEngine> make_null_engine(int depth);

}  // namespace torch_ext
