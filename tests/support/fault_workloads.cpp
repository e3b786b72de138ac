#include "support/fault_workloads.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/pattern.h"
#include "support/scalar_adamw.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/store/store.h"
#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext::test {
namespace {

constexpr std::size_t kBlock = 64 << 10;
constexpr std::chrono::seconds kHang(60);

/// A file that was there before, and its size.
constexpr const char* kTheirs = "theirs";
constexpr std::size_t kWhole = 300'000;

/// Makes calls that may fail, and notes how they do.
class Caller {
 public:
  explicit Caller(const WorkloadPlace& place) : place_(place) {}

  /// Whether the call ended well.
  template <typename Call>
  bool operator()(const char* what, Call call) {
    try {
      call();
      return true;
    } catch (const IoError& error) {
      ++outcome_.errors;
      if (error.error() <= 0) broken(what, "an error without errno");
      if (place_.repair_at_once) repair();
    } catch (const std::bad_alloc&) {
      ++outcome_.errors;
      if (place_.repair_at_once) repair();
    } catch (const TimeoutError&) {
      broken(what, "no end");
    } catch (const std::exception& error) {
      broken(what, error.what());
    }
    return false;
  }

  void expect(bool held, const std::string& what, const char* why) {
    if (!held) broken(what, why);
  }
  void broken(const std::string& what, const std::string& why) {
    if (outcome_.wrong.empty()) outcome_.wrong = what + ": " + why;
  }

  void repair() {
    if (!std::exchange(repaired_, true)) place_.repair();
  }

  /// The fault is gone: errors would be wrong from now on.
  template <typename Call>
  void afterwards(const char* what, Call call) {
    repair();
    if (place_.engine_is_lost()) return;
    try {
      call();
    } catch (const std::exception& error) {
      broken(std::string(what) + ", repaired", error.what());
    }
  }

  Outcome outcome() const { return outcome_; }

