#include "store/commit_log.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/cut_point.h"
#include "support/aligned_buffer.h"
#include "support/failing_syscalls.h"
#include "support/faulty_engine.h"
#include "support/forgetful_disk.h"
#include "support/io_queue_test.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "support/trials.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::Fault;
using test::ForgetfulDisk;
using test::TempDir;

constexpr std::size_t kBlock = 4096;
constexpr std::size_t kTile = 2 * kBlock;
constexpr std::size_t kTiles = 3;

StoreOptions options_for(const std::filesystem::path& directory,
                         IoEngineFactory factory = {}) {
  StoreOptions options{.directory = directory};
  options.aio.block_size = kBlock;
  options.aio.queue_depth = 2;
  options.aio.thread_count = 1;
  options.engine = "threads";  // Contexts of libaio take long to destroy.
  options.engine_factory = std::move(factory);
  return options;
}

StoreOptions to_open(StoreOptions options, const StoreName& name = {}) {
  for (std::size_t i = 0; i < options.directory.all().size(); ++i) {
    options.files.push_back(name.of_file(i));
  }
  return options;
}

/// A store whose tiles are rewritten in each step, as an optimizer does it.
class Training {
 public:
  explicit Training(const StoreOptions& options)
      : store_(options),
        log_(std::make_unique<CommitLog>(store_, StoreName())) {
    tiles_.resize(kTiles);
  }

  /// Goes on from the last commit. Throws if a tile of it is not what it was.
  static std::unique_ptr<Training> resume(const StoreOptions& options) {
    std::unique_ptr<Training> training(new Training(to_open(options)));
    training->log_ = CommitLog::open(training->store_, StoreName());
    const Commit& last = training->log_->commits().back();
    training->step_ = last.step;
    training->tiles_ = last.extents;
    training->check();
    return training;
  }

  void step() {
    ++step_;
    for (std::size_t i = 0; i < kTiles; ++i) {
      if (tiles_[i] == nullptr || is_committed(tiles_[i])) {
        tiles_[i] = store_.allocate(kTile);
      }
      AlignedBuffer bytes(kTile);
      test::fill_pattern(bytes.bytes(), pattern(i));
      store_.write(tiles_[i], 0, bytes.bytes()).wait();
    }
  }

  void commit(std::size_t keep = 1) {
    log_->add(step_, "step " + std::to_string(step_), tiles_, keep);
  }

  void check() {
    for (std::size_t i = 0; i < kTiles; ++i) {
      AlignedBuffer bytes(kTile);
      store_.read(tiles_[i], 0, bytes.bytes()).wait();
      if (!test::holds_pattern(bytes.bytes(), pattern(i))) {
        throw std::runtime_error("tile " + std::to_string(i) + " of step " +
                                 std::to_string(step_) + " is another's");
      }
    }
    EXPECT_EQ(log_->commits().back().document, "step " + std::to_string(step_));
  }

  std::uint64_t step_number() const { return step_; }
  std::uint64_t generation() const { return log_->commits().back().generation; }
  CommitLog& log() { return *log_; }
  Store& store() { return store_; }

 private:
  std::uint64_t pattern(std::size_t tile) const {
    return step_ * kTiles + tile;
  }
  bool is_committed(const std::shared_ptr<Extent>& extent) const {
    return std::ranges::any_of(log_->commits(), [&](const Commit& commit) {
      return std::ranges::count(commit.extents, extent) > 0;
    });
  }

  Store store_;
  std::unique_ptr<CommitLog> log_;
  std::vector<std::shared_ptr<Extent>> tiles_;
  std::uint64_t step_ = 0;
};

class CommitLogTest : public testing::Test {
 protected:
  ~CommitLogTest() override { on_cut_point = nullptr; }

  StoreOptions options() const { return options_for(dir_.path()); }
  std::filesystem::path file() const {
    return dir_.path() / StoreName().of_file(0);
  }
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(dir_.path()), {}));
  }

  TempDir dir_;
};

