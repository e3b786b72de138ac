// Which units a program touches next.
//
// A model touches its parameters in about the same order in each round: forward
// and back, or forward only. So the touches of one round, without repetitions,
// are the plan for the next ones. It is a cycle, and the cursor is at the touch
// that is expected next.
//
// A touch moves the cursor behind the next place that has its unit. Programs
// diverge: they skip a layer, or evaluate between two steps. So:
//  - A unit that is not in the plan leaves the cursor where it is.
//  - So does one whose next place is far and whose last place is just behind
//    the cursor: it was touched once more.
//  - Any other touch takes the cursor along, however far that is.
// A round of which the plan foresaw less than nine touches in ten makes a new
// plan at its end. A wrong plan costs time, never a result.

#include "touch_plan.h"

#include <algorithm>
#include <utility>

namespace torch_ext {

std::size_t TouchPlan::touch(Unit unit) {
  if (unit >= touched_.size()) touched_.resize(std::size_t{unit} + 1);
  touched_[unit] = ++clock_;
  if (unit == last_) return 0;
  last_ = unit;
  ++counts_.touches;
  ++round_touches_;
  if (trace_.size() < kLongest) trace_.push_back(unit);
  if (order_.empty()) return 0;
  const std::size_t places = distance(unit);
  if (places == kNever) return 0;
  if (places <= kNear) {
    ++counts_.foreseen;
    ++round_foreseen_;
  } else if (is_just_behind(unit)) {
    return 0;
  }
  cursor_ = (cursor_ + places + 1) % order_.size();
  return places <= kNear ? places + 1 : kNever;
}

bool TouchPlan::is_just_behind(Unit unit) const {
  const std::size_t size = order_.size();
  for (std::size_t back = 1; back <= std::min(2 * kNear, size); ++back) {
    if (order_[(cursor_ + size - back) % size] == unit) return true;
  }
  return false;
}

bool TouchPlan::begin_round() {
  if (trace_.empty()) return false;
  const bool good = 10 * round_foreseen_ >= 9 * round_touches_;
  const bool anew = order_.empty() || !good;
  if (anew) {
    order_ = std::move(trace_);
    places_.assign(touched_.size(), {});
    for (std::size_t i = 0; i < order_.size(); ++i) {
      places_[order_[i]].push_back(i);
    }
    ++counts_.plans;
  }
  trace_.clear();
  round_touches_ = round_foreseen_ = 0;
  cursor_ = 0;
  last_ = kNone;
  return anew;
}

std::size_t TouchPlan::distance(Unit unit) const {
  if (order_.empty()) {
    return kNever - (unit < touched_.size() ? touched_[unit] : 0);
  }
  if (unit >= places_.size() || places_[unit].empty()) return kNever;
  const std::vector<std::size_t>& places = places_[unit];
  const auto next = std::ranges::lower_bound(places, cursor_);
  return next != places.end() ? *next - cursor_
                              : places.front() + order_.size() - cursor_;
}

std::vector<TouchPlan::Unit> TouchPlan::units() const {
  std::vector<Unit> first;
  for (std::size_t i = 0; i < order_.size(); ++i) {
    if (places_[order_[i]].front() == i) first.push_back(order_[i]);
  }
  return first;
}

}  // namespace torch_ext
