// Measures the library's own cost, without disk and checksums: the null engine
// moves no bytes. CPU time is that of all threads. The counter `operations`
// says how many operations an iteration makes.

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "torch_ext/device/device.h"
#include "torch_ext/io/io_queue.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kSmall = std::size_t{64} << 10;
constexpr std::size_t kSmallCount = 1024;
constexpr std::size_t kPieces = 256;

AioConfig config() {
  AioConfig result;
  result.queue_depth = 32;
  return result;
}

std::filesystem::path scratch_folder() {
  return std::filesystem::temp_directory_path();
}

// Page-aligned memory that has been touched. Otherwise copies would read the
// kernel's one page of zeros.
class Memory {
 public:
  explicit Memory(std::size_t bytes)
      : data_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes))),
        size_(bytes) {
    std::memset(data_.get(), 1, bytes);
  }

  std::span<std::byte> all() const { return {data_.get(), size_}; }
  std::span<std::byte> small(std::size_t index, std::size_t shift) const {
    return all().subspan(index * kSmall + shift, kSmall);
  }

 private:
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_;
};

void count(benchmark::State& state, std::size_t operations) {
  state.counters["operations"] = static_cast<double>(operations);
}

void BM_QueuePieceOf1MiB(benchmark::State& state) {
  const auto file = std::make_shared<File>(File::scratch(scratch_folder()));
  const Memory memory(kPieces << 20);
  IoQueue queue(config(), make_engine_factory("null"));
  for (auto _ : state) {
    queue
        .submit(
            {.op = IoRequest::Op::kWrite, .file = file, .bytes = memory.all()})
        .wait();
  }
  count(state, kPieces);
}
BENCHMARK(BM_QueuePieceOf1MiB)->MeasureProcessCPUTime()->UseRealTime();

void BM_QueueOperationOf64KiB(benchmark::State& state) {
  const auto file = std::make_shared<File>(File::scratch(scratch_folder()));
  const Memory memory(kSmallCount * kSmall);
  IoQueue queue(config(), make_engine_factory("null"));
  std::vector<Ticket> tickets(kSmallCount);
  for (auto _ : state) {
    for (std::size_t i = 0; i < kSmallCount; ++i) {
      tickets[i] = queue.submit({.op = IoRequest::Op::kWrite,
                                 .file = file,
                                 .offset = i * kSmall,
                                 .bytes = memory.small(i, 0)});
    }
    for (const Ticket& ticket : tickets) ticket.wait();
  }
  count(state, kSmallCount);
}
BENCHMARK(BM_QueueOperationOf64KiB)->MeasureProcessCPUTime()->UseRealTime();

// A swapper and the keys of kSmallCount runs of memory, all of them stored.
class SwapFixture {
 public:
  explicit SwapFixture(bool staged)
      : shift_(staged ? File::scratch(scratch_folder()).memory_alignment() / 2
                      : 0) {
    for (std::size_t i = 0; i < kSmallCount; ++i) {
      keys_.push_back("layer." + std::to_string(i));
    }
    swap_out();
  }

  void swap_out() {
    for (std::size_t i = 0; i < kSmallCount; ++i) {
      tickets_.push_back(swapper_.swap_out(keys_[i], bytes(i)));
    }
    wait();
  }

  void swap_in() {
    for (std::size_t i = 0; i < kSmallCount; ++i) {
      tickets_.push_back(swapper_.swap_in(keys_[i], bytes(i)));
    }
    wait();
  }

 private:
  DeviceBytes bytes(std::size_t index) {
    return {.device = host_device(),
            .data = memory_.small(index, shift_).data(),
            .size = kSmall};
  }

  void wait() {
    for (const SwapTicket& ticket : tickets_) ticket.wait();
    tickets_.clear();
  }

  const std::size_t shift_;
  const Memory memory_{kSmallCount * kSmall + kPage};
  std::vector<std::string> keys_;
  std::vector<SwapTicket> tickets_;
  Swapper swapper_{{.store = {.directory = scratch_folder(),
                              .aio = config(),
                              .engine = "null",
                              .verify = false}}};
};

// "In place" is without a copy. "Staged" is from memory that direct I/O cannot
// write from. Each operation then copies its 64 KiB. That copy alone costs what
// BM_Copy64KiB says.
void BM_SwapOut64KiB(benchmark::State& state) {
  SwapFixture fixture(state.range(0) != 0);
  for (auto _ : state) fixture.swap_out();
  count(state, kSmallCount);
}
BENCHMARK(BM_SwapOut64KiB)
    ->ArgName("staged")
    ->Arg(0)
    ->Arg(1)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_SwapIn64KiB(benchmark::State& state) {
  SwapFixture fixture(state.range(0) != 0);
  for (auto _ : state) fixture.swap_in();
  count(state, kSmallCount);
}
BENCHMARK(BM_SwapIn64KiB)
    ->ArgName("staged")
    ->Arg(0)
    ->Arg(1)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

void BM_Copy64KiB(benchmark::State& state) {
  const Memory source(kSmallCount * kSmall);
  const Memory target(kSmallCount * kSmall);
  for (auto _ : state) {
    for (std::size_t i = 0; i < kSmallCount; ++i) {
      std::memcpy(target.small(i, 0).data(), source.small(i, 0).data(), kSmall);
      benchmark::ClobberMemory();
    }
  }
  count(state, kSmallCount);
}
BENCHMARK(BM_Copy64KiB)->MeasureProcessCPUTime()->UseRealTime();

}  // namespace
}  // namespace torch_ext
