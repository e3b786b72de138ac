// A store in several directories.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/failing_new.h"
#include "support/faulty_engine.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/base/error.h"
#include "torch_ext/store/store.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::kBlock;
using test::TempDir;

class StoreDrivesTest : public test::IoQueueTest {
 protected:
  StoreOptions options(std::vector<int> weights) {
    std::vector<WeightedDirectory> directories;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      directories.push_back({others_.at(i).path(), weights[i]});
    }
    return {.directory = directories, .aio = test::small_blocks()};
  }
  StoreOptions scripted(std::vector<int> weights) {
    StoreOptions result = options(std::move(weights));
    result.engine_factory = test::faulty_factory("threads", script_);
    return result;
  }

  std::array<TempDir, 3> others_;
};

TEST_F(StoreDrivesTest, ExtentsOfEverySizeComeBackAsWritten) {
  for (const auto& weights : {std::vector{1, 1}, {1, 3}, {2, 1, 4}}) {
    Store store(options(weights));
    std::vector<std::shared_ptr<Extent>> extents;
    const std::size_t sizes[] = {0,          1,      4097,
                                 kBlock - 1, kBlock, kBlock + 1,
                                 5 * kBlock, 100000, 1 << 20};
    for (const std::size_t size : sizes) {
      extents.push_back(store.allocate(size));
      AlignedBuffer memory(extents.back()->padded_size());
      test::fill_pattern(memory.bytes(), size);
      store.write(extents.back(), 0, memory.bytes()).wait();
    }
    for (std::size_t i = 0; i < extents.size(); ++i) {
      AlignedBuffer memory(extents[i]->padded_size());
      store.read(extents[i], 0, memory.bytes()).wait();
      EXPECT_TRUE(test::holds_pattern(memory.bytes(), sizes[i]));
    }
  }
}

TEST_F(StoreDrivesTest, PartsAreReadWhereTheWholeWasWritten) {
  Store store(options({3, 2}));
  static_cast<void>(store.allocate(kBlock));  // The next begins elsewhere.
  auto extent = store.allocate(7 * kBlock + 4096);
  AlignedBuffer whole(extent->padded_size());
  AlignedBuffer part(extent->padded_size());
  test::fill_pattern(whole.bytes(), 1);
  store.write(extent, 0, whole.bytes()).wait();
  for (std::size_t first = 0; first < 8; ++first) {
    for (std::size_t last = first + 1; last <= 8; ++last) {
      const std::size_t begin = first * kBlock;
      const std::size_t end = std::min(last * kBlock, whole.bytes().size());
      const auto bytes = part.bytes().subspan(0, end - begin);
      store.read(extent, begin, bytes).wait();
      EXPECT_TRUE(
          std::ranges::equal(bytes, whole.bytes().subspan(begin, end - begin)));
    }
  }
}

TEST_F(StoreDrivesTest, BlocksAreSharedOutByWeightAlsoOfSmallExtents) {
  Store store(scripted({3, 1}));
  AlignedBuffer memory(kBlock);
  std::vector<std::shared_ptr<Extent>> extents;
  for (int i = 0; i < 40; ++i) {
    extents.push_back(store.allocate(kBlock));
    store.write(extents.back(), 0, memory.bytes()).wait();
  }
  std::map<int, int> requests;
  for (const IoRequest& request : script_->log()) ++requests[request.fd];
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests.begin()->second * requests.rbegin()->second, 30 * 10);
}

// TileLanes calls with a lock that its callback takes.
TEST_F(StoreDrivesTest, WhereMemoryRunsOutAnExtentCanEnd) {
  Store store(scripted({1, 1, 1}));
  auto extent = store.allocate(6 * kBlock);
  const auto next = store.allocate(6 * kBlock);
  const test::FailingNew failing(0);
  extent.reset();
  EXPECT_EQ(store.stats().allocated, 6 * kBlock);
}

