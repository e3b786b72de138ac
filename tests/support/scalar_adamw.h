#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <vector>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext::test {

/// AdamW, one element after the other: lr 0.1, betas 0.5 and 0.75, eps 1e-6,
/// weight_decay 0.01. Without TSAN, which would make it 20 times slower, and
/// so for memory of the calling thread only.
__attribute__((no_sanitize("thread"))) inline void scalar_adamw(
    std::uint64_t step, std::size_t count, float* weight, const float* gradient,
    float* m, float* v) {
  const auto t = static_cast<float>(step);
  const float m_scale = 1 / (1 - std::pow(0.5f, t));
  const float v_scale = 1 / (1 - std::pow(0.75f, t));
  for (std::size_t i = 0; i < count; ++i) {
    m[i] = 0.5f * m[i] + 0.5f * gradient[i];
    v[i] = 0.75f * v[i] + 0.25f * gradient[i] * gradient[i];
    const float denominator = std::sqrt(v[i] * v_scale) + 1e-6f;
    weight[i] -= 0.1f * (0.01f * weight[i] + m[i] * m_scale / denominator);
  }
}

/// Pseudo-random numbers in [-1, 1).
__attribute__((no_sanitize("thread"))) inline void draw(std::uint32_t& seed,
                                                        float* out,
                                                        std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    out[i] = static_cast<float>(seed >> 8) / 8388608.0f - 1;
  }
}

/// A parameter that is trained twice, once with its state in vectors.
struct ScalarParameter {
  std::vector<float> weights, gradients;
  std::vector<float> expected, m, v;
  std::uint64_t step = 0;
};

/// Trains parameters with their state in an OptimizerOffload, of `fields`
/// floats each: m, v and, with three, a number that tells the element.
class ScalarAdamW final : public UpdateKernel {
 public:
  explicit ScalarAdamW(OptimizerOffload& offload, std::size_t fields = 2)
      : offload_(offload), fields_(fields) {}

  std::size_t add(std::size_t elements) {
    ScalarParameter p;
    p.weights.resize(elements);
    draw(seed_, p.weights.data(), elements);
    p.expected = p.weights;
    p.gradients.resize(elements);
    p.m.resize(elements);
    p.v.resize(elements);
    parameters.push_back(std::move(p));
    return offload_.add_parameter(elements, StateFields::floats(fields_));
  }

  /// New gradients for a parameter, and its step in vectors.
  void prepare(std::size_t number) {
    ScalarParameter& p = parameters[number];
    draw(seed_, p.gradients.data(), p.gradients.size());
    scalar_adamw(++p.step, p.m.size(), p.expected.data(), p.gradients.data(),
                 p.m.data(), p.v.data());
  }

  /// A step of both kinds with new gradients for `active`.
  void step(const std::vector<std::size_t>& active) {
    for (const std::size_t number : active) prepare(number);
    offload_.step(active, *this);
  }

  /// Begins anew with the weights that there are.
  void forget() {
    for (ScalarParameter& p : parameters) {
      p.expected = p.weights;
      std::fill(p.m.begin(), p.m.end(), 0.0f);
      std::fill(p.v.begin(), p.v.end(), 0.0f);
      p.step = 0;
    }
  }

  void step_all() {
    std::vector<std::size_t> all(parameters.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    step(all);
  }

  bool equal() const {
    for (const ScalarParameter& p : parameters) {
      if (p.weights != p.expected) return false;
    }
    return true;
  }

  void update(std::span<const StateSegment> segments) override {
    if (on_update) on_update(segments);
    ++updates;
    for (const StateSegment& segment : segments) {
      ScalarParameter& p = parameters.at(segment.parameter);
      ASSERT_LE(segment.first + segment.count, p.weights.size());
      std::vector<float> m = copy_of(segment, 0);
      std::vector<float> v = copy_of(segment, 1);
      scalar_adamw(segment.step, segment.count,
                   p.weights.data() + segment.first,
                   p.gradients.data() + segment.first, m.data(), v.data());
      std::copy(m.begin(), m.end(), segment.field(0));
      std::copy(v.begin(), v.end(), segment.field(1));
      if (fields_ == 3) check_third(segment);
    }
  }

  std::vector<ScalarParameter> parameters;
  std::function<void(std::span<const StateSegment>)> on_update;
  std::size_t updates = 0;
  std::size_t mismatches = 0;  ///< In the third field.

 private:
  static std::vector<float> copy_of(const StateSegment& segment,
                                    std::size_t field) {
    return {segment.field(field), segment.field(field) + segment.count};
  }

  void check_third(const StateSegment& segment) {
    std::vector<float> expected(segment.count);
    std::iota(expected.begin(), expected.end(),
              static_cast<float>(segment.first + 1));
    const std::vector<float> zeros(segment.count);
    const bool as_left =
        copy_of(segment, 2) == (segment.step == 1 ? zeros : expected);
    if (!as_left) ++mismatches;
    std::copy(expected.begin(), expected.end(), segment.field(2));
  }

  OptimizerOffload& offload_;
  const std::size_t fields_;
  std::uint32_t seed_ = 7;
};

/// A kernel from a function.
class FunctionKernel final : public UpdateKernel {
 public:
  using Function = std::function<void(const StateSegment&)>;
  explicit FunctionKernel(Function function) : function_(std::move(function)) {}
  void update(std::span<const StateSegment> segments) override {
    for (const StateSegment& segment : segments) function_(segment);
  }

 private:
  Function function_;
};

}  // namespace torch_ext::test
