// Random calls of a Pager, and of what may befall them, against a model that
// knows every byte of every unit. After each call the pager is looked into. A
// failure prints its seed, and so does a hang: TORCH_EXT_TEST_SEED=N makes the
// same calls again.

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
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <shared_mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "paging/pager_impl.h"
#include "support/failing_new.h"
#include "support/faulty_engine.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

/// Looks into a pager.
struct PagerProbe {
  /// What is not as pager.cpp has it; else empty. At any time, while no call
  /// runs. `pins` are those of operators that have not ended.
  static std::string wrong(const Pager& pager, std::size_t pins) {
    Pager::Impl& impl = *pager.impl_;
    using State = Pager::Impl::State;
    const MutexLock lock(impl.mutex_);
    std::uint64_t end = 0, in_use = 0, resident = 0;
    for (const auto& [begin, unit] : impl.by_place_) {
      const std::string name = "unit " + std::to_string(unit->number);
      if (begin < end) return name + " overlaps another";
      if (begin != unit->run) return name + " is elsewhere";
      if (unit->state == State::kAway) return name + " is away and has a run";
      end = begin + unit->room;
      in_use += unit->room;
    }
    if (end > impl.arena_.size()) return "a run beyond the end of memory";
    if (in_use != impl.arena_.in_use()) return "memory is counted wrongly";
    std::size_t here = 0, in_flight = 0;
    for (const auto& unit : impl.units_) {
      if (unit == nullptr) continue;
      const std::string name = "unit " + std::to_string(unit->number);
      if (unit->wanted + unit->claimed > 0) return name + " is wanted";
      if (unit->writers > unit->pins) return name + " has too many writers";
      if (unit->blank && (!unit->here() || unit->writers == 0)) {
        return name + " has no bytes";
      }
      if (unit->state != State::kAway) ++here;
      const bool moves =
          unit->state == State::kReading || unit->state == State::kWriting;
      in_flight += moves ? 1U : 0U;
      if (unit->dirty && !unit->here()) return name + " is lost";
      if (unit->resident) resident += unit->room;
    }
    if (stalled_wrongly(impl)) return "room that is not read ahead into";
    if (here != impl.by_place_.size()) return "a run without its unit";
    if (in_flight != impl.in_flight_) return "transfers are counted wrongly";
    if (resident != impl.resident_bytes_) return "residents counted wrongly";
    if (pins != impl.operator_pins_) return "pins are counted wrongly";
    if (impl.turn_taken_ || impl.without_room_ > 0 || impl.waiters_ > 0) {
      return "somebody waits who has gone";
    }
    return "";
  }

  /// With impl.mutex_ held.
  static bool stalled_wrongly(Pager::Impl& impl) UNCHECKED_THREADS {
    const auto& stall = impl.stall_;
    if (!stall.known || !stall.loosened.empty()) return false;
    for (const auto& unit : impl.units_) {
      if (unit == nullptr || unit->room < stall.room) continue;
      if (unit->state != Pager::Impl::State::kAway) continue;
      const Pager::Impl::Search search{.rule = Pager::Impl::Rule::kAhead,
                                       .ahead = stall.ahead};
      if (impl.find_hole(*unit, search)) return true;
    }
    return false;
  }

  static bool idle(const Pager& pager) {
    const MutexLock lock(pager.impl_->mutex_);
    return pager.impl_->in_flight_ == 0;
  }
};

