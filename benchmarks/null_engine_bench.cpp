// Our own cost, without disk and checksums: the null engine moves no bytes.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "torch_ext/device/device.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {
namespace {

AioConfig config() {
  AioConfig result;
  result.queue_depth = 32;
  return result;
}

// CPU time of all threads, per operation.
void count(benchmark::State& state, std::size_t operations) {
  state.SetItemsProcessed(state.iterations() *
                          static_cast<std::int64_t>(operations));
}

std::span<std::byte> pages(std::size_t bytes) {
  static std::byte* memory =
      static_cast<std::byte*>(std::aligned_alloc(4096, std::size_t{1} << 30));
  return {memory, bytes};
}

void BM_QueuePiecesOfOneMiB(benchmark::State& state) {
  auto file = std::make_shared<File>(
      File::scratch(std::filesystem::temp_directory_path()));
  IoQueue queue(config(), make_engine_factory("null"));
  for (auto _ : state) {
    queue
        .submit({.op = IoRequest::Op::kWrite,
                 .file = file,
                 .bytes = pages(std::size_t{1} << 30)})
        .wait();
  }
  count(state, 1024);
}
BENCHMARK(BM_QueuePiecesOfOneMiB)->MeasureProcessCPUTime()->UseRealTime();

void BM_QueueOperationsOf64KiB(benchmark::State& state) {
  auto file = std::make_shared<File>(
      File::scratch(std::filesystem::temp_directory_path()));
  IoQueue queue(config(), make_engine_factory("null"));
  std::vector<Ticket> tickets(1024);
  for (auto _ : state) {
    for (std::size_t i = 0; i < tickets.size(); ++i) {
      tickets[i] = queue.submit({.op = IoRequest::Op::kWrite,
                                 .file = file,
                                 .offset = i << 16,
                                 .bytes = pages(1 << 16)});
    }
    for (const Ticket& ticket : tickets) ticket.wait();
  }
  count(state, tickets.size());
}
BENCHMARK(BM_QueueOperationsOf64KiB)->MeasureProcessCPUTime()->UseRealTime();

// With the keys' table, the copy thread and 64 KiB in place or staged.
void BM_SwapOutOf64KiB(benchmark::State& state) {
  const std::size_t shift = state.range(0) == 0 ? 0 : 64;
  Swapper swapper(
      {.store = {.directory = std::filesystem::temp_directory_path(),
                 .aio = config(),
                 .engine = "null",
                 .verify = false}});
  std::vector<std::string> keys;
  for (int i = 0; i < 1024; ++i) keys.push_back("layer." + std::to_string(i));
  std::vector<SwapTicket> tickets;
  for (auto _ : state) {
    tickets.clear();
    for (const std::string& key : keys) {
      tickets.push_back(swapper.swap_out(key, {.device = host_device(),
                                               .data = pages(0).data() + shift,
                                               .size = 1 << 16}));
    }
    for (const SwapTicket& ticket : tickets) ticket.wait();
  }
  count(state, keys.size());
}
BENCHMARK(BM_SwapOutOf64KiB)
    ->ArgName("staged")
    ->Arg(0)
    ->Arg(1)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

}  // namespace
}  // namespace torch_ext

