// A model on the meta device in C++, and what a failing drive makes of it. What
// programs compute with offloaded parameters are tests of Python.

#include "torch_ext/tensor/model_offload.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/faulty_engine.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/tensor/tensor_file.h"

namespace torch_ext {
namespace {

using test::Fault;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

at::Tensor weight(c10::Device device) {
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  return device.is_meta() ? at::empty({256, 256}, options)
                          : at::randn({256, 256}, options);
}

class ModelOffloadTest : public testing::Test {
 protected:
  ModelOffloadTest() {
    for (int i = 0; i < 8; ++i) {
      values_.emplace_back("w" + std::to_string(i), weight(at::kCPU));
    }
    values_.emplace_back(
        "small",
        at::ones({5}, at::TensorOptions().dtype(at::kFloat).device(at::kCPU)));
    save_tensors(path_, values_, {});
  }
  ~ModelOffloadTest() override { unlink(path_.c_str()); }

  std::vector<NamedTensor> on_meta() const {
    std::vector<NamedTensor> tensors;
    for (const auto& [name, value] : values_) {
      tensors.push_back(
          {.name = name,
           .tensor = at::empty(
               value.sizes(),
               at::TensorOptions().dtype(at::kFloat).device(at::kMeta))});
    }
    return tensors;
  }

  ModelOffloadOptions options() {
    ModelOffloadOptions options;
    options.store = {
        .directory = dir_.path(),
        .engine_factory = test::faulty_factory("threads", script_)};
    options.host_memory = kMiB;
    options.checkpoint = path_;
    return options;
  }

  test::TempDir dir_;
  const std::filesystem::path path_ = dir_ / "model.safetensors";
  NamedTensors values_;
  std::shared_ptr<test::FaultScript> script_ =
      std::make_shared<test::FaultScript>();
};

TEST_F(ModelOffloadTest, TensorsOfTheMetaDeviceHaveTheCheckpointsValues) {
  const std::vector<NamedTensor> tensors = on_meta();
  ModelOffload offload(tensors, options());
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_TRUE(tensors[i].tensor.is_cpu());
      EXPECT_TRUE(at::equal(tensors[i].tensor, values_[i].second));
    }
  }
  EXPECT_EQ(offload.stats().bytes_written, 0u);
  offload.close();
  EXPECT_TRUE(at::equal(tensors[3].tensor, values_[3].second));
}

TEST_F(ModelOffloadTest, TheyStayOnTheMetaDeviceIfAnotherCannotBeWritten) {
  std::vector<NamedTensor> tensors = on_meta();
  tensors.push_back({.name = "in memory", .tensor = weight(at::kCPU)});
  const at::Tensor before = tensors.back().tensor.clone();
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  EXPECT_THROW(ModelOffload(tensors, options()), IoError);
  for (const NamedTensor& each : tensors) {
    EXPECT_EQ(each.tensor.is_meta(), each.name != "in memory") << each.name;
  }
  EXPECT_TRUE(at::equal(tensors.back().tensor, before));
  script_->set_plan(nullptr);
  const ModelOffload offload(tensors, options());
  EXPECT_TRUE(at::equal(tensors[0].tensor, values_[0].second));
  EXPECT_TRUE(at::equal(tensors.back().tensor, before));
}

TEST_F(ModelOffloadTest, AFileThatCannotBeReadIsAnErrorAndThenReadAgain) {
  const std::vector<NamedTensor> tensors = on_meta();
  const ModelOffload offload(tensors, options());
  script_->set_plan(test::from(0, Fault::fail(EIO)));
  EXPECT_ANY_THROW(at::equal(tensors[0].tensor, values_[0].second));
  script_->set_plan(nullptr);
  EXPECT_TRUE(at::equal(tensors[0].tensor, values_[0].second));
}

TEST_F(ModelOffloadTest, WhatTheCheckpointLacksIsRefused) {
  std::vector<NamedTensor> tensors = on_meta();
  tensors[2].name = "other";
  EXPECT_THROW(ModelOffload(tensors, options()), std::invalid_argument);
  tensors[2].aliases = {"w2"};
  const ModelOffload offload(tensors, options());
  EXPECT_TRUE(at::equal(tensors[2].tensor, values_[2].second));
}

}  // namespace
}  // namespace torch_ext
