// Random calls of an OptimizerOffload, and of what may befall them, against a
// model that knows every byte of the state. After each call the lanes are
// looked into. A failure prints its seed, and so does a hang:
// TORCH_EXT_TEST_SEED=N makes the same calls again.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "optim/optimizer_impl.h"
#include "support/faulty_engine.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {

/// Looks into the lanes.
struct OptimizerOffloadProbe {
  /// What is not as tile_lanes.h has it; else empty. At any time, while no call
  /// runs in another thread.
  static std::string wrong(OptimizerOffload& offload) {
    OptimizerOffload::Impl& impl = *offload.impl_;
    if (impl.lanes == nullptr) return "";
    TileLanes& lanes = *impl.lanes;
    const MutexLock lock(lanes.mutex_);
    std::size_t held = 0, in_flight = 0;
    for (const auto& tile : impl.tiles) {
      const std::string name = "tile " + std::to_string(tile->number);
      const bool holds = static_cast<bool>(tile->buffer);
      const bool moves = tile->state == Tile::State::kReading ||
                         tile->state == Tile::State::kWriting;
      held += holds ? 1U : 0U;
      in_flight += moves ? 1U : 0U;
      if (holds == (tile->state == Tile::State::kIdle)) {
        return name + (holds ? " is idle and holds a buffer"
                             : " is not idle and holds no buffer");
      }
      if (lanes.failure_ != nullptr) continue;  // All are let go of later.
      const auto& round = lanes.round_.tiles;
      const bool awaited = std::ranges::count(round, tile.get()) > 0;
      const bool stays = tile->resident && tile->in_memory;
      if (holds && !awaited && !stays && !moves) {
        return name + " is in no round and keeps a buffer";
      }
      if (tile->state == Tile::State::kReading && !awaited && !tile->unwanted) {
        return name + " is in no round and is read";
      }
    }
    if (held != impl.pool->in_use()) {
      return std::to_string(impl.pool->in_use()) + " buffers are out, tiles " +
             "hold " + std::to_string(held);
    }
    if (in_flight != lanes.in_flight_) return "transfers are counted wrongly";
    return "";
  }
};

namespace {

using test::Fault;
using test::FaultScript;

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint64_t kTile = 2 * kBlock;  // So that it lies on two drives.
constexpr std::size_t kPerTile = kTile / 8;  // Elements.
constexpr std::size_t kFields = 2;

/// What is thrown by a kernel.
struct KernelError : std::runtime_error {
  KernelError() : std::runtime_error("the kernel failed") {}
};

/// The state as it should be; as a kernel, it compares and changes it.
class Model final : public UpdateKernel {
 public:
  enum class Call { kStep, kRead, kFill };
  struct Parameter {
    std::size_t elements = 0;
    bool has_state = false;
    bool frozen = false;
    bool active = false;        ///< In the call that runs.
    std::uint64_t step = 0;     ///< This call's included.
    std::uint64_t content = 0;  ///< Seed of the bytes; 0: all are 0.
    std::uint64_t next = 0;     ///< As the call leaves it.
    std::size_t seen = 0;       ///< Elements, by the call.
  };

  void begin(Call call) {
    call_ = call;
    for (Parameter& p : parameters) {
      p.active = false;
      p.seen = 0;
    }
  }
  void activate(std::size_t number) {
    Parameter& p = parameters[number];
    p.active = true;
    p.next = call_ == Call::kRead ? p.content : ++contents_;
    if (call_ == Call::kStep) ++p.step;
  }
  /// The call went well.
  void end() {
    for (Parameter& p : parameters) {
      expect(p.seen == (p.active ? p.elements : 0), "elements left out");
      if (p.active) p.content = p.next;
    }
  }

  void update(std::span<const StateSegment> segments) override {
    if (fails_at_ > 0 && --fails_at_ == 0) throw KernelError();
    for (const StateSegment& segment : segments) {
      Parameter& p = parameters[segment.parameter];
      expect(p.active, "a parameter that takes no part");
      expect(segment.step == p.step, "a wrong number of steps");
      p.seen += segment.count;
      for (std::size_t field = 0; field < kFields; ++field) {
        const std::span bytes(segment.fields[field], segment.count * 4);
        const std::uint64_t offset = segment.first * 4;
        // New state is zeros.
        const std::uint64_t was = call_ == Call::kFill ? 0 : p.content;
        expect(was == 0
                   ? std::ranges::count(bytes, std::byte{0}) ==
                         static_cast<std::ptrdiff_t>(bytes.size())
                   : test::holds_pattern(bytes, was * kFields + field, offset),
               "wrong bytes");
        if (call_ == Call::kRead) continue;
        test::fill_pattern(bytes, p.next * kFields + field, offset);
      }
    }
  }

  /// So many calls of update() from now on one throws; 0: none does.
  void fail_at(std::size_t call) { fails_at_ = call; }
  /// Also called by the thread that updates.
  void expect(bool held, const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (!held && wrong_.empty()) wrong_ = what;
  }
  /// What was not as expected first.
  std::string wrong() const {
    const std::lock_guard lock(mutex_);
    return wrong_;
  }

