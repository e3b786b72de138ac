#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/StreamGuard.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/fake_cuda.h"
#include "support/sim_machine.h"
#include "support/temp_dir.h"
#include "tensor/adamw_offload.h"
#include "tensor/gradient_hook.h"
#include "torch_ext/tensor/offloaded_adamw.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kBudget = std::uint64_t{256} << 10;

test::SimMachine& machine() {
  static test::SimMachine only;
  return only;
}

class AdamWDeviceTest : public testing::Test {
 protected:
  AdamWDeviceTest() { machine().reset(); }
  ~AdamWDeviceTest() override { machine().reset(); }

  TileOptions options() const {
    return {.store = {.directory = temp_.path()},
            .host_memory = kBudget,
            .scratch_bytes = 48 << 10};
  }

  test::TempDir temp_;
  const c10::Device sim_ = (machine(), c10::Device("sim:0"));
};

TEST_F(AdamWDeviceTest, AGradientInPageLockedMemoryIsLeftToStep) {
  // Its copy from a device ends with backward, and not before.
  const at::Tensor start = at::randn({5000});
  std::vector<at::Tensor> results;
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate}) {
    const at::Tensor parameter = start.clone().requires_grad_(true);
    at::Tensor late;
    const auto copies_later = std::make_shared<const GradientHook::Function>(
        [&](const at::Tensor& of) { of.mutable_grad() = late; });
    GradientHook::add(parameter, copies_later);
    OffloadedAdamW optimizer({parameter}, OffloadedAdamWOptions(0.01),
                             {.nvme_path = temp_.path(),
                              .host_memory = kBudget,
                              .overlap_backward = overlap});
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      late = at::full({5000}, NAN).pin_memory();
      ASSERT_TRUE(late.is_pinned());
      parameter.sum().backward();
      ASSERT_FALSE(is_taken(parameter));
      late.fill_(step + 0.5);
      optimizer.step();
    }
    results.push_back(parameter.detach());
  }
  EXPECT_TRUE(at::equal(results[0], results[1]));
  EXPECT_FALSE(at::equal(results[0], start));
}

TEST_F(AdamWDeviceTest, BothPlacesAndTheCpuGiveTheSameResult) {
  for (const c10::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor start = at::randn({30001}).to(dtype);
    const at::Tensor gradient = at::randn({30001}).to(dtype);
    const std::vector<std::pair<c10::Device, UpdateOn>> places = {
        {c10::Device(c10::kCPU), UpdateOn::kCpu},
        {sim_, UpdateOn::kCpu},
        {sim_, UpdateOn::kDevice}};
    std::vector<at::Tensor> results;
    for (const auto& [device, update_on] : places) {
      const at::Tensor parameter =
          start.clone().to(device).requires_grad_(true);
      parameter.mutable_grad() = gradient.to(device);
      OffloadedAdamW optimizer({parameter}, OffloadedAdamWOptions(0.01),
                               {.nvme_path = temp_.path(),
                                .host_memory = kBudget,
                                .update_on = update_on});
      for (int step = 0; step < 3; ++step) optimizer.step();
      results.push_back(parameter.detach().to(at::kCPU));
    }
    EXPECT_FALSE(at::equal(results[0], start));
    EXPECT_TRUE(at::equal(results[1], results[0]));
    EXPECT_TRUE(at::equal(results[2], results[0]));
  }
}

TEST_F(AdamWDeviceTest, ACpuParameterOrAPackedFormatIsNotUpdatedOnADevice) {
  const StateOptions there = {.nvme_path = temp_.path(),
                              .update_on = UpdateOn::kDevice};
  const at::Tensor here = at::zeros({3}).requires_grad_(true);
  EXPECT_THROW(OffloadedAdamW({here}, OffloadedAdamWOptions(), there),
               std::invalid_argument);
  StateOptions packed = there;
  packed.state_format = StateFormat::kInt8;
  EXPECT_THROW(
      OffloadedAdamW({at::zeros({3}, sim_)}, OffloadedAdamWOptions(), packed),
      std::invalid_argument);
}