TEST_F(CommitLogTest, WhatWasCommittedIsThereForTheNextProcess) {
  {
    Training training(options());
    training.step();
    EXPECT_EQ(files(), 0u) << "scratch has no name";
    training.commit();
    EXPECT_EQ(files(), 1u);
    training.step();
    training.step();
    training.commit();
    training.step();  // This is lost.
  }
  const auto resumed = Training::resume(options());
  EXPECT_EQ(resumed->step_number(), 3u);
  EXPECT_EQ(resumed->generation(), 2u);
  resumed->step();
  resumed->commit();
  EXPECT_EQ(resumed->generation(), 3u);
}

// Every tile of the last commit is on the drive before its root, whatever the
// drive forgets, and its root before anybody is told.
TEST_F(CommitLogTest, ACutAtAnyWriteLosesNoCommit) {
  ForgetfulDisk disk;
  /// After so many events, this step had been acknowledged.
  std::map<std::size_t, std::uint64_t> acknowledged;
  static const ForgetfulDisk* looked_at;
  static std::size_t named;
  looked_at = &disk;
  named = 0;
  {
    Training training(options_for(dir_.path(), disk.factory()));
    on_cut_point = [](std::string_view name) {
      if (name == "root flushed" && named == 0) named = looked_at->events();
    };
    for (const bool commits : {true, false, true, true, false, true}) {
      training.step();
      if (!commits) continue;
      training.commit();
      acknowledged[disk.events()] = training.step_number();
    }
    training.step();
    on_cut_point = nullptr;
  }
  ASSERT_GT(named, 0u);
  const std::size_t most_bits = test::all_faults() ? 14
                                : test::kSanitized ? 5
                                                   : 9;
  std::mt19937_64 random(1);
  std::size_t states = 0;
  const auto look = [&](std::size_t events, std::uint64_t least,
                        const ForgetfulDisk::Survives& survives) {
    const auto left = disk.after_cut(events, survives);
    ++states;
    try {
      const auto resumed =
          Training::resume(options_for(dir_.path(), left->factory()));
      ASSERT_GE(resumed->step_number(), least) << "after event " << events;
      if (states % 16 != 0) return;
      resumed->step();
      resumed->commit();
    } catch (const std::exception& error) {
      FAIL() << "after event " << events << ": " << error.what();
    }
  };
  for (std::size_t events = named; events <= disk.events(); ++events) {
    std::uint64_t least = 0;
    for (const auto& [at, step] : acknowledged) {
      if (at <= events) least = step;
    }
    // Each block that was not synced may be there or not.
    std::map<std::size_t, std::size_t> first_bit;
    std::size_t bits = 0;
    for (const ForgetfulDisk::Unsynced& write : disk.unsynced(events)) {
      first_bit[write.event] = bits;
      bits += write.blocks;
    }
    ASSERT_LE(bits, 64u);
    const std::size_t all = std::size_t{1} << std::min(bits, most_bits);
    // Then each block in turn is torn, twice.
    for (std::size_t i = 0; i < all + 2 * bits; ++i) {
      const std::uint64_t drawn = bits <= most_bits && i < all ? i : random();
      const std::size_t torn = i < all ? bits : (i - all) / 2;
      look(events, least,
           [&](const ForgetfulDisk::Unsynced& write, std::size_t block) {
             const std::size_t bit = first_bit[write.event] + block;
             if (bit == torn) return ForgetfulDisk::Kept::kTorn;
             return (drawn >> bit & 1) != 0 ? ForgetfulDisk::Kept::kAll
                                            : ForgetfulDisk::Kept::kNothing;
           });
      if (HasFatalFailure()) return;
    }
  }
  std::printf("%zu states of the drive\n", states);
}

TEST_F(CommitLogTest, ItsExtentsAreKeptAsLongAsItIs) {
  Training training(options());
  training.step();
  training.commit(2);
  training.step();
  training.commit(2);
  EXPECT_EQ(training.log().commits().size(), 2u);
  training.step();
  training.commit(2);
  ASSERT_EQ(training.log().commits().size(), 2u);
  EXPECT_EQ(training.log().commits().front().step, 2u);
  training.step();
  training.commit();
  EXPECT_EQ(training.log().commits().size(), 1u);
}

