// Random operations of several threads while requests fail, come short, are
// refused or end late and out of order, all drawn from a seed. A failure prints
// it: TORCH_EXT_TEST_SEED=N draws the same faults again.

#include <fcntl.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/faulty_engine.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/swap/file_transfer.h"
#include "torch_ext/swap/swapper.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::FaultScript;

constexpr std::chrono::seconds kHang(60);

/// Pseudo-random, of both.
std::uint64_t mixed(std::uint64_t seed, std::uint64_t number) {
  return std::bit_cast<std::uint64_t>(test::pattern_word(seed, number));
}

/// What befalls request `index` of schedule `seed`: 1 in 5 has trouble.
Fault drawn_fault(std::uint64_t seed, std::size_t index,
                  const IoRequest& request) {
  const std::uint64_t dice = mixed(seed, index);
  const std::array<int, 8> errors = {EIO,    ENOSPC, EAGAIN, EINTR,
                                     EDQUOT, ENODEV, ENOMEM, ECANCELED};
  const bool direct = (fcntl(request.fd, F_GETFL) & O_DIRECT) != 0;
  switch (dice % 32) {
    case 0:
    case 1:
      return Fault::fail(errors[(dice >> 8) % errors.size()]);
    case 2:
    case 3:
      return Fault::cut(request.length / 2 / 4096 * 4096);
    case 4:
      return direct ? Fault::claimed((dice >> 8) % 512)
                    : Fault::cut((dice >> 8) % 512);
    case 5:
      return Fault::refuse(1 + (dice >> 8) % 3);
    default:
      return {};
  }
}

/// One seed's operations, and what came of them.
class Schedule {
 public:
  Schedule(std::uint64_t seed, std::string engine)
      : seed_(seed), engine_(std::move(engine)) {
    script_->set_plan([seed](std::size_t index, const IoRequest& request) {
      return drawn_fault(seed, index, request);
    });
    script_->shuffle(seed);
  }

  std::string run() {
    // Each seed has one of the two.
    mixed(seed_, 1) % 2 == 0 ? run_swapper() : run_files();
    return wrong_;
  }
  std::size_t errors() const { return errors_; }

 private:
  AioConfig config() const {
    AioConfig config;
    config.block_size = 64 << 10;
    config.queue_depth = 1 + static_cast<int>(mixed(seed_, 2) % 8);
    config.thread_count = 1 + static_cast<int>(mixed(seed_, 3) % 2);
    config.single_submit = mixed(seed_, 4) % 2 == 0;
    config.overlap_events = mixed(seed_, 5) % 2 == 0;
    return config;
  }

  void run_swapper() {
    SwapperOptions options;
    options.store.directory = directory_.path();
    options.store.aio = config();
    options.store.engine_factory = test::faulty_factory(engine_, script_);
    options.host_memory = 256 << 10;
    Swapper swapper(options);
    run_threads(
        true,
        [&](std::uint64_t name, const DeviceBytes& bytes) {
          return swapper.swap_out(std::to_string(name), bytes);
        },
        [&](std::uint64_t name, const DeviceBytes& bytes) {
          return swapper.swap_in(std::to_string(name), bytes);
        });
    note(swapper.stats().in_flight == 0, "operations in flight");
    swapper.close();
  }

  void run_files() {
    FileTransferOptions options;
    options.aio = config();
    options.engine_factory = test::faulty_factory(engine_, script_);
    options.host_memory = 256 << 10;
    FileTransfer files(options);
    const auto path = [&](std::uint64_t name) {
      return directory_ / std::to_string(name);
    };
    run_threads(
        false,
        [&](std::uint64_t name, const DeviceBytes& bytes) {
          return files.write(path(name), name % 7 * 1000, bytes);
        },
        [&](std::uint64_t name, const DeviceBytes& bytes) {
          return files.read(path(name), name % 7 * 1000, bytes);
        });
    note(files.stats().in_flight == 0, "operations in flight");
    files.close();
  }