TEST_F(AdamWDeviceTest, GradientsAreCopiedDuringBackwardWhenAsked) {
  const at::Tensor start = at::randn({5000});
  std::vector<at::Tensor> results;
  for (const auto overlap :
       {OverlapBackward::kOff, OverlapBackward::kPrefetch}) {
    const at::Tensor parameter = start.clone().to(sim_).requires_grad_(true);
    OffloadedAdamW optimizer({parameter}, OffloadedAdamWOptions(0.01),
                             {.nvme_path = temp_.path(),
                              .host_memory = std::uint64_t{1} << 20,
                              .overlap_backward = overlap});
    for (int step = 0; step < 3; ++step) {
      optimizer.zero_grad();
      const std::int64_t before = machine().count("async_copies");
      parameter.backward(at::full({5000}, step + 0.5).to(sim_));
      EXPECT_EQ(machine().count("async_copies") - before,
                overlap == OverlapBackward::kPrefetch ? 1 : 0);
      optimizer.step();
    }
    results.push_back(parameter.detach().to(at::kCPU));
  }
  EXPECT_FALSE(at::equal(results[0], start));
  EXPECT_TRUE(at::equal(results[1], results[0]));
}

TEST_F(AdamWDeviceTest, BackwardAfterCloseCopiesNothing) {
  const at::Tensor parameter = at::randn({5000}).to(sim_).requires_grad_(true);
  OffloadedAdamW optimizer({parameter}, OffloadedAdamWOptions(0.01),
                           {.nvme_path = temp_.path(),
                            .host_memory = std::uint64_t{1} << 20,
                            .overlap_backward = OverlapBackward::kPrefetch});
  parameter.backward(at::ones({5000}).to(sim_));
  optimizer.close();
  const std::int64_t before = machine().count("async_copies");
  parameter.backward(at::ones({5000}).to(sim_));
  EXPECT_EQ(machine().count("async_copies"), before);
}

TEST_F(AdamWDeviceTest, UpdatesDuringBackwardTakeNoMemoryForGradients) {
  const at::Tensor parameter = at::randn({5000}).to(sim_).requires_grad_(true);
  std::vector<std::uint64_t> scratch;
  for (const auto overlap : {OverlapBackward::kOff, OverlapBackward::kUpdate,
                             OverlapBackward::kPrefetch}) {
    OffloadedAdamW optimizer({parameter}, OffloadedAdamWOptions(0.01),
                             {.nvme_path = temp_.path(),
                              .host_memory = std::uint64_t{1} << 20,
                              .overlap_backward = overlap});
    scratch.push_back(optimizer.plan().scratch_bytes);
  }
  EXPECT_EQ(scratch[1], scratch[0]);
  EXPECT_EQ(scratch[2], scratch[0] + 20480);
}

TEST_F(AdamWDeviceTest, AGradientOnAnotherDeviceIsRefused) {
  AdamWOffload offload(options());
  const at::Tensor parameter = at::zeros({3}, sim_);
  const std::size_t slot = offload.add(parameter, /*trained=*/true);
  EXPECT_THROW(offload.step({{{}, {{{slot, parameter}, at::ones({3})}}}}),
               std::invalid_argument);
}

TEST_F(AdamWDeviceTest, HalvesOfAMasterAreThoseOfTheCore) {
  // Every upper half, with lower ones around the tie and at the ends.
  const at::Tensor uppers = at::arange(0, 1 << 16, at::kInt).to(at::kShort);
  for (const int low : {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}) {
    const at::Tensor lowers = at::full({1 << 16}, low, at::kInt).to(at::kShort);
    const at::Tensor master =
        join_on_device(uppers.view(at::kBFloat16), lowers);
    std::vector<float> expected(1 << 16);
    join_master(static_cast<const std::uint16_t*>(uppers.const_data_ptr()),
                static_cast<const std::uint16_t*>(lowers.const_data_ptr()),
                expected.data(), expected.size());
    EXPECT_EQ(std::memcmp(master.const_data_ptr(), expected.data(),
                          expected.size() * sizeof(float)),
              0);
    // And of floats with such ends, NaN among them.
    const at::Tensor floats =
        uppers.to(at::kInt).bitwise_left_shift(16).bitwise_or(low).view(
            at::kFloat);
    const auto [upper, lower] = split_on_device(floats);
    std::vector<std::uint16_t> halves(1 << 16), rest(1 << 16);
    split_master(floats.const_data_ptr<float>(), halves.data(), rest.data(),
                 halves.size());
    EXPECT_EQ(std::memcmp(upper.const_data_ptr(), halves.data(), 2 << 16), 0);
    EXPECT_EQ(std::memcmp(lower.const_data_ptr(), rest.data(), 2 << 16), 0);
  }
}

