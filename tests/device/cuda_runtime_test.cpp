#include "torch_ext/device/cuda_runtime.h"

#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>

#include "support/fake_cuda.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

class CudaRuntimeTest : public testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(fake_.registered_bytes(), 0u);
    EXPECT_EQ(fake_.last_error(), 0);  // Never left for somebody else to find.
  }

  test::FakeCuda fake_;
  std::shared_ptr<CudaRuntime> cuda_ = CudaRuntime::open(fake_.path());
  alignas(4096) std::array<std::byte, 8192> memory_;
};

// What the call throws; errno 0 if nothing.
IoFailure failure_of(const auto& call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.failure();
  }
  return {};
}

TEST_F(CudaRuntimeTest, RegistersMemoryForAllDevicesUntilItIsUnregistered) {
  cuda_->host_register(memory_.data(), memory_.size());
  EXPECT_EQ(fake_.registered_bytes(), memory_.size());
  EXPECT_EQ(fake_.register_flags(), 1u);  // cudaHostRegisterPortable
  cuda_->host_unregister(memory_.data());
  EXPECT_EQ(fake_.registered_bytes(), 0u);
}

TEST_F(CudaRuntimeTest, FailureHasTheRuntimesOwnTextAndNumber) {
  fake_.fail_next(712);
  const IoFailure failure =
      failure_of([&] { cuda_->host_register(memory_.data(), memory_.size()); });
  EXPECT_EQ(failure.op, "cudaHostRegister");
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.length, memory_.size());
  EXPECT_EQ(failure.detail,
            "part or all of the requested memory range is already mapped "
            "(CUDA error 712)");
}

TEST_F(CudaRuntimeTest, MemoryThatIsRefusedIsEnomem) {
  fake_.fail_next(2);
  const IoFailure failure =
      failure_of([&] { cuda_->host_register(memory_.data(), memory_.size()); });
  EXPECT_EQ(failure.error, ENOMEM);
  EXPECT_EQ(failure.detail, "out of memory (CUDA error 2)");
}

TEST_F(CudaRuntimeTest, UnregisteringNeverThrows) {
  cuda_->host_unregister(memory_.data());
}

TEST_F(CudaRuntimeTest, CaptureModeIsSetForTheCallingThreadAlone) {
  std::thread([this] {
    EXPECT_EQ(fake_.capture_mode(), 0);
    cuda_->use_thread_local_capture_mode();
    EXPECT_EQ(fake_.capture_mode(), 1);
    cuda_->use_thread_local_capture_mode();
    EXPECT_EQ(fake_.capture_mode(), 1);
  }).join();
  EXPECT_EQ(fake_.capture_mode(), 0);
  fake_.fail_next(46);
  EXPECT_EQ(failure_of([&] { cuda_->use_thread_local_capture_mode(); }).op,
            "cudaThreadExchangeStreamCaptureMode");
}

TEST_F(CudaRuntimeTest, TellsWhichStreamIsBeingCaptured) {
  int one = 0;
  int other = 0;
  fake_.set_capturing(&one, true);
  EXPECT_TRUE(cuda_->is_capturing(&one));
  EXPECT_FALSE(cuda_->is_capturing(&other));
  EXPECT_FALSE(cuda_->is_capturing(nullptr));
  fake_.set_capturing(&one, false);
  EXPECT_FALSE(cuda_->is_capturing(&one));
}

TEST_F(CudaRuntimeTest, StreamThatOneBeingCapturedWaitsForCountsAsCaptured) {
  fake_.fail_next(906);  // cudaErrorStreamCaptureImplicit
  EXPECT_TRUE(cuda_->is_capturing(nullptr));
  EXPECT_EQ(fake_.last_error(), 0);
  fake_.fail_next(1);
  EXPECT_EQ(failure_of([&] { cuda_->is_capturing(nullptr); }).op,
            "cudaStreamIsCapturing");
}

TEST_F(CudaRuntimeTest, KnowsItsVersion) { EXPECT_EQ(cuda_->version(), 13000); }

TEST(CudaRuntimeOpenTest, LibraryThatIsNotThereIsNamed) {
  std::string why_not;
  EXPECT_EQ(CudaRuntime::open("libno_such_cudart.so", &why_not), nullptr);
  EXPECT_NE(why_not.find("libno_such_cudart.so"), std::string::npos) << why_not;
  EXPECT_EQ(CudaRuntime::open("libno_such_cudart.so"), nullptr);
}

TEST(CudaRuntimeOpenTest, LibraryThatLacksAFunctionIsRefusedByName) {
  std::string why_not;
  EXPECT_EQ(CudaRuntime::open("libm.so.6", &why_not), nullptr);
  EXPECT_EQ(why_not, "libm.so.6 has no cudaHostRegister");
}

TEST(CudaRuntimeOpenTest, WithoutANameTheMachinesOwnOrAReason) {
  std::string why_not;
  const auto cuda = CudaRuntime::open({}, &why_not);
  if (cuda != nullptr) {
    EXPECT_GE(cuda->version(), 12000);
    EXPECT_EQ(why_not, "");
  } else {
    EXPECT_NE(why_not, "");
  }
}

}  // namespace
}  // namespace torch_ext