namespace {

using test::Fault;
using test::FaultScript;
using Unit = Pager::Unit;
using Touch = Pager::Touch;
using Touches = std::vector<Touch>;

constexpr std::uint64_t kBlock = 4096;
constexpr Unit kGone = ~Unit{0};

/// What while_waiting throws.
struct Interrupt : std::runtime_error {
  Interrupt() : std::runtime_error("interrupted") {}
};

/// Bytes of pattern `seed`; zeros if it is 0.
bool holds(std::span<const std::byte> bytes, std::uint64_t seed) {
  if (seed > 0) return test::holds_pattern(bytes, seed);
  return std::ranges::all_of(bytes,
                             [](std::byte b) { return b == std::byte{0}; });
}

std::uint64_t padded(std::uint64_t bytes) {
  return (bytes + kBlock - 1) / kBlock * kBlock;
}

/// A random pager on an engine that fails as it is told.
class Machine {
 public:
  explicit Machine(std::uint64_t seed) : random(seed) {
    script_->shuffle(seed);
    script_->set_plan([this](std::size_t index, const IoRequest& request) {
      const auto dice =
          std::bit_cast<std::uint64_t>(test::pattern_word(7, index)) >> 8;
      const bool write = request.op == IoRequest::Op::kWrite;
      if ((write ? write_fails : read_fails) && dice % 4 == 0) {
        return Fault::fail(EIO);
      }
      if (dice % 3 == 0) std::this_thread::yield();
      return Fault();
    });
  }

  void make(std::uint64_t memory) {
    StoreOptions options;
    options.directory =
        draw(3) == 0 ? DirectoryList({{first_.path(), 1}, {second_.path(), 1}})
                     : DirectoryList(first_.path());
    options.aio.block_size = kBlock;
    options.aio.queue_depth = 1 + static_cast<int>(draw(6));
    options.engine_factory = test::faulty_factory("memory", script_);
    pager.emplace(PagerOptions{.store = std::make_shared<Store>(options),
                               .memory = memory,
                               .while_waiting = [this] { wait(); }});
  }

  std::size_t draw(std::size_t below) { return random() % below; }

  void wait() {
    std::size_t left = interrupts;
    while (left > 0 && !interrupts.compare_exchange_weak(left, left - 1)) {
    }
    if (left == 1) throw Interrupt();
  }

  void no_faults() {
    interrupts = 0;
    read_fails = write_fails = false;
    while (!PagerProbe::idle(*pager)) std::this_thread::yield();
  }

  std::mt19937_64 random;
  std::atomic<bool> read_fails = false, write_fails = false;
  /// So many waits from now on one is interrupted; 0: none is.
  std::atomic<std::size_t> interrupts = 0;
  std::optional<Pager> pager;

 private:
  const test::TempDir first_, second_;
  const std::shared_ptr<FaultScript> script_ = std::make_shared<FaultScript>();
};

/// One seed's calls, on one thread.
class Schedule {
 public:
  explicit Schedule(std::uint64_t seed) : machine_(seed), calm_(draw(3) == 0) {
    const std::size_t blocks = 1 + draw(4);
    std::vector<std::uint64_t> sizes(2 + draw(14));
    std::uint64_t sum = 0, largest = 0;
    for (std::uint64_t& bytes : sizes) {
      bytes = draw(4) == 0 ? 1 + draw(64) : 1 + draw(blocks * kBlock);
      sum += padded(bytes);
      largest = std::max(largest, padded(bytes));
    }
    memory_ = largest + draw((sum - largest) / kBlock + 3) * kBlock;
    machine_.make(memory_);
    for (const std::uint64_t bytes : sizes) {
      pager().add(bytes, "unit");
      model_.push_back({.bytes = bytes});
    }
    plan();
  }

  std::string run() {
    const std::size_t calls = 20 + draw(60);
    for (std::size_t i = 0; i < calls && wrong_.empty(); ++i) {
      call();
      look();
    }
    release_held();
    machine_.no_faults();
    for (Unit unit = 0; unit < model_.size() && wrong_.empty(); ++unit) {
      if (model_[unit].exists) pin({{unit}}, 9);
    }
    return wrong_.empty() ? "" : wrong_ + " after" + trace_;
  }
  std::size_t errors() const { return errors_; }
  std::size_t touches() const { return touches_; }