TEST_F(CommitLogTest, KeptCommitsAreFoundAgain) {
  {
    Training training(options());
    for (int i = 0; i < 4; ++i) {
      training.step();
      training.commit(3);
    }
  }
  const auto resumed = Training::resume(options());
  std::vector<std::uint64_t> steps;
  for (const Commit& commit : resumed->log().commits()) {
    steps.push_back(commit.step);
    EXPECT_EQ(commit.document, "step " + std::to_string(commit.step));
    for (const auto& extent : commit.extents) {
      AlignedBuffer bytes(kTile);
      resumed->store().read(extent, 0, bytes.bytes()).wait();
    }
  }
  EXPECT_EQ(steps, (std::vector<std::uint64_t>{2, 3, 4}));
}

// A process that goes on from an older commit, and dies before anybody refers
// to its own ones, must find that older commit again: however often it happens.
TEST_F(CommitLogTest, ARenewedCommitIsTheLastToGo) {
  const auto generations = [](Training& training) {
    std::vector<std::uint64_t> all;
    for (const Commit& commit : training.log().commits()) {
      all.push_back(commit.generation);
    }
    return all;
  };
  using Generations = std::vector<std::uint64_t>;
  {
    Training training(options());
    for (int i = 0; i < 3; ++i) {
      training.step();
      training.commit(3);
    }
  }
  for (std::uint64_t next = 4; next < 8; ++next) {
    const auto again = Training::resume(options());
    again->log().renew(1);
    again->step();
    again->commit(3);
    const Generations all = generations(*again);
    ASSERT_EQ(all, (Generations{next - 1, 1, next}));
  }
  const auto last = Training::resume(options());
  EXPECT_EQ(generations(*last), (Generations{6, 1, 7}));
  for (const Commit& commit : last->log().commits()) {
    EXPECT_EQ(commit.document, "step " + std::to_string(commit.step));
    for (const auto& extent : commit.extents) {
      AlignedBuffer bytes(kTile);
      last->store().read(extent, 0, bytes.bytes()).wait();
    }
  }
  // Without that it would be gone, as any other.
  last->step();
  last->commit(3);
  last->step();
  last->commit(3);
  EXPECT_EQ(generations(*last), (Generations{7, 8, 9}));
}

TEST_F(CommitLogTest, ASecondOwnerIsRefused) {
  Training training(options());
  training.step();
  training.commit();
  const auto resume = [this] { Training::resume(options()); };
  EXPECT_EQ(test::failure_of(resume).error, EAGAIN);
}

// A worker of a data loader may outlive the trainer that forked it.
TEST_F(CommitLogTest, AForkedChildDoesNotKeepTheStore) {
  int ends[2];
  int began[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(pipe(began), 0);
  pid_t child = 0;
  char byte = 0;
  {
    Training training(options());
    training.step();
    training.commit();
    child = fork();
    if (child == 0) {
      close(ends[1]);
      static_cast<void>(write(began[1], &byte, 1) == 1);
      static_cast<void>(read(ends[0], &byte, 1) == 0);
      _exit(0);
    }
  }
  close(ends[0]);
  // The child lets go when it first runs.
  ASSERT_EQ(read(began[0], &byte, 1), 1);
  close(began[0]);
  close(began[1]);
  EXPECT_NO_THROW(Training::resume(options()));
  close(ends[1]);
  waitpid(child, nullptr, 0);
}

// It has a copy of the lock until it runs. This one never gives it up, since a
// bare system call does not run what a fork should.
TEST_F(CommitLogTest, AChildThatHasNotRunYetDoesNotKeepTheStore) {
  long child = 0;
  {
    Training training(options());
    training.step();
    training.commit();
    child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    while (child == 0) pause();
  }
  EXPECT_NO_THROW(Training::resume(options()));
  kill(static_cast<pid_t>(child), SIGKILL);
  waitpid(static_cast<pid_t>(child), nullptr, 0);
}

TEST_F(CommitLogTest, AnotherRunsStoreIsNotReplaced) {
  {
    Training first(options());
    first.step();
    first.commit();
  }
  Training second(options());
  second.step();
  second.step();
  const IoFailure failure = test::failure_of([&] { second.commit(); });
  EXPECT_EQ(failure.error, EEXIST);
  EXPECT_NE(failure.detail.find("another run"), std::string::npos);
  EXPECT_EQ(Training::resume(options())->step_number(), 1u);
}

/// Changes bytes of a file.
void damage(const std::filesystem::path& path, std::uint64_t offset,
            std::size_t length = 1) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  std::string bytes(length, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(length));
  for (char& byte : bytes) byte = static_cast<char>(byte ^ 1);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(bytes.data(), static_cast<std::streamsize>(length));
}

