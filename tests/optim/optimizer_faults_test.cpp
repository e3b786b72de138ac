#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>

#include "support/child.h"
#include "support/faulty_engine.h"
#include "support/scalar_adamw.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::FaultScript;
using test::FunctionKernel;
using test::ScalarAdamW;

constexpr std::uint64_t kKiB = 1024;
constexpr std::uint64_t kThreeBuffers = 192 * kKiB;
constexpr std::size_t kPerTile = 8192;

class OptimizerFaultsTest : public testing::Test {
 protected:
  TileOptions options() {
    TileOptions options;
    options.store.directory = temp_.path();
    options.store.aio.block_size = 64 * kKiB;  // A tile is one request.
    options.store.aio.queue_depth = 2;
    options.store.engine_factory = [this](int depth) {
      return std::make_unique<test::FaultyEngine>(memory_(depth), script_);
    };
    options.host_memory = kThreeBuffers;
    return options;
  }

  test::TempDir temp_;
  IoEngineFactory memory_ = make_engine_factory("memory");
  std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

// The text of the error that `call` throws; empty if it throws none.
template <typename Error>
std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Brings both ways of keeping the state to the same: some values, 3 steps.
void load(OptimizerOffload& offload, ScalarAdamW& adamw) {
  std::vector<OptimizerOffload::ParameterStep> all;
  for (std::size_t i = 0; i < adamw.parameters.size(); ++i) {
    test::ScalarParameter& p = adamw.parameters[i];
    p.expected = p.weights;
    p.step = 3;
    all.push_back({i, 3});
  }
  FunctionKernel fill([&](const StateSegment& segment) {
    test::ScalarParameter& p = adamw.parameters[segment.parameter];
    for (std::uint64_t i = 0; i < segment.count; ++i) {
      const auto value = static_cast<float>(i % 7);
      segment.field(0)[i] = p.m[segment.first + i] = value;
      segment.field(1)[i] = p.v[segment.first + i] = value * value;
    }
  });
  offload.write_state(all, fill);
}

// Either nothing has changed, and the call can be made again, or no step is
// made before a state is loaded.
TEST_F(OptimizerFaultsTest, EveryFailedTransferIsReportedAndNeverHalfUsed) {
  FunctionKernel look([](const StateSegment&) {});
  const std::vector<std::size_t> all = {0, 1};
  for (const int error : {EIO, ENOSPC}) {
    int refused = 0, made_again = 0, not_needed = 0;
    for (std::size_t index = 0;; ++index) {
      script_ =
          std::make_shared<FaultScript>(test::only(index, Fault::fail(error)));
      OptimizerOffload offload(options());
      ScalarAdamW adamw(offload);
      adamw.add(4 * kPerTile + 77);
      adamw.add(40);
      int steps = 0;
      const auto again = [&] {
        if (steps == 3) return offload.read_state(look);
        offload.step(all, adamw);
        ++steps;
      };
      const std::string first = error_of<IoError>([&] {
        while (steps < 3) {
          for (const std::size_t number : all) adamw.prepare(number);
          again();
        }
        again();  // The last step's writes are seen here.
      });
      if (first.empty()) {
        EXPECT_TRUE(adamw.equal());
        if (script_->requests() <= index) break;
        ++not_needed;  // What failed ahead of a step was read in it.
        continue;
      }
      EXPECT_TRUE(contains(first, errno_name(error))) << first;
      EXPECT_TRUE(contains(first, "[scratch]")) << first;
      const std::string second = error_of<IoError>(again);
      if (second.empty()) {
        ++made_again;
      } else {
        ++refused;
        EXPECT_TRUE(contains(second, errno_name(error))) << second;
        EXPECT_TRUE(contains(second, "load it anew")) << second;
        EXPECT_THROW(offload.add_state({}), IoError);
        load(offload, adamw);
      }
      for (int step = 0; step < 3; ++step) adamw.step_all();
      EXPECT_TRUE(adamw.equal()) << index;
      offload.close();
    }
    EXPECT_GT(refused, 10);
    EXPECT_GT(made_again + not_needed, 3);
  }
}

TEST_F(OptimizerFaultsTest, AFailedLookAtTheStateLeavesItAsItWas) {
  for (const std::uint64_t buffers : {3u, 5u, 16u}) {  // None, some, all stay.
    TileOptions with = options();
    with.host_memory = buffers * 64 * kKiB;
    with.tile_bytes = 64 * kKiB;
    for (const bool kernel : {false, true}) {
      script_->set_plan(nullptr);
      OptimizerOffload offload(with);
      ScalarAdamW adamw(offload);
      adamw.add(4 * kPerTile + 77);
      adamw.add(2 * kPerTile);
      adamw.add(40);
      for (std::size_t index = 0; index < 5; ++index) {
        adamw.step({0, 2});  // What is expected next is not all there is.
        adamw.step_all();
        std::size_t looks = 0;
        FunctionKernel look([&](const StateSegment&) {
          if (kernel && looks++ == index) throw std::runtime_error("no room");
        });
        if (!kernel) {
          script_->set_plan([](std::size_t, const IoRequest& request) {
            return request.op == IoRequest::Op::kRead ? Fault::fail(EIO)
                                                      : Fault();
          });
        }
        const std::string text =
            error_of<std::runtime_error>([&] { offload.read_state(look); });
        script_->set_plan(nullptr);
        if (kernel) {
          EXPECT_EQ(text, "no room");
        } else if (buffers < 16) {
          EXPECT_TRUE(contains(text, "EIO")) << text;
        }
        FunctionKernel fine([](const StateSegment&) {});
        EXPECT_EQ(error_of<std::exception>([&] { offload.read_state(fine); }),
                  "");
        adamw.step({1});
        adamw.step_all();
        EXPECT_TRUE(adamw.equal());
      }
      EXPECT_NO_THROW(offload.close());
    }
  }
}

TEST_F(OptimizerFaultsTest, ARefusedStepSaysWhatFailedAndWhatToDo) {
  struct Case {
    Fault fault;
    std::string text;
  };
  for (const Case& c :
       {Case{Fault::fail(EIO),
             ": Input/output error (EIO); the optimizer state may be half "
             "updated: load it anew"},
        Case{Fault::cut(0),
             ": Input/output error (EIO); short transfers without progress; "
             "the optimizer state may be half updated: load it anew"}}) {
    script_ = std::make_shared<FaultScript>(test::from(0, c.fault));
    OptimizerOffload offload(options());
    ScalarAdamW adamw(offload);
    adamw.add(4 * kPerTile);
    EXPECT_NE(error_of<IoError>([&] {
                for (int step = 0; step < 3; ++step) adamw.step_all();
              }),
              "");
    const std::string text = error_of<IoError>([&] { adamw.step_all(); });
    EXPECT_TRUE(text.ends_with(c.text)) << text;
  }
}

TEST_F(OptimizerFaultsTest, AnErrorOfTheLastWritesIsTheNextCallsOrClosesOwn) {
  for (const bool close : {false, true}) {
    // There are four tiles, and three buffers. The last tile's write fails.
    auto tiles = std::make_shared<std::set<std::uint64_t>>();
    script_ = std::make_shared<FaultScript>(
        [tiles](std::size_t, const IoRequest& request) {
          Fault fault;
          if (request.op != IoRequest::Op::kWrite) return fault;
          tiles->insert((request.offset - Store::kHeadBytes) / (64 * kKiB));
          if (tiles->size() == 4) fault = Fault::fail(EIO);
          return fault;
        });
    OptimizerOffload offload(options());
    ScalarAdamW adamw(offload);
    adamw.add(4 * kPerTile);
    adamw.step_all();
    if (close) {
      EXPECT_THROW(offload.close(), IoError);
      EXPECT_NO_THROW(offload.close());
    } else {
      const auto deadline =
          std::chrono::steady_clock::now() + std::chrono::seconds(30);
      std::string text;
      FunctionKernel look([](const StateSegment&) {});
      while (text.empty() && std::chrono::steady_clock::now() < deadline) {
        text = error_of<IoError>([&] { offload.read_state(look); });
      }
      EXPECT_TRUE(contains(text, "EIO")) << text;
      // Reported once; the refusals that follow are no news.
      EXPECT_NO_THROW(offload.close());
    }
  }
}

TEST_F(OptimizerFaultsTest, AChangedByteOnDiskIsAnErrorAndNeverUsed) {
  std::size_t writes = 0;
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(5 * kPerTile);
  // Half of a write is lost, though the disk says that all is well.
  script_->set_plan([&writes](std::size_t, const IoRequest& request) {
    if (request.op == IoRequest::Op::kWrite && ++writes == 3) {
      std::fill_n(request.data, 100, std::byte{7});
    }
    return Fault();
  });
  const std::string text = error_of<IoError>([&] {
    for (int step = 0; step < 3; ++step) adamw.step_all();
  });
  EXPECT_TRUE(contains(text, "checksum")) << text;
}

TEST_F(OptimizerFaultsTest, AnErrorOfTheKernelLosesTheStateToo) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(5 * kPerTile);
  adamw.step_all();
  adamw.on_update = [&](std::span<const StateSegment>) {
    if (adamw.updates == 7) throw std::runtime_error("a kernel's error");
  };
  EXPECT_EQ(error_of<std::runtime_error>([&] { adamw.step_all(); }),
            "a kernel's error");
  const std::string text = error_of<StateError>([&] { adamw.step_all(); });
  EXPECT_TRUE(contains(text, "a kernel's error; the optimizer state may be"))
      << text;
  adamw.on_update = nullptr;
  load(offload, adamw);
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerFaultsTest, AFailedLoadLeavesTheStateLostUntilTheNext) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(5 * kPerTile);
  adamw.step_all();
  script_->set_plan([](std::size_t, const IoRequest& request) {
    return request.op == IoRequest::Op::kWrite ? Fault::fail(EIO) : Fault();
  });
  // The last write may fail after the call.
  const std::string text = error_of<IoError>([&] {
    load(offload, adamw);
    adamw.step_all();
    adamw.step_all();
  });
  EXPECT_TRUE(contains(text, "EIO")) << text;
  EXPECT_THROW(adamw.step_all(), IoError);
  script_->set_plan(nullptr);
  load(offload, adamw);
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerFaultsTest, NoSpaceForNewStateLeavesTheOldAsItWas) {
  EXPECT_EQ(test::in_child([this]() -> std::string {
              OptimizerOffload offload(options());
              ScalarAdamW adamw(offload);
              const std::size_t small = adamw.add(kPerTile);
              const std::size_t large = adamw.add(300 * kPerTile);
              adamw.step({small});
              if (!test::refuse_syscall(SYS_fallocate, ENOSPC)) return "";
              UpdateKernel& kernel = adamw;
              const std::vector<std::size_t> both = {small, large};
              const std::string text =
                  error_of<IoError>([&] { offload.step(both, kernel); });
              if (!contains(text, "ENOSPC")) return "no ENOSPC: " + text;
              if (offload.step_of(small) != 1) return "a step was counted";
              if (offload.has_state(large)) return "it has state";
              if (offload.stats().tiles != 1) return "tiles were left";
              adamw.step({small});
              return adamw.equal() ? "" : "not equal";
            }),
            "");
}