 private:
  const WorkloadPlace& place_;
  Outcome outcome_;
  bool repaired_ = false;
};

StoreOptions store_options(const WorkloadPlace& place) {
  StoreOptions options;
  options.directory = place.directory;
  options.aio.block_size = kBlock;
  options.aio.queue_depth = 4;
  options.engine = place.engine;
  options.engine_factory = place.factory;
  return options;
}

AlignedBuffer filled(std::size_t size, std::uint64_t seed) {
  AlignedBuffer memory(size);
  fill_pattern(memory.bytes(), seed);
  return memory;
}

DeviceBytes on_host(const AlignedBuffer& memory) {
  return {host_device(), memory.data(), memory.size(), nullptr};
}

// Writes two extents, reads them, rewrites one and reads that.
Outcome run_store(const WorkloadPlace& place) {
  Caller call(place);
  std::unique_ptr<Store> store;
  if (!call("Store",
            [&] { store = std::make_unique<Store>(store_options(place)); })) {
    return call.outcome();
  }
  struct Place {
    std::size_t size;
    std::shared_ptr<Extent> extent = nullptr;
    std::optional<std::uint64_t> seed = std::nullopt;
  };
  std::array<Place, 2> places = {{{3 * kBlock + 4096}, {kBlock}}};
  const auto write = [&](Place& to, std::uint64_t seed) {
    const AlignedBuffer memory = filled(to.size, seed);
    to.seed = std::nullopt;  // A failed write leaves nothing to count on.
    store->write(to.extent, 0, memory.bytes()).wait(kHang);
    to.seed = seed;
  };
  const auto read = [&](const Place& from) {
    AlignedBuffer memory(from.size);
    store->read(from.extent, 0, memory.bytes()).wait(kHang);
    call.expect(holds_pattern(memory.bytes(), *from.seed), "Store::read",
                "wrong bytes");
  };
  std::uint64_t seed = 1;
  for (Place& to : places) {
    call("Store::allocate", [&] { to.extent = store->allocate(to.size); });
    if (to.extent) call("Store::write", [&] { write(to, seed++); });
  }
  for (int round = 0; round < 2; ++round) {
    for (Place& from : places) {
      if (from.seed) call("Store::read", [&] { read(from); });
    }
    Place& again = places[0];
    if (again.extent && round == 0) {
      call("Store::write again", [&] { write(again, seed++); });
    }
  }
  call.afterwards("Store", [&] {
    for (const Place& from : places) {
      if (from.seed) read(from);
    }
    // Not of its space, which may have been given up after an EIO.
    Place fresh{kBlock, store->allocate(kBlock)};
    write(fresh, seed++);
    read(fresh);
  });
  places = {};
  return call.outcome();
}

// Keys that go through buffers and past them, rewritten and removed.
Outcome run_swapper(const WorkloadPlace& place) {
  Caller call(place);
  SwapperOptions options{.store = store_options(place), .host_memory = 1 << 20};
  std::unique_ptr<Swapper> swapper;
  if (!call("Swapper", [&] { swapper = std::make_unique<Swapper>(options); })) {
    return call.outcome();
  }
  struct Value {
    std::size_t size;
    std::uint64_t seed;
  };
  std::map<std::string, Value> stored;
  std::uint64_t seed = 1;
  const auto swap_out = [&](const std::string& key, std::size_t size) {
    const AlignedBuffer memory = filled(size, ++seed);
    swapper->swap_out(key, on_host(memory)).wait(kHang);
    stored[key] = {size, seed};
  };
  const auto swap_in = [&](const std::string& key) {
    AlignedBuffer memory(stored.at(key).size);
    swapper->swap_in(key, on_host(memory)).wait(kHang);
    call.expect(holds_pattern(memory.bytes(), stored.at(key).seed), key,
                "not the value written last");
  };
  const auto swap_all_in = [&] {
    for (const auto& [key, value] : stored) {
      call("Swapper::swap_in", [&, name = key] { swap_in(name); });
    }
  };
  for (const std::size_t size : {std::size_t{150'001}, 2 * kBlock}) {
    const std::string key = "key of " + std::to_string(size);
    call("Swapper::swap_out", [&] { swap_out(key, size); });
  }
  swap_all_in();
  for (const std::size_t size : {std::size_t{150'001}, 2 * kBlock}) {
    const std::string key = "key of " + std::to_string(size);
    call("Swapper::swap_out again", [&] { swap_out(key, size); });
  }
  swap_all_in();
  call.afterwards("Swapper", [&] {
    for (const auto& [key, value] : stored) swap_in(key);
    std::vector<std::string> keys;
    for (const auto& [key, value] : stored) keys.push_back(key);
    call.expect(swapper->keys() == keys, "Swapper::keys", "others");
    swap_out("fresh", 5000);
    swap_in("fresh");
    swapper->remove("fresh");
    call.expect(swapper->stats().in_flight == 0, "Swapper", "in flight");
    // All errors were seen, so this has none to tell of.
    swapper->close();
  });
  return call.outcome();
}

// Ranges within a file of somebody's, read back and rewritten.
Outcome run_file_transfer(const WorkloadPlace& place) {
  Caller call(place);
  const std::filesystem::path theirs = place.directory / kTheirs;
  const std::filesystem::path ours = place.directory / "ours";
  FileTransferOptions options;
  options.aio = store_options(place).aio;
  options.engine = place.engine;
  options.engine_factory = place.factory;
  options.host_memory = 1 << 20;
  std::unique_ptr<FileTransfer> files;
  if (!call("FileTransfer",
            [&] { files = std::make_unique<FileTransfer>(options); })) {
    return call.outcome();
  }
  struct Range {
    std::filesystem::path path;
    std::uint64_t offset;
    std::size_t size;
    std::optional<std::uint64_t> seed = std::nullopt;
  };
  std::array<Range, 2> ranges = {
      {{theirs, 100, 150'001}, {ours, 0, 2 * kBlock}}};
  const auto write = [&](Range& to, std::uint64_t seed) {
    const AlignedBuffer memory = filled(to.size, seed);
    to.seed = std::nullopt;  // A failed write leaves the range undefined.
    files->write(to.path, to.offset, on_host(memory)).wait(kHang);
    to.seed = seed;
  };
  const auto read = [&](const Range& from) {
    AlignedBuffer memory(from.size);
    files->read(from.path, from.offset, on_host(memory)).wait(kHang);
    call.expect(holds_pattern(memory.bytes(), *from.seed), from.path.string(),
                "not the bytes written last");
  };
  std::uint64_t seed = 1;
  for (int round = 0; round < 2; ++round) {
    for (Range& range : ranges) {
      call("FileTransfer::write", [&] { write(range, seed++); });
    }
    for (const Range& range : ranges) {
      if (range.seed) call("FileTransfer::read", [&] { read(range); });
    }
  }
  try {
    files->drop_deleted();
  } catch (const IoError& error) {
    call.expect(false, "FileTransfer::drop_deleted", error.what());
  }
  call.afterwards("FileTransfer", [&] {
    for (const Range& range : ranges) {
      if (range.seed) read(range);
    }
    write(ranges[0], seed++);
    read(ranges[0]);
    call.expect(files->stats().in_flight == 0, "FileTransfer", "in flight");
    files->close();
  });
  files.reset();
  call.repair();
  // The disk of the "memory" engine is not the one that the file is on.
  if (place.engine == "memory") return call.outcome();
  AlignedBuffer memory(kWhole);
  std::ifstream(theirs, std::ios::binary)
      .read(reinterpret_cast<char*>(memory.data()), kWhole);
  const std::size_t end = ranges[0].offset + ranges[0].size;
  call.expect(holds_pattern(memory.bytes(0, ranges[0].offset), 77) &&
                  holds_pattern(memory.bytes(end, kWhole - end), 77, end),
              theirs.string(), "the bytes around the range have changed");
  return call.outcome();
}

/// Gives the optimizer the state that `adamw` expects: zeros after no step.
void load(OptimizerOffload& offload, ScalarAdamW& adamw) {
  std::vector<OptimizerOffload::ParameterStep> all;
  for (std::size_t i = 0; i < adamw.parameters.size(); ++i) {
    ScalarParameter& p = adamw.parameters[i];
    p.expected = p.weights;
    std::fill(p.m.begin(), p.m.end(), 0.0f);
    std::fill(p.v.begin(), p.v.end(), 0.0f);
    p.step = 3;
    all.push_back({i, 3});
  }
  FunctionKernel zeros([](const StateSegment&) {});
  offload.write_state(all, zeros);
}

// Three steps whose results are compared with those of state in memory.
Outcome run_optimizer(const WorkloadPlace& place) {
  Caller call(place);
  TileOptions options;
  options.store = store_options(place);
  options.host_memory = 192 << 10;  // Three tiles at a time.
  std::unique_ptr<OptimizerOffload> offload;
  if (!call("OptimizerOffload",
            [&] { offload = std::make_unique<OptimizerOffload>(options); })) {
    return call.outcome();
  }
  ScalarAdamW adamw(*offload);
  adamw.add(3 * 8192 + 77);
  adamw.add(40);
  FunctionKernel look([](const StateSegment&) {});
  const auto train = [&] {
    for (int step = 0; step < 3; ++step) adamw.step_all();
    offload->read_state(look);  // The errors of the last writes are told here.
    call.expect(adamw.equal(), "OptimizerOffload", "wrong weights");
  };
  call("OptimizerOffload::step", train);
  call.afterwards("OptimizerOffload", [&] {
    load(*offload, adamw);
    train();
  });
  // What was read ahead for a step that does not come is nobody's error yet.
  call("OptimizerOffload::close", [&] { offload->close(); });
  return call.outcome();
}

constexpr std::array<Workload, 4> kWorkloads = {{
    {"Store", run_store},
    {"Swapper", run_swapper},
    {"FileTransfer", run_file_transfer},
    {"OptimizerOffload", run_optimizer, true},
}};

}  // namespace

void prepare(const std::filesystem::path& directory) {
  const AlignedBuffer memory = filled(kWhole, 77);
  std::ofstream(directory / kTheirs, std::ios::binary)
      .write(reinterpret_cast<const char*>(memory.data()), kWhole);
}

std::span<const Workload> workloads() { return kWorkloads; }

}  // namespace torch_ext::test
