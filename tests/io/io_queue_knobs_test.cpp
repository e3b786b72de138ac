// The five knobs do what their names say.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "support/aio_call_counter.h"
#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/temp_dir.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::FaultScript;
using test::kBlock;
using test::small_blocks;
using test::TempDir;

using IoQueueKnobsTest = test::IoQueueTest;

TEST_F(IoQueueKnobsTest, QueueDepthBoundsTheRequestsInFlightPerThread) {
  auto config = small_blocks();
  config.queue_depth = 3;
  config.thread_count = 2;
  auto file = scratch(4 << 20);
  AlignedBuffer memory(64 * kBlock);
  script_->set_plan(
      [](std::size_t, const IoRequest&) { return Fault::held(); });
  auto io = queue(config);
  const Ticket ticket = io.submit(write(file, 0, memory.bytes()));
  while (script_->held() < 6) std::this_thread::yield();
  script_->release_all();
  ticket.wait();
  EXPECT_EQ(script_->max_in_flight(), 3u);
  EXPECT_EQ(script_->max_total_in_flight(), 6u);
}

TEST_F(IoQueueKnobsTest, SingleSubmitMakesOneCallPerRequest) {
  auto config = small_blocks();
  config.single_submit = true;
  auto file = scratch(4 << 20);
  AlignedBuffer memory(32 * kBlock);
  auto io = queue(config);
  io.submit(write(file, 0, memory.bytes())).wait();
  const auto batches = script_->batches();
  EXPECT_EQ(batches, std::vector<std::size_t>(32, 1));
}

TEST_F(IoQueueKnobsTest, WithoutSingleSubmitABatchIsOneCall) {
  auto config = small_blocks();
  config.overlap_events = false;
  auto file = scratch(4 << 20);
  AlignedBuffer memory(32 * kBlock);
  auto io = queue(config);
  io.submit(write(file, 0, memory.bytes())).wait();
  EXPECT_EQ(script_->batches(), std::vector<std::size_t>(4, 8));
}

// Requests submitted before the first one is released, of 16 at depth 4.
std::size_t started_while_first_is_held(bool overlap_events) {
  TempDir dir;
  auto file = std::make_shared<File>(File::scratch(dir.path()));
  file->reserve(0, 16 * kBlock);
  AlignedBuffer memory(16 * kBlock);
  auto script = std::make_shared<FaultScript>(test::only(0, Fault::held()));
  AioConfig config = small_blocks();
  config.queue_depth = 4;
  config.overlap_events = overlap_events;
  IoQueue io(config, test::faulty_factory("memory", script));
  const Ticket ticket = io.submit({.op = IoRequest::Op::kWrite,
                                   .file = file,
                                   .offset = 0,
                                   .bytes = memory.bytes()});
  const std::size_t expected = overlap_events ? 16 : 4;
  while (script->requests() < expected) std::this_thread::yield();
  const std::size_t started = script->requests();
  script->release_all();
  ticket.wait();
  return started;
}

TEST_F(IoQueueKnobsTest, OverlapEventsRefillsWhileARequestIsStillOut) {
  EXPECT_EQ(started_while_first_is_held(true), 16u);
}

TEST_F(IoQueueKnobsTest, WithoutOverlapEventsABatchIsDrainedBeforeTheNext) {
  EXPECT_EQ(started_while_first_is_held(false), 4u);
}

// io_submit calls for 32 blocks at depth 8, with checksums.
std::size_t kernel_calls(IoRequest::Op op, std::size_t block_size,
                         bool single_submit) {
  TempDir dir;
  auto file = std::make_shared<File>(File::scratch(dir.path()));
  file->reserve(0, 32 * block_size);
  AlignedBuffer memory(32 * block_size);
  std::ranges::fill(memory.bytes(), std::byte{0});  // As the file reads.
  std::vector<std::uint64_t> checksums(32,
                                       checksum(memory.bytes(0, block_size)));
  AioConfig config;
  config.block_size = block_size;
  config.single_submit = single_submit;
  config.overlap_events = false;
  IoQueue io(config, make_engine_factory("libaio"));
  const test::AioCalls before = test::aio_calls();
  io.submit({.op = op,
             .file = file,
             .bytes = memory.bytes(),
             .checksums = checksums})
      .wait();
  const test::AioCalls calls = test::aio_calls() - before;
  EXPECT_EQ(calls.requests, 32u);
  return calls.submits;
}

TEST_F(IoQueueKnobsTest, TheKernelIsCalledOncePerRequestOrOncePerBatch) {
  if (!test::aio_calls_available()) GTEST_SKIP() << "libaio is not linked";
  constexpr auto kRead = IoRequest::Op::kRead;
  constexpr auto kWrite = IoRequest::Op::kWrite;
  constexpr std::size_t kMiB = 1 << 20;  // The default.
  for (const std::size_t block_size : {kBlock, kMiB}) {
    EXPECT_EQ(kernel_calls(kRead, block_size, true), 32u);
    EXPECT_EQ(kernel_calls(kWrite, block_size, true), 32u);
    EXPECT_EQ(kernel_calls(kRead, block_size, false), 4u);
  }
  // The device starts when 256 KiB, or one block, is hashed. From then on it
  // has as much to do as is hashed meanwhile. So there are batches of 4 and 4,
  // or of 1, 1, 2 and 4.
  EXPECT_EQ(kernel_calls(kWrite, kBlock, false), 8u);
  EXPECT_EQ(kernel_calls(kWrite, kMiB, false), 16u);
}

}  // namespace
}  // namespace torch_ext