TEST_F(OptimizerFaultsTest, AForkedChildIsToldWhoseOptimizerItIs) {
  TileOptions with = options();
  with.store.engine_factory = nullptr;
  with.store.engine = "threads";
  auto offload = std::make_unique<OptimizerOffload>(with);
  ScalarAdamW adamw(*offload);
  adamw.add(5 * kPerTile);
  adamw.step_all();
  const std::string owner = "process " + std::to_string(getpid());
  const std::string in_child = test::in_child([&]() -> std::string {
    const std::vector<std::size_t> all = {0};
    for (const std::function<void()>& call : std::vector<std::function<void()>>{
             [&] { offload->step(all, adamw); },
             [&] { offload->read_state(adamw); },
             [&] { static_cast<void>(offload->stats()); },
             [&] { offload->close(); }}) {
      const std::string text = error_of<StateError>(call);
      if (!contains(text, owner)) return "not refused: " + text;
    }
    offload.reset();
    return "";
  });
  EXPECT_EQ(in_child, "");
  adamw.step_all();
  EXPECT_TRUE(adamw.equal());
}

TEST_F(OptimizerFaultsTest, AClosedOptimizerKeepsOnlyItsCounters) {
  OptimizerOffload offload(options());
  ScalarAdamW adamw(offload);
  adamw.add(5 * kPerTile);
  adamw.step_all();
  offload.close();
  offload.close();
  EXPECT_THROW(adamw.step_all(), StateError);
  EXPECT_THROW(offload.read_state(adamw), StateError);
  EXPECT_THROW(offload.add_parameter(1, StateFields::floats(2)), StateError);
  EXPECT_EQ(offload.stats().steps, 1u);
  EXPECT_EQ(offload.stats().bytes_written, 5 * 64 * kKiB);
  EXPECT_EQ(offload.step_of(0), 1u);
}

TEST_F(OptimizerFaultsTest, ItGoesAwayWithTransfersInFlight) {
  auto offload = std::make_unique<OptimizerOffload>(options());
  ScalarAdamW adamw(*offload);
  adamw.add(10 * kPerTile);
  script_->set_plan(test::from(9, Fault::held()));
  adamw.step_all();
  std::thread releases([this] { script_->release_all(); });
  offload.reset();
  releases.join();
}

}  // namespace
}  // namespace torch_ext