 private:
  struct Modelled {
    std::uint64_t bytes = 0;
    std::uint64_t content = 0;  ///< Seed of the bytes; 0: all are 0.
    bool exists = true;
    std::size_t pins = 0;
  };
  using Held = std::pair<Pager::Pins, Touches>;

  std::size_t draw(std::size_t below) { return machine_.draw(below); }
  Pager& pager() { return *machine_.pager; }

  void expect(bool held, const std::string& what) {
    if (!held && wrong_.empty()) wrong_ = what;
  }

  void look() {
    const std::string wrong = PagerProbe::wrong(pager(), pins_);
    expect(wrong.empty(), wrong);
  }

  Unit some_unit() {
    for (;;) {
      const auto unit = static_cast<Unit>(draw(model_.size()));
      if (model_[unit].exists) return unit;
    }
  }

  Access some_access() {
    return draw(2) == 0   ? Access::kRead
           : draw(3) == 0 ? Access::kReplace
                          : Access::kWrite;
  }

  Touches some_touches(std::size_t most) {
    Touches touches;
    for (std::size_t i = draw(most); i < most; ++i) {
      touches.push_back({some_unit(), some_access()});
    }
    return touches;
  }

  /// What is touched in each round: there and back, one way or in any order.
  void plan() {
    plan_.clear();
    for (Unit unit = 0; unit < model_.size(); ++unit) {
      if (model_[unit].exists) plan_.push_back({{unit, some_access()}});
    }
    const std::size_t kind = draw(3);
    if (kind == 0) std::ranges::shuffle(plan_, machine_.random);
    if (kind == 1) {
      for (std::size_t i = plan_.size(); i-- > 0;) {
        plan_.push_back({{plan_[i][0].unit, some_access()}});
      }
    }
    for (Touches& touches : plan_) {
      if (draw(4) == 0) touches.push_back({some_unit(), some_access()});
    }
  }

  void call() {
    switch (draw(18)) {
      case 0:
        return add(1 + draw(std::min<std::uint64_t>(memory_, 4 * kBlock)));
      case 1:
        return remove();
      case 2:
        return flush();
      case 3:
        return draw(2) == 0 ? plan() : begin_round();
      case 4:
        return faults();
      case 5:
        return hold();
      case 6:
        return release_held();
      case 7:
      case 8:
      case 9:
        return pin(some_touches(6), 0);
      case 10:
        machine_.interrupts = calm_ ? 0 : 1 + draw(4);
        pin(some_touches(4), 0);
        machine_.interrupts = 0;
        return;
      default:
        return round();
    }
  }

  void faults() {
    trace_ += " faults";
    machine_.no_faults();
    machine_.read_fails = !calm_ && draw(3) == 0;
    machine_.write_fails = !calm_ && draw(3) == 0;
  }

  void begin_round() {
    tried(" begin_round", [&] { pager().begin_round(); });
  }

  void round() {
    if (draw(8) > 0) begin_round();
    for (const Touches& touches : plan_) {
      const bool gone = std::ranges::any_of(touches, [&](const Touch& touch) {
        return !model_[touch.unit].exists;
      });
      if (gone || draw(20) == 0) continue;
      for (std::size_t times = draw(20) == 0 ? 2 : 1; times > 0; --times) {
        pin(touches, 0);
        if (!wrong_.empty()) return;
      }
      if (draw(40) == 0) pin(some_touches(2), 0);
    }
  }

  void add(std::uint64_t bytes) {
    bytes = std::min(bytes, memory_);
    Unit unit = 0;
    if (!tried(" add(" + std::to_string(bytes) + ")",
               [&] { unit = pager().add(bytes, "unit"); })) {
      return;
    }
    expect(unit == model_.size(), "a number that is not new");
    model_.push_back({.bytes = bytes});
  }