TEST_F(StoreDrivesTest,
       WhereMemoryRunsOutNothingHasBegunAndNobodyIsCalledBack) {
  Store store(scripted({1, 1, 1}));
  const auto extent = store.allocate(6 * kBlock);
  AlignedBuffer memory(6 * kBlock);
  for (std::size_t good = 0;; ++good) {
    std::atomic<bool> called = false;
    const std::size_t before = script_->requests();
    Store::Done done = [&](std::exception_ptr) { called = true; };
    Ticket ticket;
    bool thrown = false;
    {
      const test::FailingNew failing(good);
      try {
        ticket = store.write(extent, 0, memory.bytes(), std::move(done));
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
    }
    ticket.wait();
    EXPECT_EQ(called, !thrown) << good;
    if (!thrown) break;
    EXPECT_EQ(script_->requests(), before) << good;
    ASSERT_LT(good, 1000u);
  }
}

TEST_F(StoreDrivesTest, ALongOperationIsOneRequestPerBlockAndGoesToAllDrives) {
  Store store(scripted({1, 1, 1}));
  auto extent = store.allocate(6 * kBlock);
  AlignedBuffer memory(6 * kBlock);
  script_->set_plan(test::from(0, Fault::held()));
  const Ticket ticket = store.write(extent, 0, memory.bytes());
  while (script_->held() < 6) std::this_thread::yield();
  EXPECT_FALSE(ticket.done());
  std::map<int, std::vector<std::uint64_t>> offsets;
  for (const IoRequest& request : script_->log()) {
    EXPECT_EQ(request.length, kBlock);
    offsets[request.fd].push_back(request.offset);
  }
  EXPECT_EQ(offsets.size(), 3u);
  for (const auto& [fd, of_file] : offsets) {
    EXPECT_EQ(of_file, (std::vector<std::uint64_t>{
                           Store::kHeadBytes, Store::kHeadBytes + kBlock}));
  }
  script_->release_all();
  ticket.wait();
  EXPECT_EQ(store.stats().write_ops, 1u);
  EXPECT_EQ(store.stats().bytes_written, 6 * kBlock);
}

TEST_F(StoreDrivesTest, DirectoriesOfOneDeviceShareAQueueAndOthersDoNot) {
  const TempDir elsewhere("/dev/shm");
  StoreOptions shared = scripted({1, 1, 1});
  {
    Store store(shared);
    EXPECT_EQ(script_->engines(), 1u);
  }
  shared.directory.all().push_back({elsewhere.path(), 1});
  Store store(shared);
  EXPECT_EQ(script_->engines(), 2u);
}

TEST_F(StoreDrivesTest, AFailedDriveIsNamedOnceAllRequestsHaveEnded) {
  Store store(scripted({1, 1}));
  auto extent = store.allocate(8 * kBlock);
  AlignedBuffer memory(8 * kBlock);
  store.write(extent, 0, memory.bytes()).wait();
  const int second = [this] {
    std::set<int> all;
    for (const IoRequest& request : script_->log()) all.insert(request.fd);
    return *all.rbegin();
  }();
  script_->set_plan([second](std::size_t, const IoRequest& request) {
    return request.fd == second ? Fault::fail(EIO) : Fault::held();
  });
  std::atomic<int> calls = 0;
  const Ticket ticket =
      store.read(extent, 0, memory.bytes(), [&calls](std::exception_ptr error) {
        EXPECT_NE(error, nullptr);
        ++calls;
      });
  while (script_->held() < 4) std::this_thread::yield();
  EXPECT_FALSE(ticket.done());
  EXPECT_EQ(calls, 0);
  script_->release_all();
  const IoFailure failure = test::failure_of(ticket);
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.path.find(others_[1].path().string()), 0u);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(store.stats().read_ops, 0u);
}

TEST_F(StoreDrivesTest, AFullDirectoryIsNamedAndTheOthersTakeTheirSpaceBack) {
  TempDir mount_point;
  if (mount("none", mount_point.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mounting a tmpfs needs root";
  }
  {
    StoreOptions small = options({1});
    small.directory.all().push_back({mount_point.path(), 1});
    Store store(small);
    const IoFailure failure =
        test::failure_of([&store] { store.allocate(4 << 20); });
    EXPECT_EQ(failure.error, ENOSPC);
    EXPECT_EQ(failure.path.find(mount_point.path().string()), 0u);
    EXPECT_EQ(store.stats().allocated, 0u);
    EXPECT_EQ(store.stats().file_size, 0u);  // The disk has it back.
    AlignedBuffer memory(1 << 20);
    test::fill_pattern(memory.bytes(), 1);
    auto extent = store.allocate(1 << 20);
    store.write(extent, 0, memory.bytes()).wait();
    store.read(extent, 0, memory.bytes()).wait();
    EXPECT_TRUE(test::holds_pattern(memory.bytes(), 1));
    EXPECT_EQ(store.stats().allocated, 1u << 20);
  }
  umount(mount_point.path().c_str());
}

TEST_F(StoreDrivesTest, SpaceOfAllDrivesIsUsedAgain) {
  Store store(options({2, 1}));
  std::uint64_t size = 0;
  for (unsigned i = 0; i < 30; ++i) {
    auto extent = store.allocate(100 * kBlock + 4096 * (i % 3u));
    if (i == 3) size = store.stats().file_size;
  }
  EXPECT_EQ(store.stats().allocated, 0u);
  EXPECT_EQ(store.stats().file_size, size);
  EXPECT_NE(store.try_allocate(9 * kBlock), nullptr);
  EXPECT_EQ(store.try_allocate(std::uint64_t{1} << 40), nullptr);
  EXPECT_EQ(store.stats().allocated, 0u);
}

TEST_F(StoreDrivesTest, WhatMakesNoSenseIsRefused) {
  EXPECT_THROW(Store(StoreOptions{}), std::invalid_argument);
  for (const int weight : {0, -1, 101}) {
    try {
      Store store(options({1, weight}));
      ADD_FAILURE() << weight;
    } catch (const std::invalid_argument& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(others_[1].path().string()), std::string::npos)
          << text;
      EXPECT_NE(text.find("1 to 100, got " + std::to_string(weight)),
                std::string::npos)
          << text;
    }
  }
  StoreOptions missing = options({1, 1});
  missing.directory.all()[1].path /= "missing";
  const IoFailure failure =
      test::failure_of([&missing] { Store store(missing); });
  EXPECT_EQ(failure.error, ENOENT);
  EXPECT_EQ(failure.path.find(others_[1].path().string()), 0u);
}

}  // namespace
}  // namespace torch_ext
