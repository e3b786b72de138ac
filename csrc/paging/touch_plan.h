#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace torch_ext {

/// Foresees which unit is touched next. touch_plan.cpp tells how.
/// Threads: one at a time.
class TouchPlan {
 public:
  using Unit = std::uint32_t;
  static constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();

  /// A unit is touched. `forward`: in a forward pass, and only read. Returns by
  /// how many places the plan goes on: 0 if it stays where it is, kNever if it
  /// was set anew.
  std::size_t touch(Unit unit, bool forward = false);

  /// The touches begin anew, as with a forward pass. touch() notices that by
  /// itself.
  void begin_round();

  bool empty() const { return order_.empty(); }
  std::size_t size() const { return order_.size(); }
  /// The unit of the touch that comes after `ahead` others (< size()).
  Unit next(std::size_t ahead) const {
    return order_[(cursor_ + ahead) % order_.size()];
  }
  /// How many touches come before the unit's next one; 0 for the unit that was
  /// touched last. kNever if it is in no plan. Without a plan: the longer it
  /// has not been touched, the more.
  std::size_t distance(Unit unit) const;
  /// The units in the order of their first touch.
  std::vector<Unit> units() const;

  /// The unit that was touched last. It is no unit's number before the first.
  Unit last() const { return last_; }

  struct Counts {
    std::uint64_t touches = 0;   ///< Repeated ones count once.
    std::uint64_t foreseen = 0;  ///< Touches that the plan knew.
    std::uint64_t plans = 0;     ///< How often one was made.
  };
  const Counts& counts() const { return counts_; }

 private:
  std::size_t places_to(Unit unit) const;
  bool is_just_behind(Unit unit) const;
  bool begins_anew(Unit unit, bool forward) const;
  void end_round(std::size_t first, std::size_t end);

  /// A round of this many touches is not traced further.
  static constexpr std::size_t kLongest = std::size_t{1} << 22;
  /// So many touches of each unit, and no new round: begin to trace again.
  static constexpr std::size_t kLongRound = 8;
  /// A touch that comes so much earlier is still foreseen.
  static constexpr std::size_t kNear = 4;
  static constexpr Unit kNone = std::numeric_limits<Unit>::max();

  std::vector<Unit> trace_;  ///< This round, without repetitions.
  /// Where its first two touches of a forward pass are in the trace. kNever
  /// until they have come.
  std::size_t anchor_ = kNever;
  bool last_forward_ = false;  ///< Whether the last touch was one of those.
  std::vector<Unit> order_;    ///< The plan: a cycle.
  std::vector<std::vector<std::size_t>> places_;  ///< In order_, by unit.
  std::size_t cursor_ = 0;                        ///< The next place.
  Unit last_ = kNone;
  std::vector<std::uint64_t> touched_;  ///< When, by unit.
  std::uint64_t clock_ = 0;
  std::uint64_t round_touches_ = 0;
  std::uint64_t round_foreseen_ = 0;
  Counts counts_;
};

}  // namespace torch_ext