  void remove() {
    const auto living = std::ranges::count(model_, true, &Modelled::exists);
    if (living < 3) return;
    const Unit unit = some_unit();
    trace_ += " remove(" + std::to_string(unit) + ")";
    try {
      pager().remove(unit);
      expect(model_[unit].pins == 0, "a unit that is pinned was removed");
      model_[unit].exists = false;
    } catch (const StateError&) {
      expect(model_[unit].pins > 0, "a unit that is not pinned is in use");
    }
  }

  void flush() {
    tried(" flush", [&] { pager().flush(); });
  }

  void hold() {
    if (held_.size() > 1) return;
    Touches touches = some_touches(2);
    std::optional<Pager::Pins> pins;
    if (!pinned(touches, /*held=*/true, pins)) return;
    use(touches, *pins);
    held_.emplace_back(std::move(*pins), touches);
  }

  void release_held() {
    trace_ += " release";
    for (auto& [pins, touches] : held_) {
      compare(touches, pins);
      count(touches, -1);
    }
    held_.clear();
  }

  /// Pins them, compares and changes them. While they are pinned, so many
  /// others may be: 3 - depth.
  void pin(Touches touches, std::size_t depth) {
    std::optional<Pager::Pins> pins;
    const std::size_t size = touches.size();
    if (!pinned(touches, /*held=*/false, pins)) return;
    pins_ += size;
    use(touches, *pins);
    if (wrong_.empty() && depth < 3 && draw(5) == 0) {
      look();
      draw(6) == 0 ? flush() : pin(some_touches(3), depth + 1);
      compare(touches, *pins);
    }
    count(touches, -1);
    pins_ -= size;
    const test::FailingNew failing(draw(3));
    pins.reset();
  }

  void count(const Touches& touches, int by) {
    for (const auto& [unit, access, forward] : touches) {
      if (unit != kGone) model_[unit].pins += static_cast<std::size_t>(by);
    }
  }

  bool pinned(const Touches& touches, bool held,
              std::optional<Pager::Pins>& pins) {
    touches_ += touches.size();
    std::set<Unit> units;
    for (const Touch& touch : touches) units.insert(touch.unit);
    std::uint64_t needed = 0, others = 0;
    for (Unit unit = 0; unit < model_.size(); ++unit) {
      const std::uint64_t room = padded(model_[unit].bytes);
      if (units.contains(unit)) needed += room;
      if (!units.contains(unit) && model_[unit].pins > 0) others += room;
    }
    bool own = false;  // Some of them are pinned, and cannot be moved.
    for (const Unit unit : units) own = own || model_[unit].pins > 0;
    std::string name = held ? " hold(" : " pin(";
    for (const auto& [unit, access, forward] : touches) {
      name += std::to_string(unit) + "rwx"[static_cast<int>(access)] + ",";
    }
    try {
      const bool went = tried(name + ")", [&] {
        pins = held ? pager().hold(touches) : pager().pin(touches);
      });
      if (!went) return false;
      expect(needed + others <= memory_, "more than there is");
      count(touches, 1);
      return true;
    } catch (const BudgetError& error) {
      trace_ += " refused";
      expect(needed + others > memory_ || others > 0 || own,
             std::string("refused though it fits: ") + error.what());
      ++errors_;
      return false;
    }
  }

  void compare(const Touches& touches, const Pager::Pins& pins) {
    for (std::size_t i = 0; i < touches.size(); ++i) {
      if (touches[i].unit == kGone) continue;
      const Modelled& unit = model_[touches[i].unit];
      expect(holds({pins.data(i), unit.bytes}, unit.content),
             "wrong bytes in unit " + std::to_string(touches[i].unit));
    }
  }