TEST_F(CommitLogTest, TheSecondCopyOfATableIsTaken) {
  {
    Training training(options());
    training.step();
    training.commit();
  }
  AlignedBuffer root(kTile);
  std::ifstream(file(), std::ios::binary)
      .seekg(static_cast<std::streamoff>(kRootOffsets[0]))
      .read(reinterpret_cast<char*>(root.data()), kTile);
  AlignedBuffer header(kTile);
  std::ifstream(file(), std::ios::binary)
      .read(reinterpret_cast<char*>(header.data()), kTile);
  const auto found =
      decode_root(root.bytes(), decode_header(header.bytes()).store, 1);
  ASSERT_TRUE(found);
  damage(file(), found->tables[0].offsets[0] + 9);
  EXPECT_EQ(Training::resume(options())->step_number(), 1u);
  damage(file(), found->tables[1].offsets[0] + 9);
  const IoFailure failure =
      test::failure_of([this] { Training::resume(options()); });
  EXPECT_EQ(failure.error, EIO);
  EXPECT_NE(failure.detail.find("both copies"), std::string::npos);
}

TEST_F(CommitLogTest, ADamagedTileIsSeenWhenItIsRead) {
  std::uint64_t at = 0;
  {
    Training training(options());
    training.step();
    training.commit();
    at = training.log().commits().back().extents[1]->offset();
  }
  damage(file(), at + 100);
  const IoFailure failure =
      test::failure_of([this] { Training::resume(options()); });
  EXPECT_EQ(failure.error, EIO);
  EXPECT_EQ(failure.offset, at);
}

// Whatever byte is changed, what is found is a whole commit, or an error says
// what is wrong.
TEST_F(CommitLogTest, NoChangedByteIsTakenForAnotherCommit) {
  std::vector<std::uint64_t> places;
  {
    Training training(options());
    for (int i = 0; i < 2; ++i) {
      training.step();
      training.commit(2);
    }
  }
  for (const std::uint64_t begin :
       {std::uint64_t{0}, kRootOffsets[0], kRootOffsets[1]}) {
    for (std::uint64_t i = 0; i < 120; ++i) places.push_back(begin + i);
    for (std::uint64_t i = 4060; i < 4096; ++i) places.push_back(begin + i);
  }
  const std::uint64_t size = std::filesystem::file_size(file());
  for (std::uint64_t at = Store::kHeadBytes; at < Store::kHeadBytes + 64 * 1024;
       at += 131) {
    if (at < size) places.push_back(at);
  }
  std::size_t refused = 0;
  for (const std::uint64_t at : places) {
    damage(file(), at);
    try {
      const auto resumed = Training::resume(options());
      EXPECT_GE(resumed->step_number(), 1u);
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO) << error.what();
      ++refused;
    } catch (const std::invalid_argument&) {
      ++refused;
    }
    damage(file(), at);  // As it was.
  }
  EXPECT_GT(refused, 100u);
  EXPECT_EQ(Training::resume(options())->step_number(), 2u);
}

TEST_F(CommitLogTest, ATruncatedFileIsRefused) {
  {
    Training training(options());
    training.step();
    training.commit();
  }
  const std::uint64_t size = std::filesystem::file_size(file());
  for (std::uint64_t left = size / 4096 * 4096; left > 0;
       left = left / 2 / 4096 * 4096) {
    std::filesystem::resize_file(file(), left);
    try {
      EXPECT_EQ(Training::resume(options())->step_number(), 1u);
    } catch (const IoError& error) {
      EXPECT_EQ(error.error(), EIO) << error.what();
    } catch (const std::invalid_argument&) {
    }
  }
}

