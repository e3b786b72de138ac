// What every engine must do, held against all of them: what IoQueue relies on.

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/child.h"
#include "support/engine_test.h"

namespace torch_ext {
namespace {

using std::chrono::nanoseconds;
using test::AlignedBuffer;
using test::fill_pattern;
using test::holds_pattern;
using test::kLong;
using test::kPage;

class IoEngineContract : public test::EngineTest {};

INSTANTIATE_TEST_SUITE_P(Engines, IoEngineContract, test::kEngineCases,
                         test::engine_case_name);

TEST_P(IoEngineContract, HasTheNameAndDepthItWasMadeWith) {
  const auto engine = make(5);
  EXPECT_EQ(engine->name(), GetParam().engine);
  EXPECT_EQ(engine->depth(), 5u);
  EXPECT_THROW(make(0), std::invalid_argument);
  EXPECT_THROW(make(-1), std::invalid_argument);
}

TEST_P(IoEngineContract, WhatWasWrittenIsReadThroughEitherDescriptor) {
  const File file = scratch();
  const auto engine = make(4);
  AlignedBuffer out(5 * kPage);
  fill_pattern(out.bytes(), 1);
  for (const int fd : {file.fd(), file.buffered_fd()}) {
    ASSERT_EQ(run(*engine, write(fd, 3 * kPage, out.bytes())),
              static_cast<std::int64_t>(out.size()));
    for (const int other : {file.fd(), file.buffered_fd()}) {
      AlignedBuffer in(out.size());
      ASSERT_EQ(run(*engine, read(other, 3 * kPage, in.bytes())),
                static_cast<std::int64_t>(in.size()));
      EXPECT_TRUE(holds_pattern(in.bytes(), 1));
    }
  }
}

TEST_P(IoEngineContract, EveryRequestOfABatchHasItsOwnResult) {
  const File file = filled(20 * kPage, 2);
  const auto engine = make(32);
  AlignedBuffer in(40 * kPage);
  std::vector<IoRequest> requests;
  for (std::size_t i = 0; i < 20; ++i) {
    requests.push_back(read(file.fd(), i * kPage,
                            in.bytes(2 * i * kPage, (1 + i % 2) * kPage), i));
  }
  const auto results = run_all(*engine, requests);
  for (std::size_t i = 0; i < 20; ++i) {
    // The last one's second page lies beyond the end.
    const std::size_t there = i == 19 ? kPage : requests[i].length;
    EXPECT_EQ(results.at(i), static_cast<std::int64_t>(there)) << i;
    EXPECT_TRUE(holds_pattern({requests[i].data, there}, 2, requests[i].offset))
        << i;
  }
}

TEST_P(IoEngineContract, AReadAcrossTheEndMovesOnlyTheBytesThatExist) {
  const File file = filled(5000, 3);
  const auto engine = make(4);
  for (const int fd : {file.fd(), file.buffered_fd()}) {
    AlignedBuffer in(2 * kPage);
    EXPECT_EQ(run(*engine, read(fd, 0, in.bytes())), 5000);
    EXPECT_TRUE(holds_pattern(in.bytes(0, 5000), 3));
  }
}

TEST_P(IoEngineContract, AReadAtOrBeyondTheEndMovesNothing) {
  const File file = filled(2 * kPage, 4);
  const auto engine = make(4);
  AlignedBuffer in(kPage);
  EXPECT_EQ(run(*engine, read(file.fd(), 2 * kPage, in.bytes())), 0);
  EXPECT_EQ(run(*engine, read(file.fd(), 64 * kPage, in.bytes())), 0);
}

TEST_P(IoEngineContract, WhatWasNeverWrittenReadsAsZeros) {
  const File file = scratch();
  const auto engine = make(4);
  AlignedBuffer bytes(kPage);
  const std::uint64_t far = std::uint64_t{5} << 30;
  ASSERT_EQ(run(*engine, write(file.fd(), far, bytes.bytes())), 4096);
  ASSERT_EQ(run(*engine, read(file.fd(), far - kPage, bytes.bytes())), 4096);
  EXPECT_TRUE(std::all_of(bytes.bytes().begin(), bytes.bytes().end(),
                          [](std::byte b) { return b == std::byte{0}; }));
}

TEST_P(IoEngineContract, ABadRequestFailsAloneAndTheOthersOfItsBatchLive) {
  const File file = filled(8 * kPage, 5);
  const auto engine = make(8);
  AlignedBuffer in(8 * kPage);
  std::vector<IoRequest> requests = page_reads(file.fd(), in);
  requests[0].fd = -1;
  requests[3].fd = 1 << 20;
  requests[4].offset = std::numeric_limits<std::uint64_t>::max() / 4096 * 4096;
  const auto results = run_all(*engine, requests);
  for (const std::size_t i : {0u, 3u}) EXPECT_EQ(results.at(i), -EBADF) << i;
  EXPECT_EQ(results.at(4), -EINVAL);
  for (const std::size_t i : {1u, 2u, 5u, 6u, 7u}) {
    EXPECT_EQ(results.at(i), 4096) << i;
    EXPECT_TRUE(holds_pattern(in.bytes(i * kPage, kPage), 5, i * kPage)) << i;
  }
}

TEST_P(IoEngineContract, NoOffsetStandsForThePositionOfTheFile) {
  const File file = filled(4 * kPage, 18);
  const auto engine = make(2);
  AlignedBuffer bytes(kPage);
  for (std::uint64_t back = 1; back <= 3; ++back) {
    const IoRequest request = read(file.buffered_fd(), 0 - back, bytes.bytes());
    EXPECT_EQ(run(*engine, request), -EINVAL) << back;
  }
}

TEST_P(IoEngineContract, ADescriptorOpenForTheOtherDirectionIsAnError) {
  const test::TempDir directory(place());
  AlignedBuffer bytes(kPage);
  const auto engine = make(2);
  const File writable = File::open(directory / "x", File::Mode::kWrite);
  EXPECT_EQ(run(*engine, read(writable.fd(), 0, bytes.bytes())), -EBADF);
  const File readable = File::open(directory / "x", File::Mode::kRead);
  EXPECT_EQ(run(*engine, write(readable.fd(), 0, bytes.bytes())), -EBADF);
}

TEST_P(IoEngineContract, AMisalignedDirectRequestIsAnErrorNotHidden) {
  const File file = filled(4 * kPage, 6);
  if (is("memory")) GTEST_SKIP() << "memory needs no alignment";
  AlignedBuffer in(2 * kPage);
  const auto engine = make(4);
  const std::int64_t result =
      run(*engine, read(file.fd(), 0, in.bytes(1, kPage)));
  if (result == 4096) GTEST_SKIP() << place() << " needs no alignment";
  EXPECT_EQ(result, -EINVAL);
  EXPECT_EQ(run(*engine, read(file.fd(), 1, in.bytes(0, kPage))), -EINVAL);
  EXPECT_EQ(run(*engine, read(file.fd(), 0, in.bytes(0, 1000))), -EINVAL);
  EXPECT_EQ(run(*engine, write(file.fd(), 0, in.bytes(1, kPage))), -EINVAL);
  EXPECT_EQ(run(*engine, read(file.fd(), 0, in.bytes(0, kPage))), 4096);
}

TEST_P(IoEngineContract, AnyAlignmentWillDoOnTheBufferedDescriptor) {
  const File file = filled(4 * kPage, 7);
  const auto engine = make(4);
  AlignedBuffer in(2 * kPage);
  EXPECT_EQ(run(*engine, read(file.buffered_fd(), 777, in.bytes(3, 4001))),
            4001);
  EXPECT_TRUE(holds_pattern(in.bytes(3, 4001), 7, 777));
}

TEST_P(IoEngineContract, SubmitTakesNoMoreThanTheDepth) {
  const File file = filled(10 * kPage, 8);
  const auto engine = make(4);
  AlignedBuffer in(10 * kPage);
  const std::vector<IoRequest> requests = page_reads(file.fd(), in);
  EXPECT_EQ(engine->submit(requests), 4u);
  EXPECT_EQ(engine->submit(std::span(requests).subspan(4)), 0u);
  std::vector<IoCompletion> done(10);
  ASSERT_EQ(engine->poll(std::span(done).first(1), 1, kLong), 1u);
  EXPECT_EQ(engine->submit(std::span(requests).subspan(4)), 1u);
  EXPECT_EQ(engine->poll(done, 4, kLong), 4u);
  EXPECT_EQ(engine->submit(std::span(requests).subspan(5, 2)), 2u);
  EXPECT_EQ(engine->poll(done, 2, kLong), 2u);
}

TEST_P(IoEngineContract, RefusedRequestsTakeUpDepthUntilTheyAreReaped) {
  const auto engine = make(3);
  const std::vector<IoRequest> requests(5, IoRequest{.fd = -1});
  EXPECT_EQ(engine->submit(requests), 3u);
  EXPECT_EQ(engine->submit(requests), 0u);
  std::vector<IoCompletion> done(5);
  EXPECT_EQ(engine->poll(std::span(done).first(2), 2, kLong), 2u);
  EXPECT_EQ(engine->submit(requests), 2u);
  EXPECT_EQ(engine->poll(done, 3, kLong), 3u);
}

TEST_P(IoEngineContract, PollReapsNoMoreThanItHasRoomFor) {
  const File file = filled(8 * kPage, 9);
  const auto engine = make(8);
  AlignedBuffer in(8 * kPage);
  ASSERT_EQ(engine->submit(page_reads(file.fd(), in)), 8u);
  std::vector<IoCompletion> done(8);
  EXPECT_EQ(engine->poll(std::span(done).first(3), 8, kLong), 3u);
  EXPECT_EQ(engine->poll({}, 1, kLong), 0u);
  EXPECT_EQ(engine->poll(done, 5, kLong), 5u);
}

TEST_P(IoEngineContract, PollWaitsForAsManyAsItIsAskedFor) {
  const File file = filled(64 * kPage, 10);
  const auto engine = make(64);
  AlignedBuffer in(64 * kPage);
  for (const std::size_t wanted : {1u, 7u, 40u, 64u}) {
    ASSERT_EQ(engine->submit(page_reads(file.fd(), in)), 64u);
    std::vector<IoCompletion> done(64);
    std::size_t count = engine->poll(done, wanted, kLong);
    EXPECT_GE(count, wanted);
    while (count < 64) count += engine->poll(done, 64 - count, kLong);
    EXPECT_EQ(count, 64u);
  }
}

TEST_P(IoEngineContract, PollWithNothingInFlightReturnsAtOnce) {
  const auto engine = make(2);
  IoCompletion done;
  EXPECT_EQ(engine->poll({&done, 1}, 1, nanoseconds::max()), 0u);
  const IoRequest sync{.op = IoRequest::Op::kSync, .fd = -1};
  ASSERT_EQ(engine->submit({&sync, 1}), 1u);
  std::vector<IoCompletion> more(4);
  EXPECT_EQ(engine->poll(more, 4, nanoseconds::max()), 1u);
  EXPECT_EQ(engine->submit({}), 0u);
}

TEST_P(IoEngineContract, ATimeoutWithoutEndOutlivesNoCompletion) {
  const File file = filled(kPage, 11);
  AlignedBuffer in(kPage);
  const auto engine = make(2);
  const IoRequest request = read(file.fd(), 0, in.bytes());
  ASSERT_EQ(engine->submit({&request, 1}), 1u);
  IoCompletion done;
  EXPECT_EQ(engine->poll({&done, 1}, 1, nanoseconds::max()), 1u);
}

TEST_P(IoEngineContract, ALengthBeyondTheKernelsLimitIsCutNotRefused) {
  const File file = filled(2 * kPage, 12);
  const auto engine = make(1);
  AlignedBuffer in(2 * kPage);
  IoRequest request = read(file.buffered_fd(), 0, in.bytes());
  for (const std::size_t length : {std::size_t{3} << 30, SIZE_MAX / 2 + 1}) {
    request.length = length;
    EXPECT_EQ(run(*engine, request), 8192);
  }
}

TEST_P(IoEngineContract, SyncSucceedsOnAFileAndFailsOnABadDescriptor) {
  const File file = filled(kPage, 13);
  const auto engine = make(2);
  EXPECT_EQ(run(*engine, {.op = IoRequest::Op::kSync, .fd = file.fd()}), 0);
  EXPECT_EQ(run(*engine, {.op = IoRequest::Op::kSync, .fd = -1}), -EBADF);
}

TEST_P(IoEngineContract, TheDescriptorMayBeUsedByTwoEngines) {
  const File file = filled(2 * kPage, 14);
  const auto first = make(1);
  const auto second = make(1);
  AlignedBuffer in(2 * kPage);
  const std::vector<IoRequest> requests = page_reads(file.fd(), in);
  ASSERT_EQ(first->submit(requests), 1u);
  ASSERT_EQ(second->submit(std::span(requests).subspan(1)), 1u);
  IoCompletion done;
  EXPECT_EQ(second->poll({&done, 1}, 1, kLong), 1u);
  EXPECT_EQ(done.cookie, 1u);
  EXPECT_EQ(first->poll({&done, 1}, 1, kLong), 1u);
  EXPECT_EQ(done.cookie, 0u);
  EXPECT_TRUE(holds_pattern(in.bytes(), 14));
}

TEST_P(IoEngineContract, TheFileSizeLimitMakesAShortWriteThenAnError) {
  if (is("memory")) GTEST_SKIP() << "memory has no such limit";
  test::expect_well_in_child([this]() -> std::string {
    const File file = scratch();
    // The kernel sends it to who submits, or to an engine's own threads, which
    // take no signals.
    if (is("libaio") || is("io_uring")) signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {2 * kPage, 2 * kPage};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return "setrlimit";
    AlignedBuffer bytes(4 * kPage);
    const auto engine = make(2);
    const auto first = run(*engine, write(file.fd(), 0, bytes.bytes()));
    if (first != 8192) return "first: " + std::to_string(first);
    const auto rest =
        run(*engine, write(file.fd(), 8192, bytes.bytes(8192, 8192)));
    return rest == -EFBIG ? "" : "rest: " + std::to_string(rest);
  });
}

TEST_P(IoEngineContract, WithoutNewThreadsAllRequestsAreStillCarriedOut) {
  test::expect_well_in_child([this]() -> std::string {
    const File file = filled(8 * kPage, 17);
    AlignedBuffer in(8 * kPage);
    const auto engine = make(8);
    if (!test::refuse_syscall(SYS_clone3, EAGAIN) ||
        !test::refuse_syscall(SYS_clone, EAGAIN)) {
      return test::skip("no seccomp");
    }
    const auto results = run_all(*engine, page_reads(file.fd(), in));
    if (results.size() != 8) return std::to_string(results.size());
    return holds_pattern(in.bytes(), 17) ? "" : "wrong bytes";
  });
}

TEST_P(IoEngineContract, TheDestructorWaitsForWhatIsInFlight) {
  const File file = scratch();
  AlignedBuffer bytes(std::size_t{32} << 20);
  fill_pattern(bytes.bytes(), 15);
  std::vector<IoRequest> requests;
  for (std::size_t i = 0; i < 8; ++i) {
    const std::size_t part = bytes.size() / 8;
    requests.push_back(
        write(file.fd(), i * part, bytes.bytes(i * part, part), i));
  }
  {
    const auto engine = make(8);
    ASSERT_EQ(engine->submit(requests), 8u);
  }
  AlignedBuffer in(bytes.size());
  const auto engine = make(1);
  ASSERT_EQ(run(*engine, read(file.fd(), 0, in.bytes())),
            static_cast<std::int64_t>(in.size()));
  EXPECT_TRUE(holds_pattern(in.bytes(), 15));
}

TEST_P(IoEngineContract, AForkedChildCanDestroyTheEngine) {
  const File file = filled(16 * kPage, 16);
  AlignedBuffer in(16 * kPage);
  auto engine = make(16);
  run_all(*engine, page_reads(file.fd(), in));  // Threads are running.
  ASSERT_EQ(engine->submit(page_reads(file.fd(), in)), 16u);
  test::expect_well_in_child([&]() -> std::string {
    engine.reset();
    return "";
  });
  std::vector<IoCompletion> done(16);
  EXPECT_EQ(engine->poll(done, 16, kLong), 16u);
  EXPECT_TRUE(holds_pattern(in.bytes(), 16));
}

TEST(IoEngineFactoryTest, KnowsItsEnginesAndNoOthers) {
  for (const std::string_view name : engine_names()) {
    EXPECT_NO_THROW(make_engine_factory(name)) << name;
    EXPECT_NO_THROW(engine_unavailable_reason(name)) << name;
  }
  EXPECT_THROW(make_engine_factory("io_rings"), std::invalid_argument);
  EXPECT_THROW(engine_unavailable_reason(""), std::invalid_argument);
}

TEST(IoEngineFactoryTest, NullSaysItMovedEverythingAndMovesNothing) {
  const auto engine = make_engine_factory("null")(3);
  AlignedBuffer bytes(100);
  std::vector<IoRequest> requests(4);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i] = {.data = bytes.data(), .length = 100, .cookie = i};
  }
  requests[1].op = IoRequest::Op::kSync;
  requests[2].length = std::size_t{1} << 40;
  ASSERT_EQ(engine->submit(requests), 3u);
  std::vector<IoCompletion> done(4);
  ASSERT_EQ(engine->poll(done, 1, kLong), 3u);
  EXPECT_EQ(done[0].result, 100);
  EXPECT_EQ(done[1].result, 0);
  EXPECT_EQ(done[2].result, 0x7ffff000);
  EXPECT_EQ(done[2].cookie, 2u);
  EXPECT_EQ(bytes.bytes()[0], std::byte{0xA5});
  EXPECT_EQ(engine->poll(done, 1, kLong), 0u);
}

TEST(IoEngineFactoryTest, EachMemoryFactoryHasADiskOfItsOwn) {
  const test::TempDir directory;
  const File file = File::scratch(directory.path());
  AlignedBuffer bytes(kPage);
  const IoRequest write{.op = IoRequest::Op::kWrite,
                        .fd = file.fd(),
                        .data = bytes.data(),
                        .length = kPage};
  IoRequest read = write;
  read.op = IoRequest::Op::kRead;
  const auto factory = make_engine_factory("memory");
  IoCompletion done;
  const auto result = [&](IoEngine& engine, const IoRequest& request) {
    EXPECT_EQ(engine.submit({&request, 1}), 1u);
    EXPECT_EQ(engine.poll({&done, 1}, 1, kLong), 1u);
    return done.result;
  };
  EXPECT_EQ(result(*factory(1), write), 4096);
  EXPECT_EQ(result(*factory(2), read), 4096);
  EXPECT_EQ(result(*make_engine_factory("memory")(1), read), 0);
}

}  // namespace
}  // namespace torch_ext
