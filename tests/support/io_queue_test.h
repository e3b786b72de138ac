#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <thread>
#include <utility>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext::test {

inline constexpr std::size_t kBlock = 64 << 10;

inline AioConfig small_blocks() {
  AioConfig config;
  config.block_size = kBlock;
  return config;
}

/// What the IoError says that `call` throws.
template <typename Call>
IoFailure failure_of(Call call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no IoError";
  return {};
}

/// Likewise of an operation that ends within a minute.
inline IoFailure failure_of(const Ticket& ticket) {
  return failure_of([&] { ticket.wait(std::chrono::minutes(1)); });
}

/// A directory for files and a script of faults for the queue on them.
class IoQueueTest : public testing::Test {
 protected:
  std::shared_ptr<File> scratch(std::uint64_t bytes) const {
    auto file = std::make_shared<File>(File::scratch(dir_.path()));
    file->reserve(0, bytes);
    return file;
  }

  IoQueue queue(const AioConfig& config,
                std::string_view engine = "memory") const {
    return IoQueue(config, faulty_factory(engine, script_));
  }

  static IoOperation write(std::shared_ptr<const File> file,
                           std::uint64_t offset, std::span<std::byte> bytes) {
    return {.op = IoRequest::Op::kWrite,
            .file = std::move(file),
            .offset = offset,
            .bytes = bytes};
  }
  static IoOperation read(std::shared_ptr<const File> file,
                          std::uint64_t offset, std::span<std::byte> bytes) {
    return {.op = IoRequest::Op::kRead,
            .file = std::move(file),
            .offset = offset,
            .bytes = bytes};
  }

  TempDir dir_;
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

}  // namespace torch_ext::test