  /// `keeps_old`: a failed rewrite leaves what was there.
  template <typename Put, typename Get>
  void run_threads(bool keeps_old, Put put, Get get) {
    std::vector<std::thread> threads;
    for (std::uint64_t t = 1; t <= 3; ++t) {
      threads.emplace_back(
          [&, t] { run_thread(t * 100, keeps_old, put, get); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  /// Some operations on four names that no other thread uses.
  template <typename Put, typename Get>
  void run_thread(std::uint64_t first, bool keeps_old, Put put, Get get) {
    std::mt19937_64 random(mixed(seed_, first));
    struct Value {
      std::size_t size;
      std::uint64_t fill;
    };
    std::map<std::uint64_t, Value> stored;
    for (int i = 0; i < 40; ++i) {
      const std::uint64_t name = first + random() % 4;
      const bool writes = !stored.contains(name) || random() % 2 == 0;
      // Every other one is aligned, and goes without a buffer.
      const std::size_t size =
          random() % 2 == 0 ? 1 + random() % 200'000 : random() % 50 * 4096;
      const Value value = writes ? Value{size, random()} : stored.at(name);
      AlignedBuffer memory(value.size);
      const DeviceBytes bytes{host_device(), memory.data(), value.size};
      try {
        if (writes) {
          test::fill_pattern(memory.bytes(), value.fill);
          if (!keeps_old) stored.erase(name);
          put(name, bytes).wait(kHang);
          stored[name] = value;
        } else {
          get(name, bytes).wait(kHang);
          note(test::holds_pattern(memory.bytes(), value.fill), "wrong bytes");
        }
      } catch (const IoError&) {
        ++errors_;
      } catch (const std::exception& error) {
        note(false, error.what());
      }
    }
  }

  void note(bool held, const std::string& what) {
    if (held) return;
    std::lock_guard lock(mutex_);
    if (wrong_.empty()) wrong_ = what;
  }

  const std::uint64_t seed_;
  const std::string engine_;
  const test::TempDir directory_;
  const std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
  std::atomic<std::size_t> errors_ = 0;
  std::mutex mutex_;
  std::string wrong_;
};

class RandomFaults : public testing::TestWithParam<const char*> {};

TEST_P(RandomFaults, LeaveEveryValueThatWasWrittenAsItWas) {
  const std::string engine = GetParam();
  const std::string reason = engine_unavailable_reason(engine);
  if (!reason.empty()) GTEST_SKIP() << reason;
  const char* wanted = std::getenv("TORCH_EXT_TEST_SEED");
  const std::uint64_t first = wanted != nullptr
                                  ? std::strtoull(wanted, nullptr, 0)
                                  : std::random_device()() % 1'000'000'000;
  const std::size_t seeds = wanted != nullptr    ? 1
                            : test::all_faults() ? 2000
                                                 : 25;
  std::printf("[  SEEDS   ] %s: %zu from %llu on\n", engine.c_str(), seeds,
              static_cast<unsigned long long>(first));
  test::Tally tally;
  test::Jobs jobs;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    const std::string name = "TORCH_EXT_TEST_SEED=" + std::to_string(seed);
    jobs.add(name, [=, &tally] {
      Schedule schedule(seed, engine);
      const std::string wrong = schedule.run();
      tally.add(name, schedule.errors(), wrong);
      return false;
    });
  }
  jobs.run(8);
  std::printf("[  FAULTS  ] %s: %s\n", engine.c_str(),
              tally.text("schedules of 120 operations").c_str());
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_EQ(tally.trials(), seeds);
}

INSTANTIATE_TEST_SUITE_P(Engines, RandomFaults,
                         testing::Values("libaio", "io_uring", "threads",
                                         "memory"),
                         [](const auto& info) {
                           return std::string(info.param);
                         });

}  // namespace
}  // namespace torch_ext
