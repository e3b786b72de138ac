#include "torch_ext/optim/adamw_update.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "support/adamw_moments.h"

namespace torch_ext {
namespace {

using test::all_loops;
using test::bits_of;
using test::float_of;
using test::kBlock;
using test::kM;
using test::kV;
using test::Memory;

/// A parameter of `count` elements and all that a step needs.
struct Trained {
  Trained(StateFormat of, std::size_t size, bool with_master,
          bool bf16_gradient)
      : format(of), count(size), m(of, size), v(of, size) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    gradient.resize(count);
    gradient_bf16.resize(count);
    master.resize(count);
    parameter.resize(count);
    low.resize(count);
    for (std::size_t i = 0; i < count; ++i) {
      gradient[i] = float_of(bits_of(normal(random)) & 0xffff0000);
      gradient_bf16[i] = static_cast<std::uint16_t>(bits_of(gradient[i]) >> 16);
      master[i] = normal(random);
    }
    split_master(master.data(), parameter.data(), low.data(), count);
    has_master = with_master;
    has_bf16_gradient = bf16_gradient;
  }

  AdamWRun run(std::size_t first, std::size_t length) {
    AdamWRun run;
    run.first = first;
    run.count = length;
    const std::size_t bytes = format == StateFormat::kBf16 ? 2 : 1;
    run.exp_avg = m.moment(first, bytes);
    run.exp_avg_sq = v.moment(first, bytes);
    run.gradient = has_bf16_gradient ? nullptr : gradient.data() + first;
    run.gradient_bf16 =
        has_bf16_gradient ? gradient_bf16.data() + first : nullptr;
    if (has_master) {
      run.master = master.data() + first;
    } else {
      run.parameter_bf16 = parameter.data() + first;
      run.low = low.data() + first;
    }
    return run;
  }

  std::vector<float> weights() const {
    if (has_master) return master;
    std::vector<float> out(count);
    join_master(parameter.data(), low.data(), out.data(), count);
    return out;
  }

  bool operator==(const Trained&) const = default;

  StateFormat format;
  std::size_t count;
  Memory m, v;
  std::vector<float> gradient, master;
  std::vector<std::uint16_t> gradient_bf16, parameter, low;
  bool has_master = false, has_bf16_gradient = false;
};

constexpr AdamWCoefficients kWith = {.decay = 0.999f,
                                     .exp_avg = 0.1f,
                                     .beta2 = 0.99f,
                                     .exp_avg_sq = 0.01f,
                                     .inverse_root = 1.5f,
                                     .eps = 1e-8f,
                                     .step_size = 0.02f,
                                     .maximize = false};

class AdamWStepTest : public testing::TestWithParam<StateFormat> {};

TEST_P(AdamWStepTest, AStepIsAdamWOnWhatIsUnpackedThenPacked) {
  const StateFormat format = GetParam();
  for (const bool maximize : {false, true}) {
    Trained run(format, 3 * kBlock + 21, true, false);
    const Trained before = run;
    AdamWCoefficients with = kWith;
    with.maximize = maximize;
    // The first step begins with zeros, the others with what the one before
    // left.
    std::vector<float> w = before.master, m(w.size()), v(w.size());
    for (std::uint64_t step = 1; step < 4; ++step) {
      const RoundingNoise noise{1, step, 2};
      unpack_moment(format, kM, run.m.moment(), m.data(), m.size());
      unpack_moment(format, kV, run.v.moment(), v.data(), v.size());
      for (std::size_t i = 0; i < w.size(); ++i) {
        const float g = maximize ? -run.gradient[i] : run.gradient[i];
        m[i] = m[i] + (g - m[i]) * with.exp_avg;
        v[i] = v[i] * with.beta2 + g * g * with.exp_avg_sq;
        w[i] = w[i] * with.decay -
               m[i] * with.step_size /
                   (std::sqrt(v[i]) * with.inverse_root + with.eps);
      }
      Memory packed_m(format, w.size()), packed_v(format, w.size());
      pack_moment(format, kM, m.data(), packed_m.moment(), 0, m.size(), noise);
      pack_moment(format, kV, v.data(), packed_v.moment(), 0, v.size(), noise);
      update_adamw(format, run.run(0, run.count), with, noise);
      EXPECT_EQ(run.m, packed_m);
      EXPECT_EQ(run.v, packed_v);
      ASSERT_EQ(run.master, w);
    }
  }
}

TEST_P(AdamWStepTest, TheResultDependsNeitherOnCutsNorOnInstructions) {
  const std::size_t count = 9 * kBlock + 100;
  for (const bool with_master : {false, true}) {
    for (const bool bf16_gradient : {false, true}) {
      std::vector<Trained> results;
      for (const AdamWLoops* loops : all_loops()) {
        for (const std::size_t cut : {count, kBlock, 4 * kBlock}) {
          Trained run(GetParam(), count, with_master, bf16_gradient);
          for (std::uint64_t step = 1; step < 5; ++step) {
            for (std::size_t at = 0; at < count; at += cut) {
              loops->update(GetParam(), run.run(at, std::min(cut, count - at)),
                            kWith, {3, step, 4});
            }
          }
          results.push_back(run);
        }
      }
      for (const Trained& run : results) EXPECT_EQ(run, results[0]);
    }
  }
}

TEST_P(AdamWStepTest, TheKindOfMasterAndGradientDoesNotMatter) {
  std::vector<std::vector<float>> results;
  for (const bool with_master : {false, true}) {
    for (const bool bf16_gradient : {false, true}) {
      Trained run(GetParam(), 2 * kBlock + 3, with_master, bf16_gradient);
      for (std::uint64_t step = 1; step < 5; ++step) {
        update_adamw(GetParam(), run.run(0, run.count), kWith, {3, step, 4});
      }
      results.push_back(run.weights());
      std::vector<std::uint16_t> rounded(run.count), low(run.count);
      split_master(results.back().data(), rounded.data(), low.data(),
                   run.count);
      if (!with_master) {
        EXPECT_EQ(rounded, run.parameter);
      }
    }
  }
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

TEST_P(AdamWStepTest, OtherNoiseGivesOtherBits) {
  std::vector<Trained> results;
  for (const RoundingNoise& noise :
       {RoundingNoise{1, 2, 3}, {4, 2, 3}, {1, 4, 3}, {1, 2, 4}}) {
    results.emplace_back(GetParam(), 4 * kBlock, true, false);
    update_adamw(GetParam(), results.back().run(0, 4 * kBlock), kWith, noise);
    for (std::size_t i = 0; i + 1 < results.size(); ++i) {
      EXPECT_NE(results[i].m, results.back().m);
      EXPECT_NE(results[i].v, results.back().v);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    , AdamWStepTest, testing::Values(StateFormat::kBf16, StateFormat::kInt8),
    [](const auto& info) { return state_format_name(info.param); });

}  // namespace
}  // namespace torch_ext