  std::vector<Parameter> parameters;

 private:
  mutable std::mutex mutex_;
  std::string wrong_;
  Call call_ = Call::kStep;
  std::uint64_t contents_ = 0;
  std::size_t fails_at_ = 0;
};

/// One seed's calls.
class Schedule {
 public:
  explicit Schedule(std::uint64_t seed) : random_(seed) {
    script_->shuffle(seed);
    script_->set_plan([this](std::size_t index, const IoRequest&) {
      const auto dice = dice_of(index);
      if (failing_ && dice % 5 == 0) return Fault::fail(EIO);
      if (dice % 3 == 0) std::this_thread::yield();
      return Fault();
    });
    const std::size_t buffers[] = {3, 3, 3, 4, 6, 9, 11};
    TileOptions options;
    options.store.directory = draw(3) == 0 ? DirectoryList(two_drives())
                                           : DirectoryList(first_.path());
    options.store.aio.block_size = kBlock;
    options.store.aio.queue_depth = 4;
    options.store.engine_factory = test::faulty_factory("memory", script_);
    options.tile_bytes = kTile;
    options.host_memory = buffers[draw(std::size(buffers))] * kTile;
    offload_ = std::make_unique<OptimizerOffload>(options);
  }

  std::string run() {
    const std::size_t calls = 8 + draw(40);
    add();
    for (std::size_t i = 0; i < calls && model_.wrong().empty(); ++i) {
      call();
      look();
    }
    failing_ = false;
    close();
    const std::string wrong = model_.wrong();
    return wrong.empty() ? "" : wrong + " after" + trace_;
  }
  std::size_t errors() const { return errors_; }

 private:
  using Numbers = std::vector<std::size_t>;
  using Call = Model::Call;

  std::size_t draw(std::size_t below) { return random_() % below; }

  static std::uint64_t dice_of(std::uint64_t index) {
    return std::bit_cast<std::uint64_t>(test::pattern_word(7, index)) >> 8;
  }

  std::vector<WeightedDirectory> two_drives() const {
    return {{first_.path(), 1}, {second_.path(), 1}};
  }

  void look() {
    const std::string wrong = OptimizerOffloadProbe::wrong(*offload_);
    model_.expect(wrong.empty(), wrong);
  }

  /// Some of those for which `condition` holds, in any order.
  template <typename Condition>
  Numbers some(Condition condition) {
    Numbers numbers;
    const bool all = draw(3) == 0;
    for (std::size_t i = 0; i < model_.parameters.size(); ++i) {
      if (condition(model_.parameters[i]) && (all || draw(3) > 0)) {
        numbers.push_back(i);
      }
    }
    std::ranges::shuffle(numbers, random_);
    return numbers;
  }
  Numbers some_trained() {
    return some([](const Model::Parameter& p) { return !p.frozen; });
  }

  void call() {
    if (broken_) {
      draw(3) == 0 ? load() : refused();
      return;
    }
    switch (draw(16)) {
      case 0:
      case 1:
        return add();
      case 2:
        return freeze();
      case 3:
        return add_state();
      case 4:
      case 5:
        return read();
      case 6:
        return load();
      case 7:
        trace_ += " faults";
        failing_ = draw(2) == 0;
        return;
      case 8:
        model_.fail_at(1 + draw(6));
        draw(3) == 0 ? read() : draw(2) == 0 ? step() : open_step();
        return model_.fail_at(0);
      case 9:
      case 10:
      case 11:
        return step();
      default:
        return open_step();
    }
  }

  void add() {
    for (std::size_t i = draw(4); i < 4; ++i) {
      const std::size_t elements =
          draw(4) == 0 ? draw(300) : draw(3 * kPerTile);
      trace_ += " add(" + std::to_string(elements) + ")";
      model_.parameters.push_back({.elements = elements});
      offload_->add_parameter(elements, StateFields::floats(kFields));
    }
  }

  /// What was trained is no more, and the other way round.
  void freeze() {
    trace_ += " freeze";
    for (Model::Parameter& p : model_.parameters) {
      if (draw(2) == 0) p.frozen = !p.frozen;
    }
  }

  void add_state() {
    const Numbers numbers = some_trained();
    if (!tried("add_state", numbers, [&] { offload_->add_state(numbers); })) {
      return;  // It makes no transfer itself, so one that failed has lost
               // state.
    }
    for (const std::size_t i : numbers) model_.parameters[i].has_state = true;
  }

  void step() {
    const Numbers numbers = some_trained();
    model_.begin(Call::kStep);
    for (const std::size_t i : numbers) model_.activate(i);
    stepped("step", numbers, [&] { offload_->step(numbers, model_); });
  }

  void open_step() {
    const Numbers numbers = some_trained();
    model_.begin(Call::kStep);
    if (!tried("begin_step", {}, [&] { offload_->begin_step(model_); })) return;
    for (const std::size_t i : numbers) {
      model_.activate(i);  // The thread that updates looks at others.
      offload_->release(i);
      if (draw(4) == 0) std::this_thread::yield();
      look();
    }
    if (draw(12) == 0) {
      trace_ += " abandon_step";
      offload_->abandon_step();
      broken_ = true;
      return;
    }
    stepped("end_step", numbers, [&] { offload_->end_step(); });
  }