/// A first commit of so many drives, whose call `index` of a kind fails: of
/// those that give the files their names.
class CommitNamesTest : public CommitLogTest,
                        public testing::WithParamInterface<std::size_t> {
 protected:
  struct Failing {
    long number;
    std::size_t index;
    int error;
  };
  static constexpr std::size_t kCallsOfADrive = 2;  ///< fsync's.

  std::filesystem::path file_of(std::size_t drive) const {
    return dirs_[drive].path() / StoreName().of_file(drive);
  }
  bool is_named(std::size_t drive) const {
    return std::filesystem::exists(file_of(drive));
  }
  StoreOptions options_on(ForgetfulDisk& disk) const {
    StoreOptions options = options_for(dirs_[0].path(), disk.factory());
    if (GetParam() == 2) options.directory.all().push_back({dirs_[1].path()});
    return options;
  }
  /// What the error must say. The first drive comes last.
  std::filesystem::path path_of(const Failing& failing) const {
    const bool link = failing.number == SYS_linkat;
    const std::size_t of =
        link ? failing.index : failing.index / kCallsOfADrive;
    const std::size_t drive = GetParam() - 1 - of;
    const bool of_file = link || failing.index % kCallsOfADrive == 0;
    return of_file ? file_of(drive) : dirs_[drive].path();
  }

  /// Returns what is wrong.
  std::string suffer(const Failing& failing, bool goes_on,
                     const std::function<void()>& repair) const {
    ForgetfulDisk disk;  // Its syncs are no system calls.
    bool is_whole = false;
    {
      Training training(options_on(disk));
      training.step();
      IoFailure failure;
      try {
        training.commit();
      } catch (const IoError& error) {
        failure = error.failure();
      }
      repair();
      if (failure.error != failing.error) return "it is another error";
      if (failure.path != path_of(failing)) return "its path: " + failure.path;
      is_whole = is_named(0);
      if (is_whole && failing.number == SYS_linkat) return "there is a name";
      training.step();
      if (goes_on) {
        training.commit();
        training.check();
      }
    }
    for (std::size_t i = 0; i < GetParam(); ++i) {
      if (is_named(i) == (goes_on || is_whole)) continue;
      return file_of(i).string() +
             (is_named(i) ? " was left" : " is not there");
    }
    if (!goes_on && !is_whole) return "";
    const auto resumed = Training::resume(options_on(disk));
    return resumed->step_number() == (goes_on ? 2u : 1u) ? "" : "another step";
  }

  std::array<TempDir, 2> dirs_;
};

INSTANTIATE_TEST_SUITE_P(Drives, CommitNamesTest,
                         testing::Values(std::size_t{1}, std::size_t{2}),
                         [](const auto& info) {
                           return std::to_string(info.param);
                         });

TEST_P(CommitNamesTest, ANameThatFailsIsGivenByTheNextCommitOrTakenBack) {
  const test::SyscallTrial probe = test::try_syscall(
      {.number = SYS_linkat, .error = EIO}, [](const auto&) { return ""; });
  if (!probe.unavailable.empty()) GTEST_SKIP() << probe.unavailable;
  for (const long number : {SYS_linkat, SYS_fsync}) {
    const std::size_t calls =
        GetParam() * (number == SYS_linkat ? 1 : kCallsOfADrive);
    for (std::size_t index = 0; index < calls; ++index) {
      for (const int error : {EIO, ENOSPC, EDQUOT, EROFS}) {
        for (const bool goes_on : {true, false}) {
          const Failing failing{number, index, error};
          const test::SyscallTrial trial =
              test::try_syscall({.number = number,
                                 .error = error,
                                 .index = index,
                                 .for_good = true},
                                [&](const auto& repair) {
                                  return suffer(failing, goes_on, repair);
                                });
          EXPECT_EQ(trial.text, "")
              << (number == SYS_linkat ? "linkat " : "fsync ") << index
              << (goes_on ? ", then another commit" : ", then the end");
          EXPECT_TRUE(trial.ended_well);
          EXPECT_GT(trial.failed, 0u);
          for (std::size_t i = 0; i < GetParam(); ++i) {
            std::filesystem::remove(file_of(i));
          }
        }
      }
    }
  }
}

