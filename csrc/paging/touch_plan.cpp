// Which units a program touches next.
//
// A model touches its parameters in about the same order in each round: forward
// and back, or forward only. So the touches of one round, without repetitions,
// are the plan for the next ones. It is a cycle, and the cursor is at the touch
// that is expected next.
//
// A round begins where a forward pass does. Nobody has to say so: the first two
// units that a forward pass reads are read one after the other again. A way
// back reads them in the other order, and an update writes them.
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

std::size_t TouchPlan::touch(Unit unit, bool forward) {
  if (unit >= touched_.size()) touched_.resize(std::size_t{unit} + 1);
  touched_[unit] = ++clock_;
  if (unit == last_) {
    // The way back may end where the next forward pass begins.
    last_forward_ = forward;
    return 0;
  }
  bool anew = false;
  if (begins_anew(unit, forward)) {
    end_round(anchor_, trace_.size() - 1);
    trace_ = {last_};
    cursor_ = order_.size() > 1 ? 1 : 0;
    anew = true;
  } else if (trace_.size() > kLongRound * touched_.size() ||
             trace_.size() >= kLongest) {
    end_round(0, 0);
  }
  if (forward && last_forward_ && anchor_ == kNever && !trace_.empty()) {
    anchor_ = trace_.size() - 1;
  }
  last_ = unit;
  last_forward_ = forward;
  ++counts_.touches;
  ++round_touches_;
  trace_.push_back(unit);
  if (order_.empty()) return 0;
  const std::size_t places = places_to(unit);
  if (places == kNever) return 0;
  if (places <= kNear) {
    ++counts_.foreseen;
    ++round_foreseen_;
  } else if (is_just_behind(unit)) {
    return 0;
  }
  cursor_ = (cursor_ + places + 1) % order_.size();
  return anew || places > kNear ? kNever : places + 1;
}

// Whether this touch and the last one are the first two of a forward pass.
bool TouchPlan::begins_anew(Unit unit, bool forward) const {
  return forward && last_forward_ && anchor_ != kNever &&
         trace_.size() > anchor_ + 2 && last_ == trace_[anchor_] &&
         unit == trace_[anchor_ + 1];
}

// The round was trace_[first] to trace_[end]; none if they are the same.
void TouchPlan::end_round(std::size_t first, std::size_t end) {
  const bool good = 10 * round_foreseen_ >= 9 * round_touches_;
  if (first < end && (order_.empty() || !good)) {
    // Where memory is short, the old plan stays.
    std::vector<Unit> order(trace_.begin() + static_cast<std::ptrdiff_t>(first),
                            trace_.begin() + static_cast<std::ptrdiff_t>(end));
    std::vector<std::vector<std::size_t>> places(touched_.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      places[order[i]].push_back(i);
    }
    order_ = std::move(order);
    places_ = std::move(places);
    ++counts_.plans;
  }
  trace_.clear();
  anchor_ = kNever;
  round_touches_ = round_foreseen_ = 0;
}

bool TouchPlan::is_just_behind(Unit unit) const {
  const std::size_t size = order_.size();
  for (std::size_t back = 1; back <= std::min(2 * kNear, size); ++back) {
    if (order_[(cursor_ + size - back) % size] == unit) return true;
  }
  return false;
}

void TouchPlan::begin_round() {
  end_round(0, trace_.size());
  cursor_ = 0;
  last_ = kNone;
  last_forward_ = false;
}

std::size_t TouchPlan::distance(Unit unit) const {
  // Often it is touched once more before the next one: read, then updated.
  if (unit == last_) return 0;
  return places_to(unit);
}

std::size_t TouchPlan::places_to(Unit unit) const {
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