  void use(Touches& touches, Pager::Pins& pins) {
    // One touch may read what another one replaces.
    for (std::size_t i = 0; i < touches.size(); ++i) {
      const auto& [number, access, forward] = touches[i];
      if (access == Access::kReplace) continue;
      expect(
          holds({pins.data(i), model_[number].bytes}, model_[number].content),
          "wrong bytes in unit " + std::to_string(number));
    }
    if (draw(6) == 0) undo_replaced(touches, pins);
    for (std::size_t i = 0; i < touches.size(); ++i) {
      const auto& [number, access, forward] = touches[i];
      if (access == Access::kRead || number == kGone) continue;
      model_[number].content = ++contents_;
      test::fill_pattern({pins.data(i), model_[number].bytes}, contents_);
    }
  }

  /// Half of it is replaced, and then that fails.
  void undo_replaced(Touches& touches, Pager::Pins& pins) {
    trace_ += " undo";
    for (std::size_t i = 0; i < touches.size(); ++i) {
      if (touches[i].access != Access::kReplace) continue;
      const std::uint64_t bytes = model_[touches[i].unit].bytes;
      test::fill_pattern({pins.data(i), (bytes + 1) / 2}, 77);
    }
    if (draw(3) == 0) flush();
    pins.undo_replaced();
    for (std::size_t i = 0; i < touches.size(); ++i) {
      try {
        pins.data(i);
      } catch (const std::invalid_argument&) {
        trace_ += "ne";
        --model_[touches[i].unit].pins;
        touches[i].unit = kGone;
      }
    }
    look();
  }

  /// Whether the call went well. A BudgetError leaves it.
  template <typename Function>
  bool tried(const std::string& name, Function function) {
    trace_ += name;
    const bool no_memory = !calm_ && draw(12) == 0;
    const std::size_t good = draw(12);
    try {
      if (no_memory) {
        const test::FailingNew failing(good);
        function();
      } else {
        function();
      }
      return true;
    } catch (const IoError& error) {
      expect(error.error() == EIO, error.what());
      expect(machine_.read_fails || machine_.write_fails,
             "an error of nothing");
    } catch (const Interrupt&) {
      machine_.interrupts = 0;
    } catch (const std::bad_alloc&) {
    } catch (const BudgetError&) {
      throw;
    } catch (const std::exception& error) {
      expect(false, error.what());
    }
    ++errors_;
    trace_ += " failed";
    return false;
  }

  Machine machine_;
  const bool calm_;  ///< Nothing befalls them.
  std::uint64_t memory_ = 0;
  std::vector<Modelled> model_;
  std::vector<Touches> plan_;
  std::vector<Held> held_;
  std::size_t pins_ = 0;  ///< Those of operators.
  std::uint64_t contents_ = 0;
  std::size_t errors_ = 0;
  std::size_t touches_ = 0;
  std::string wrong_;
  std::string trace_;
};

/// One seed's calls, on three threads. Each reads all units and changes its
/// own. Nobody looks at bytes while they are changed, but all may pin them.
class Crowd {
 public:
  explicit Crowd(std::uint64_t seed) : seed_(seed), machine_(seed) {
    for (std::size_t i = 0; i < 3 * kOwn; ++i) {
      sizes_[i] = 1 + machine_.draw(3 * kBlock);
      memory_ += padded(sizes_[i]);
    }
    // What one thread pins at once fits.
    memory_ = std::max(memory_ / (1 + machine_.draw(4)), 10 * kBlock);
    machine_.make(memory_);
    for (std::size_t i = 0; i < 3 * kOwn; ++i) {
      slots_[i].unit = machine_.pager->add(sizes_[i], "unit");
    }
  }

  std::string run() {
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < kThreads; ++i) {
      threads.emplace_back([this, i] { Member(*this, i).run(); });
    }
    for (std::thread& thread : threads) thread.join();
    machine_.no_faults();
    const std::string wrong = PagerProbe::wrong(*machine_.pager, 0);
    expect(wrong.empty(), wrong);
    for (std::size_t i = 0; i < 3 * kOwn; ++i) {
      const Touch touch{slots_[i].unit};
      const Pager::Pins pins = machine_.pager->pin({&touch, 1});
      expect(holds({pins.data(0), sizes_[i]}, slots_[i].content),
             "wrong bytes at the end");
    }
    return wrong_;
  }
  std::size_t errors() const { return errors_; }
  std::size_t touches() const { return touches_; }

