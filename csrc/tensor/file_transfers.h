#pragma once

#include <chrono>

#include "torch_ext/base/error.h"
#include "torch_ext/tensor/tensor_file.h"
#include "torch_ext/tensor/tensor_file_transfer.h"

namespace torch_ext {

inline FileTransferOptions transfer_options(const TensorFileOptions& options) {
  return {.aio = options.aio,
          .engine = options.engine,
          .host_memory = options.host_memory,
          .engine_factory = options.engine_factory};
}

/// Waits for an operation, with a look at interrupts. Errors: the operation's,
/// and what options.interrupt throws.
inline void wait_for(const TensorTicket& ticket,
                     const TensorFileOptions& options) {
  constexpr std::chrono::milliseconds kSlice(50);
  while (!ticket.wait_for(kSlice)) {
    if (options.interrupt) options.interrupt();
  }
  ticket.wait();
}

/// Calls `call`. Its IoErrors name the path, which descriptors do not know.
template <typename Call>
auto naming(const std::string& path, Call call) {
  try {
    return call();
  } catch (const IoError& error) {
    IoFailure failure = error.failure();
    failure.path = path;
    throw IoError(std::move(failure));
  }
}

}  // namespace torch_ext