  template <typename Function>
  void stepped(const char* name, const Numbers& numbers, Function function) {
    if (tried(name, numbers, function)) {
      for (const std::size_t i : numbers) model_.parameters[i].has_state = true;
      model_.end();
    } else if (broken_) {
      return;
    } else {
      // All is as it was, but that state may have been made.
      for (const std::size_t i : numbers) {
        model_.parameters[i].has_state = offload_->has_state(i);
        --model_.parameters[i].step;
      }
    }
    for (const std::size_t i : numbers) {
      model_.expect(offload_->step_of(i) == model_.parameters[i].step,
                    "steps counted wrongly");
    }
  }

  void read() {
    model_.begin(Call::kRead);
    for (std::size_t i = 0; i < model_.parameters.size(); ++i) {
      if (model_.parameters[i].has_state) model_.activate(i);
    }
    if (tried("read_state", {}, [&] { offload_->read_state(model_); })) {
      model_.end();
    }
  }

  void load() {
    if (draw(4) > 0) failing_ = false;
    const bool may_fail = failing_;
    model_.begin(Call::kFill);
    std::vector<OptimizerOffload::ParameterStep> steps;
    const Numbers numbers = some([](const auto&) { return true; });
    for (Model::Parameter& p : model_.parameters) {
      p.has_state = false;
      p.content = p.step = 0;
    }
    for (const std::size_t i : numbers) {
      Model::Parameter& p = model_.parameters[i];
      p.step = draw(9);
      p.has_state = true;
      model_.activate(i);
      steps.push_back({i, p.step});
    }
    broken_ = false;
    if (tried("write_state", numbers,
              [&] { offload_->write_state(steps, model_); })) {
      model_.end();
    }
    model_.expect(may_fail || !broken_, "a load failed without a fault");
  }

  void refused() {
    for (const auto call : {0, 1, 2, 3}) {
      try {
        if (call == 0) offload_->step({}, model_);
        if (call == 1) offload_->read_state(model_);
        if (call == 2) offload_->add_state({});
        if (call == 3) offload_->begin_step(model_);
        model_.expect(false, "a call is not refused after a failure");
      } catch (const std::exception&) {
        ++errors_;
      }
    }
  }

  void close() {
    try {
      if (!model_.parameters.empty() && draw(4) == 0 && !broken_) {
        offload_->begin_step(model_);  // Closed in the middle of a step.
      }
      offload_->close();
    } catch (const std::exception&) {
      ++errors_;
    }
    offload_.reset();
  }

  /// Whether the call went well. If not, the state may be lost.
  template <typename Function>
  bool tried(const char* name, const Numbers& numbers, Function function) {
    trace_ += std::string(" ") + name + "(";
    for (const std::size_t i : numbers) trace_ += std::to_string(i) + ",";
    trace_ += ")";
    try {
      function();
      return true;
    } catch (const IoError& error) {
      model_.expect(error.error() == EIO, error.what());
    } catch (const KernelError&) {
    } catch (const std::exception& error) {
      model_.expect(false, error.what());
    }
    ++errors_;
    trace_ += " failed";
    broken_ = refuses();
    return false;
  }

  /// Whether calls are refused until a state is loaded.
  bool refuses() {
    try {
      offload_->add_state({});
      return false;
    } catch (const std::exception&) {
      return true;
    }
  }

  std::mt19937_64 random_;
  const test::TempDir first_, second_;
  const std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
  std::atomic<bool> failing_ = false;
  bool broken_ = false;
  std::size_t errors_ = 0;
  std::string trace_;
  Model model_;
  std::unique_ptr<OptimizerOffload> offload_;
};

TEST(TileLanesFaults, NoOrderOfCallsBlocksALaneOrLosesAByte) {
  const char* wanted = std::getenv("TORCH_EXT_TEST_SEED");
  const std::uint64_t first = wanted != nullptr
                                  ? std::strtoull(wanted, nullptr, 0)
                                  : std::random_device()() % 1'000'000'000;
  const std::size_t seeds = wanted != nullptr    ? 1
                            : test::all_faults() ? 20'000
                            : test::kSanitized   ? 150
                                                 : 400;
  std::printf("[  SEEDS   ] %zu from %llu on\n", seeds,
              static_cast<unsigned long long>(first));
  test::Tally tally;
  test::Jobs jobs;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    const std::string name = "TORCH_EXT_TEST_SEED=" + std::to_string(seed);
    jobs.add(name, [=, &tally] {
      Schedule schedule(seed);
      const std::string wrong = schedule.run();
      tally.add(name, schedule.errors(), wrong);
      return false;
    });
  }
  jobs.run(4, std::chrono::seconds(30));
  std::printf("[  FAULTS  ] %s\n", tally.text("schedules of calls").c_str());
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_EQ(tally.trials(), seeds);
}

}  // namespace
}  // namespace torch_ext