 private:
  static constexpr std::size_t kThreads = 3;
  static constexpr std::size_t kOwn = 4;

  struct Slot {
    std::atomic<Unit> unit = 0;
    std::shared_mutex mutex;  ///< Guards the bytes, and
    std::uint64_t content = 0;
  };

  /// One of the threads.
  class Member {
   public:
    Member(Crowd& crowd, std::size_t number)
        : its_(crowd), number_(number), random_(3 * crowd.seed_ + number) {}

    void run() {
      for (int i = 0; i < 60 && its_.fine(); ++i) {
        switch (draw(20)) {
          case 0:
            tried(false, [&] { pager().begin_round(); });
            break;
          case 1:
            tried(false, [&] { pager().flush(); });
            break;
          case 2:
            renew();
            break;
          case 3:
            its_.machine_.read_fails = draw(4) == 0;
            its_.machine_.write_fails = draw(4) == 0;
            break;
          case 4:
            its_.machine_.interrupts = draw(3);
            break;
          case 5:
          case 6:
          case 7:
          case 8:
          case 9:
            change(0);
            break;
          default:
            read(0);
        }
      }
    }

   private:
    std::size_t draw(std::size_t below) { return random_() % below; }
    Pager& pager() { return *its_.machine_.pager; }
    Slot& own() { return its_.slots_[number_ * kOwn + draw(kOwn)]; }
    Slot& any() { return its_.slots_[draw(3 * kOwn)]; }

    void read(std::size_t depth) {
      std::vector<Slot*> slots;
      Touches touches;
      for (std::size_t i = draw(3); i < 3; ++i) {
        slots.push_back(&any());
        touches.push_back({slots.back()->unit});
      }
      std::optional<Pager::Pins> pins;
      if (!tried(depth > 0, [&] { pins = pager().pin(touches); })) return;
      its_.touches_ += touches.size();
      for (std::size_t i = 0; i < touches.size(); ++i) {
        compare(*slots[i], touches[i].unit, pins->data(i));
      }
      if (depth < 2 && draw(4) == 0)
        draw(2) == 0 ? read(depth + 1) : change(depth + 1);
    }

    void compare(Slot& slot, Unit unit, const std::byte* data) {
      const std::shared_lock lock(slot.mutex, std::try_to_lock);
      if (!lock.owns_lock() || slot.unit != unit) return;
      its_.expect(holds({data, pager().bytes(unit)}, slot.content),
                  "wrong bytes in unit " + std::to_string(unit));
    }

    /// Holds the lock while it is in pin(), for the bytes may be undefined from
    /// then on. Nobody waits for such a lock while something is pinned.
    void change(std::size_t depth) {
      Slot& slot = own();
      const std::unique_lock lock(slot.mutex, std::try_to_lock);
      if (!lock.owns_lock()) return;
      const Touch touches[] = {
          {slot.unit, draw(2) == 0 ? Access::kReplace : Access::kWrite},
          {any().unit}};
      const bool alone = draw(2) == 0;
      std::optional<Pager::Pins> pins;
      if (!tried(depth > 0, [&] {
            pins = pager().pin({touches, alone ? 1U : 2U});
          })) {
        return;
      }
      its_.touches_ += 2;
      const std::span bytes(pins->data(0), pager().bytes(slot.unit));
      if (touches[0].access == Access::kWrite) {
        its_.expect(holds(bytes, slot.content), "wrong bytes to change");
      }
      const std::uint64_t content = ++its_.contents_;
      test::fill_pattern(bytes, content);
      if (touches[0].access == Access::kReplace && draw(4) == 0) {
        pins->undo_replaced();
        try {
          pins->data(0);
        } catch (const std::invalid_argument&) {
          return;
        }
      }
      slot.content = content;
    }

