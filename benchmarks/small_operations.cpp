// Many small operations through the C++ API, on command, so that another
// program's can be timed in turn with them:
//
//   small_operations keys|file|checked-keys DIRECTORY COUNT BYTES BLOCK_SIZE
//                    QUEUE_DEPTH THREADS ENGINE
//
// It says "ready". Each line of input, "write" or "read", then moves everything
// once. The answer is a line with the wall seconds and the CPU seconds of all
// threads. "check" compares what was read last. `keys` uses a value for each
// key of a Swapper without checksums, `checked-keys` with them. `file` uses
// ranges of one file, in order.

#include <sys/resource.h>

#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_ext/device/device.h"
#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/swap/swapper.h"

namespace {

using torch_ext::DeviceBytes;
using torch_ext::SwapTicket;

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) +
           static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

class Memory {
 public:
  explicit Memory(std::size_t bytes)
      : begin_(static_cast<std::byte*>(std::aligned_alloc(4096, bytes))),
        size_(bytes) {
    if (begin_ == nullptr) throw std::bad_alloc();
    std::memset(begin_.get(), 0, bytes);
  }
  std::span<std::byte> bytes() const { return {begin_.get(), size_}; }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> begin_;
  std::size_t size_;
};

class Operations {
 public:
  virtual ~Operations() = default;
  virtual SwapTicket write(std::size_t i, DeviceBytes bytes) = 0;
  virtual SwapTicket read(std::size_t i, DeviceBytes bytes) = 0;
};

class Keys final : public Operations {
 public:
  Keys(const torch_ext::SwapperOptions& options, std::size_t count)
      : swapper_(options) {
    for (std::size_t i = 0; i < count; ++i) keys_.push_back(std::to_string(i));
  }
  SwapTicket write(std::size_t i, DeviceBytes bytes) override {
    return swapper_.swap_out(keys_[i], std::move(bytes));
  }
  SwapTicket read(std::size_t i, DeviceBytes bytes) override {
    return swapper_.swap_in(keys_[i], std::move(bytes));
  }

 private:
  torch_ext::Swapper swapper_;
  std::vector<std::string> keys_;
};

class Ranges final : public Operations {
 public:
  Ranges(const torch_ext::FileTransferOptions& options,
         std::filesystem::path path)
      : swapper_(options), path_(std::move(path)) {}
  SwapTicket write(std::size_t i, DeviceBytes bytes) override {
    const std::size_t offset = i * bytes.size;
    return swapper_.write(path_, offset, std::move(bytes));
  }
  SwapTicket read(std::size_t i, DeviceBytes bytes) override {
    const std::size_t offset = i * bytes.size;
    return swapper_.read(path_, offset, std::move(bytes));
  }

 private:
  torch_ext::FileTransfer swapper_;
  std::filesystem::path path_;
};

std::unique_ptr<Operations> make(const std::vector<std::string>& arguments,
                                 std::size_t count) {
  const torch_ext::AioConfig aio{.block_size = std::stoull(arguments[5]),
                                 .queue_depth = std::stoi(arguments[6]),
                                 .thread_count = std::stoi(arguments[7])};
  const std::string& kind = arguments[1];
  if (kind == "file") {
    const torch_ext::FileTransferOptions options{.aio = aio,
                                                 .engine = arguments[8]};
    return std::make_unique<Ranges>(
        options, std::filesystem::path(arguments[2]) / "ranges");
  }
  if (kind != "keys" && kind != "checked-keys") {
    throw std::invalid_argument(kind + ": keys, checked-keys or file");
  }
  const torch_ext::SwapperOptions options{
      .store = {.directory = arguments[2],
                .aio = aio,
                .engine = arguments[8],
                .verify = kind == "checked-keys"}};
  return std::make_unique<Keys>(options, count);
}

void serve(const std::vector<std::string>& arguments) {
  if (arguments.size() != 9) throw std::invalid_argument("9 words are needed");
  const std::size_t count = std::stoull(arguments[3]);
  const std::size_t size = std::stoull(arguments[4]);
  const auto operations = make(arguments, count);
  const Memory sources(count * size);
  const Memory targets(count * size);
  for (std::size_t i = 0; i < count * size; i += sizeof(i)) {
    std::memcpy(sources.bytes().data() + i, &i, sizeof(i));
  }
  std::vector<SwapTicket> tickets;
  tickets.reserve(count);
  std::cout << "ready" << std::endl;
  for (std::string command; std::getline(std::cin, command);) {
    if (command == "check") {
      const bool same = std::memcmp(sources.bytes().data(),
                                    targets.bytes().data(), count * size) == 0;
      std::cout << (same ? "same" : "different") << std::endl;
      continue;
    }
    const bool write = command == "write";
    const Memory& memory = write ? sources : targets;
    const double cpu = cpu_seconds();
    const auto begin = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < count; ++i) {
      const DeviceBytes bytes{torch_ext::host_device(),
                              memory.bytes().data() + i * size, size};
      tickets.push_back(write ? operations->write(i, bytes)
                              : operations->read(i, bytes));
    }
    for (const SwapTicket& ticket : tickets) ticket.wait();
    const std::chrono::duration<double> wall =
        std::chrono::steady_clock::now() - begin;
    std::cout << wall.count() << ' ' << cpu_seconds() - cpu << std::endl;
    tickets.clear();
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    serve({argv, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