TEST_F(AdamWDeviceTest, AnUpdateOnAnotherThreadComesAfterItsTargetsEvent) {
  for (const UpdateOn update_on : {UpdateOn::kCpu, UpdateOn::kDevice}) {
    machine().reset();
    const std::vector<at::Tensor> parameters = {at::zeros({4000}, sim_),
                                                at::zeros({300}, sim_)};
    const AdamWHyper hyper{.lr = 1, .weight_decay = 0};
    OptimizerOffload offload(options());
    CopyStreams copies;
    CopyStream* const copy = copies.add(sim_);
    AdamWKernel kernel(
        StateFormat::kExact, 0, [&] { return offload.scratch(); }, copies,
        update_on);
    const c10::impl::VirtualGuardImpl guard(sim_.type());
    std::vector<c10::Event> events;
    std::vector<c10::Stream> streams;
    events.reserve(2);
    std::vector<std::size_t> numbers;
    for (const at::Tensor& parameter : parameters) {
      // A gradient of a stream of its own, which is late.
      streams.push_back(guard.getNewStream(sim_));
      const at::Tensor gradient = at::zeros({parameter.numel()}, sim_);
      machine().settle();
      machine().hold(0, streams.back().id());
      const c10::StreamGuard on_stream(streams.back());
      gradient.fill_(1);
      events.emplace_back(sim_.type()).record(streams.back());
      numbers.push_back(offload.add_parameter(
          static_cast<std::uint64_t>(parameter.numel()),
          adamw_fields(StateFormat::kExact, MasterFormat::kNone)));
      kernel.add(numbers.back(),
                 {.parameter = parameter,
                  .gradient = OrderedReader(gradient, parameter.strides()),
                  .hyper = &hyper,
                  .stream = copy,
                  .ready = &events.back()});
    }
    std::thread worker([&] { offload.step(numbers, kernel); });
    ASSERT_TRUE(machine().await_copies(4));
    for (const c10::Stream& stream : streams) {
      machine().settle();
      machine().release(0, stream.id());
    }
    worker.join();
    copies.leave();
    for (const at::Tensor& parameter : parameters) {
      EXPECT_TRUE(at::allclose(parameter.to(at::kCPU),
                               at::full({parameter.numel()}, -1.0f)));
    }
  }
}

TEST_F(AdamWDeviceTest, LaterWorkComesAfterCopiesAlsoWhereAStepHasFailed) {
  const at::Tensor parameter = at::zeros({100}, sim_);
  const at::Tensor host = at::ones({100});
  machine().settle();
  CopyStreams streams;
  CopyStream* const stream = streams.add(sim_);
  machine().hold_copies(true);
  const auto step = [&] {
    stream->queue([&] { parameter.copy_(host, /*non_blocking=*/true); });
    throw StateError("a later tile could not be read");
  };
  EXPECT_THROW(streams.around(step), StateError);
  const at::Tensor seen = parameter.clone();
  machine().settle();
  machine().hold_copies(false);
  EXPECT_TRUE(at::equal(seen.to(at::kCPU), host));
}

TEST_F(AdamWDeviceTest, MemoryOfCopiesIsPageLockedUntilClose) {
  test::FakeCuda cuda;
  const auto device = std::make_shared<C10Device>(
      sim_, C10Device::Runtime{CudaRuntime::open(cuda.path()), {}});
  OptimizerOffload offload(options());
  const std::uint64_t tiles = kBudget / (64 << 10) - 1;
  offload.pin_scratch(device);
  offload.pin_scratch(device);
  EXPECT_EQ(cuda.registered_bytes(), 48u << 10);
  offload.pin_tiles(device);
  EXPECT_EQ(cuda.registered_bytes(), (48u << 10) + tiles * (64 << 10));
  EXPECT_EQ(offload.stats().host_bytes_peak, 48u << 10);
  const std::size_t before = offload.notes().size();
  offload.close();
  EXPECT_EQ(cuda.registered_bytes(), 0u);
  EXPECT_EQ(offload.notes().size(), before);
  EXPECT_THROW(offload.pin_scratch(device), StateError);
}

TEST_F(AdamWDeviceTest, MemoryThatCannotBePageLockedIsNotedOnce) {
  test::FakeCuda cuda;
  const auto device = std::make_shared<C10Device>(
      sim_, C10Device::Runtime{CudaRuntime::open(cuda.path()), {}});
  OptimizerOffload offload(options());
  const std::size_t before = offload.notes().size();
  cuda.fail_next(2);
  offload.pin_scratch(device);
  offload.pin_scratch(device);
  ASSERT_EQ(offload.notes().size(), before + 1);
  EXPECT_NE(offload.notes().back().find("not page-locked for sim:0"),
            std::string::npos);
  EXPECT_EQ(cuda.registered_bytes(), 0u);
}

}  // namespace
}  // namespace torch_ext