    /// Another unit in the place of one.
    void renew() {
      Slot& slot = own();
      const std::unique_lock lock(slot.mutex, std::try_to_lock);
      if (!lock.owns_lock()) return;
      const std::uint64_t bytes = pager().bytes(slot.unit);
      try {
        pager().remove(slot.unit);
      } catch (const StateError&) {
        return;
      }
      slot.content = 0;
      slot.unit = pager().add(bytes, "unit");
    }

    template <typename Function>
    bool tried(bool nested, Function function) {
      try {
        function();
        return true;
      } catch (const IoError& error) {
        its_.expect(error.error() == EIO, error.what());
      } catch (const BudgetError& error) {
        its_.expect(nested, error.what());
      } catch (const Interrupt&) {
      } catch (const std::invalid_argument&) {
        // It has been renewed.
      } catch (const std::exception& error) {
        its_.expect(false, error.what());
      }
      ++its_.errors_;
      return false;
    }

    Crowd& its_;
    const std::size_t number_;
    std::mt19937_64 random_;
  };

  void expect(bool held, const std::string& what) {
    if (held) return;
    const std::lock_guard lock(mutex_);
    if (wrong_.empty()) wrong_ = what;
  }
  bool fine() const {
    const std::lock_guard lock(mutex_);
    return wrong_.empty();
  }

  const std::uint64_t seed_;
  Machine machine_;
  std::uint64_t memory_ = 0;
  std::uint64_t sizes_[3 * kOwn] = {};
  Slot slots_[3 * kOwn];
  std::atomic<std::uint64_t> contents_ = 0;
  std::atomic<std::size_t> errors_ = 0;
  std::atomic<std::size_t> touches_ = 0;
  mutable std::mutex mutex_;
  std::string wrong_;
};

std::uint64_t first_seed() {
  const char* wanted = std::getenv("TORCH_EXT_TEST_SEED");
  return wanted != nullptr ? std::strtoull(wanted, nullptr, 0)
                           : std::random_device()() % 1'000'000'000;
}

/// Runs `Trial(seed).run()` for so many seeds, or for that which is wanted.
template <typename Trial>
void try_seeds(std::size_t seeds, std::size_t threads) {
  if (std::getenv("TORCH_EXT_TEST_SEED") != nullptr) seeds = 1;
  const std::uint64_t first = first_seed();
  std::printf("[  SEEDS   ] %zu from %llu on\n", seeds,
              static_cast<unsigned long long>(first));
  test::Tally tally;
  test::Jobs jobs;
  std::atomic<std::size_t> touches = 0;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    const std::string name = "TORCH_EXT_TEST_SEED=" + std::to_string(seed);
    jobs.add(name, [=, &tally, &touches] {
      Trial trial(seed);
      const std::string wrong = trial.run();
      tally.add(name, trial.errors(), wrong);
      touches += trial.touches();
      return false;
    });
  }
  jobs.run(threads, std::chrono::seconds(30));
  std::printf("[  FAULTS  ] %s, %zu touches\n",
              tally.text("schedules of calls").c_str(), touches.load());
  for (const std::string& broken : tally.broken()) ADD_FAILURE() << broken;
  EXPECT_EQ(tally.trials(), seeds);
}

TEST(PagerFaults, NoOrderOfCallsLosesAByteOrRefusesWhatFits) {
  try_seeds<Schedule>(test::all_faults() ? 8000
                      : test::kSanitized ? 60
                                         : 200,
                      2);
}

TEST(PagerFaults, NoOrderOfThreadsLosesAByteOrBlocksThem) {
  try_seeds<Crowd>(test::all_faults() ? 4000 : test::kSanitized ? 30 : 80, 2);
}

}  // namespace
}  // namespace torch_ext