class CommitLogFaultTest : public CommitLogTest {
 protected:
  StoreOptions scripted() {
    return options_for(dir_.path(), test::faulty_factory("threads", script_));
  }
  /// Lets the next requests go well but for those of a kind.
  void fail_syncs(std::set<int> which) {
    auto count = std::make_shared<int>(0);
    script_->set_plan([=](std::size_t, const IoRequest& request) {
      if (request.op != IoRequest::Op::kSync) return Fault();
      return which.contains((*count)++) ? Fault::fail(EIO) : Fault();
    });
  }
  void fail_writes_to_roots() {
    script_->set_plan([](std::size_t, const IoRequest& request) {
      const bool root = request.op == IoRequest::Op::kWrite &&
                        (request.offset == kRootOffsets[0] ||
                         request.offset == kRootOffsets[1]);
      return root ? Fault::fail(EIO) : Fault();
    });
  }
  static int error_of(Training& training) {
    try {
      training.commit();
    } catch (const IoError& error) {
      return error.error();
    }
    return 0;
  }

  std::shared_ptr<test::FaultScript> script_ =
      std::make_shared<test::FaultScript>();
};

TEST_F(CommitLogFaultTest, AfterAFirstFlushThatFailedThereAreNoMoreCommits) {
  {
    Training training(scripted());
    training.step();
    training.commit();
    training.step();
    fail_syncs({0});
    EXPECT_EQ(error_of(training), EIO);
    script_->set_plan(nullptr);
    training.step();
    EXPECT_EQ(error_of(training), EIO);
    EXPECT_EQ(training.log().must_stop(), nullptr) << "steps may go on";
  }
  EXPECT_EQ(Training::resume(options())->step_number(), 1u);
}

TEST_F(CommitLogFaultTest, ARootThatFailedIsBuried) {
  {
    Training training(scripted());
    training.step();
    training.commit();
    training.step();
    fail_syncs({1});
    EXPECT_EQ(error_of(training), EIO);
    EXPECT_EQ(training.log().must_stop(), nullptr);
    EXPECT_EQ(training.generation(), 1u);
    script_->set_plan(nullptr);
    training.step();
    training.step();
  }
  const auto resumed = Training::resume(options());
  EXPECT_EQ(resumed->step_number(), 1u);
  resumed->step();
  resumed->commit();
  EXPECT_EQ(resumed->generation(), 3u) << "2 is not used again";
}

TEST_F(CommitLogFaultTest, ARootOfUnknownFateStopsAll) {
  Training training(scripted());
  training.step();
  training.commit();
  training.step();
  fail_writes_to_roots();
  EXPECT_EQ(error_of(training), EIO);
  EXPECT_NE(training.log().must_stop(), nullptr);
  script_->set_plan(nullptr);
  EXPECT_EQ(error_of(training), EIO);
}

TEST_F(CommitLogFaultTest, ATableThatCannotBeWrittenGoesElsewhere) {
  {
    Training training(scripted());
    training.step();
    training.commit();
    training.step();
    auto failed = std::make_shared<bool>(false);
    script_->set_plan([=](std::size_t, const IoRequest& request) {
      if (request.op != IoRequest::Op::kWrite || *failed) return Fault();
      *failed = true;
      return Fault::fail(EIO);
    });
    training.commit();
    EXPECT_TRUE(*failed);
  }
  EXPECT_EQ(Training::resume(options())->step_number(), 2u);
}

// Each request of a commit fails in turn.
TEST_F(CommitLogFaultTest, ACommitThatFailsLeavesTheOneBefore) {
  for (std::size_t which = 0;; ++which) {
    std::filesystem::remove(file());
    bool failed = false;
    {
      Training training(scripted());
      training.step();
      training.commit();
      training.step();
      const std::size_t first = script_->requests();
      script_->set_plan(test::only(first + which, Fault::fail(ENOSPC)));
      failed = error_of(training) == ENOSPC;
      const bool reached = script_->requests() > first + which;
      script_->set_plan(nullptr);
      if (!reached) break;
      EXPECT_TRUE(failed) << "request " << which;
    }
    EXPECT_EQ(Training::resume(options())->step_number(), 1u)
        << "request " << which;
  }
}

}  // namespace
}  // namespace torch_ext
