// What a failing drive makes of save_tensors(), export_tensors() and
// load_tensors(). Values, formats and refusals are tests of Python.

#include "torch_ext/tensor/tensor_file.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/faulty_engine.h"
#include "support/temp_dir.h"
#include "tensor/tensor_export.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::Fault;
using test::FaultScript;

/// A path in a directory of its own. libtorch has a remove_all() that crashes
/// in a directory which is not empty, and programs with libtorch get that one.
struct Place {
  Place() = default;
  ~Place() { unlink(path.c_str()); }
  test::TempDir directory;
  std::filesystem::path path = directory / "x";
};

/// Options whose requests of `script` fail; blocks are small, so there are
/// some.
TensorFileOptions faulty(const std::shared_ptr<FaultScript>& script) {
  TensorFileOptions options;
  options.aio.block_size = std::uint64_t{256} << 10;
  options.engine_factory = test::faulty_factory("threads", script);
  return options;
}

at::Tensor bytes(std::int64_t count) {
  return at::randint(0, 256, {count},
                     at::TensorOptions().dtype(at::kByte).device(at::kCPU));
}

NamedTensors some_tensors() {
  // Large, small, with edges, and not contiguous.
  return {{"large", bytes(3'000'001)},
          {"small", bytes(10)},
          {"other", bytes(2'000'003)},
          {"strided", bytes(400'000).view({200, 2000}).t()}};
}

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::size_t entries(const std::filesystem::path& directory) {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator(directory),
                    std::filesystem::directory_iterator()));
}

TEST(TensorFileTest, EachWriteThatFailsLeavesTheOldFileAndNoOther) {
  const NamedTensors tensors = some_tensors();
  auto script = std::make_shared<FaultScript>();
  const Place place;
  const std::filesystem::path& path = place.path;
  save_tensors(path, tensors, {}, faulty(script));
  const std::size_t requests = script->requests();
  ASSERT_GT(requests, 15u);
  const std::string whole = content(path);
  std::ofstream(path) << "old";
  for (std::size_t i = 0; i < requests; ++i) {
    SCOPED_TRACE(i);
    const int error = i % 2 == 0 ? EIO : ENOSPC;
    script = std::make_shared<FaultScript>(test::only(i, Fault::fail(error)));
    try {
      save_tensors(path, tensors, {}, faulty(script));
      FAIL() << "the failure was not reported";
    } catch (const IoError& failure) {
      EXPECT_EQ(failure.error(), error);
      EXPECT_EQ(failure.failure().path, path.native());
    }
    EXPECT_EQ(content(path), "old");
    EXPECT_EQ(entries(place.directory.path()), 1u);
  }
  // Fewer bytes than asked are no failure.
  script = std::make_shared<FaultScript>(test::from(0, Fault::cut(4096)));
  save_tensors(path, tensors, {}, faulty(script));
  EXPECT_EQ(content(path), whole);
}

TEST(TensorFileTest, EachReadThatFailsIsAnErrorWithThePath) {
  const Place place;
  const std::filesystem::path& path = place.path;
  save_tensors(path, some_tensors(), {});
  auto script = std::make_shared<FaultScript>();
  load_tensors(path, {}, faulty(script));
  const std::size_t requests = script->requests();
  ASSERT_GT(requests, 15u);
  for (std::size_t i = 0; i < requests; ++i) {
    script = std::make_shared<FaultScript>(test::only(i, Fault::fail(EIO)));
    try {
      load_tensors(path, {}, faulty(script));
      FAIL() << i;
    } catch (const IoError& failure) {
      EXPECT_EQ(failure.error(), EIO);
      EXPECT_EQ(failure.failure().path, path.native());
    }
  }
}

TEST(TensorFileTest, EachReadOfALargeFileThatFailsIsAnErrorToo) {
  const Place place;
  // More pieces than are on their way at once, and a part of one.
  save_tensors(place.path, {{"x", bytes((std::int64_t{81} << 20) + 3)}}, {});
  const auto options = [](const std::shared_ptr<FaultScript>& script) {
    TensorFileOptions options = faulty(script);
    options.aio.block_size = std::uint64_t{8} << 20;
    return options;
  };
  auto script = std::make_shared<FaultScript>();
  const NamedTensors loaded = load_tensors(place.path, {}, options(script));
  const std::string file = content(place.path);
  const auto size = static_cast<std::size_t>(loaded[0].second.numel());
  EXPECT_EQ(std::memcmp(loaded[0].second.const_data_ptr(),
                        file.data() + file.size() - size, size),
            0);
  const std::size_t requests = script->requests();
  ASSERT_GT(requests, 10u);
  for (std::size_t i = 0; i < requests; ++i) {
    script = std::make_shared<FaultScript>(test::only(i, Fault::fail(EIO)));
    EXPECT_THROW(load_tensors(place.path, {}, options(script)), IoError) << i;
  }
}

TEST(TensorFileTest, AnInterruptEndsASaveAndKeepsTheOldFile) {
  const Place place;
  std::ofstream(place.path) << "old";
  const auto script =
      std::make_shared<FaultScript>(test::only(2, Fault::held()));
  TensorFileOptions options = faulty(script);
  options.interrupt = [&script] {
    script->release_all();
    throw std::runtime_error("interrupted");
  };
  EXPECT_THROW(save_tensors(place.path, some_tensors(), {}, options),
               std::runtime_error);
  EXPECT_EQ(content(place.path), "old");
  EXPECT_EQ(entries(place.directory.path()), 1u);
}

/// Two fields of three parameters, whose streams meet within a block. Each
/// element is its own number.
std::vector<StreamedTensor> some_streams() {
  std::vector<StreamedTensor> streams;
  for (const char* field : {"a", "b"}) {
    for (const std::int64_t count : {700'001, 3, 1'200'000}) {
      const auto group = static_cast<std::uint64_t>(streams.size() % 3);
      const auto read = [group](void* to, c10::ScalarType dtype,
                                std::span<std::byte> /*raw*/,
                                std::uint64_t first, std::uint64_t number) {
        EXPECT_EQ(dtype, at::kInt);
        for (std::uint64_t i = 0; i < number; ++i) {
          const auto value = static_cast<std::int32_t>(group + first + i);
          std::memcpy(static_cast<std::byte*>(to) + 4 * i, &value, 4);
        }
      };
      streams.push_back(
          {field + std::to_string(group), at::kInt, {count}, read, group});
    }
  }
  return streams;
}

TEST(TensorFileTest, EachWriteThatFailsInAnExportLeavesTheOldFile) {
  auto script = std::make_shared<FaultScript>();
  const Place place;
  const std::filesystem::path& path = place.path;
  export_tensors(path, some_streams(), {}, faulty(script));
  const std::size_t requests = script->requests();
  ASSERT_GT(requests, 15u);
  const std::string whole = content(path);
  for (const auto& [name, tensor] : load_tensors(path)) {
    const std::int64_t group = name.back() - '0';
    EXPECT_TRUE(tensor.equal(
        at::arange(group, group + tensor.numel(), tensor.options())))
        << name;
  }
  std::ofstream(path) << "old";
  for (std::size_t i = 0; i < requests; ++i) {
    SCOPED_TRACE(i);
    script = std::make_shared<FaultScript>(test::only(i, Fault::fail(ENOSPC)));
    try {
      export_tensors(path, some_streams(), {}, faulty(script));
      FAIL() << "the failure was not reported";
    } catch (const IoError& failure) {
      EXPECT_EQ(failure.error(), ENOSPC);
      EXPECT_EQ(failure.failure().path, path.native());
    }
    EXPECT_EQ(content(path), "old");
    EXPECT_EQ(entries(place.directory.path()), 1u);
  }
  script = std::make_shared<FaultScript>(test::from(0, Fault::cut(4096)));
  export_tensors(path, some_streams(), {}, faulty(script));
  EXPECT_EQ(content(path), whole);
}

TEST(TensorFileTest, WhatAnExportCannotReadIsAnErrorOfItsOwn) {
  const Place place;
  std::ofstream(place.path) << "old";
  std::vector<StreamedTensor> streams = some_streams();
  streams[4].read = [](auto&&...) {
    throw IoError(
        {.op = "read", .path = "/store", .error = EIO, .detail = "damaged"});
  };
  try {
    export_tensors(place.path, streams, {});
    FAIL() << "the failure was not reported";
  } catch (const IoError& failure) {
    EXPECT_EQ(failure.failure().path, "/store");
  }
  EXPECT_EQ(content(place.path), "old");
}

TEST(TensorFileTest, AnInterruptEndsAnExportWithoutAWait) {
  const Place place;
  TensorFileOptions options;
  options.interrupt = [] { throw std::runtime_error("interrupted"); };
  EXPECT_THROW(export_tensors(place.path, some_streams(), {}, options),
               std::runtime_error);
  EXPECT_EQ(entries(place.directory.path()), 0u);
}

}  // namespace
}  // namespace torch_ext
