// How a commit becomes durable, and how it is found again.
//
// A store has two roots, in the head of its first file. A root refers to a
// table, and the table to extents. Let c be the last commit. The next one, g,
// goes on so:
//
// 1. The owner has written g's extents. None of them belongs to c, or they are
//    as they were in c.
// 2. The table is written, twice.
// 3. All files are flushed.
// 4. The root of g is written to the slot that does not have the root of c.
// 5. The first file is flushed: g is the last commit.
// 6. The first time, the files get their names, the first one last. So a file
//    that is found by its name has a commit.
// 7. What only commits before g need may be written again.
//
// Several processes have a store each, and commit together. Each goes as far as
// 6. Then they vote: if one of them has failed, the others write a tombstone
// over the root of g, and c is the last commit still. No number is used twice.
// Whoever resumes takes the newest generation that all have: at least c, since
// no process does 7 before all have g.
//
// At a crash before 5 has ended, the slot of c is as it was, and so is all that
// it refers to. The other slot has an older root, nothing that passes for one,
// or the root of g; all that g refers to was flushed before that was written.
// tests/store/commit_model_test.cpp looks at every state that a crash can
// leave; it shows too that no step can be left out.
//
// If 4 or 5 fails, the root of g may be there or not. It is overwritten with a
// tombstone. If that fails too, the drive has c or g, and whoever resumes takes
// g. So nobody may write to any extent any more: must_stop().
//
// If 3 fails, the drive may have lost any write of g, and a second flush would
// not say so. So there are no further commits of this store.

#include "commit_log.h"

#include <dirent.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <ctime>
#include <filesystem>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/cut_point.h"
#include "base/error_detail.h"
#include "memory/pages.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

StoreId random_id() {
  StoreId id;
  if (getrandom(id.data(), id.size(), 0) != static_cast<ssize_t>(id.size())) {
    throw IoError({.op = "getrandom", .error = errno});
  }
  return id;
}

std::int64_t seconds_since_1970() {
  return static_cast<std::int64_t>(std::time(nullptr));
}

constexpr const char* kTaken =
    "a store of another run is there: resume it, remove it, or give another "
    "directory";
constexpr const char* kTakenInPart =
    "it is of another store, whose first directory has no file: a run ended "
    "while it made its first commit, and you may remove this file; or that "
    "directory is not there";

struct CloseDirectory {
  void operator()(DIR* list) const { closedir(list); }
};

[[noreturn]] void fail_damaged(const std::string& path,
                               const std::string& detail) {
  throw IoError(
      {.op = "read commit", .path = path, .error = EIO, .detail = detail});
}

}  // namespace

std::string StoreName::of_file(std::size_t directory) const {
  return name + ".r" + std::to_string(rank) + "-of-" + std::to_string(world) +
         ".e" + std::to_string(epoch) + ".d" + std::to_string(directory) +
         ".store";
}

std::vector<StoreName::File> StoreName::files_in(
    const std::filesystem::path& directory) const {
  std::vector<File> files;
  const std::unique_ptr<DIR, CloseDirectory> list(
      opendir(directory.empty() ? "." : directory.c_str()));
  if (list == nullptr) return files;  // Whoever opens a file says why.
  while (const dirent* const entry = readdir(list.get())) {
    const std::string_view file = entry->d_name;
    if (!file.starts_with(name)) continue;
    std::string_view rest = file.substr(name.size());
    const auto number_after = [&rest](std::string_view before) {
      std::uint32_t number = 0;
      if (!rest.starts_with(before)) return number;
      rest.remove_prefix(before.size());
      const char* const end = rest.data() + rest.size();
      const auto parsed = std::from_chars(rest.data(), end, number);
      rest.remove_prefix(static_cast<std::size_t>(parsed.ptr - rest.data()));
      return number;
    };
    File found{*this, 0};
    found.store.rank = number_after(".r");
    found.store.world = number_after("-of-");
    found.store.epoch = number_after(".e");
    found.directory = number_after(".d");
    // What does not look like it gives another name.
    if (file == found.store.of_file(found.directory)) files.push_back(found);
  }
  return files;
}

StoreName StoreName::newest_in(const std::filesystem::path& directory) const {
  StoreName newest = *this;
  bool any = false;
  for (const File& file : files_in(directory)) {
    StoreName other = *this;
    other.epoch = file.store.epoch;
    if (file.directory != 0 || file.store != other) continue;
    if (!any || other.epoch > newest.epoch) newest = other;
    any = true;
  }
  return newest;
}

CommitLog::CommitLog(Store& store, StoreName name, std::optional<StoreId> id)
    : store_(store), name_(std::move(name)), id_(id) {}

CommitLog::~CommitLog() {
  const bool is_without = commits_.empty() && must_stop_ == nullptr;
  if (gave_names_ && (!named_ || is_without)) take_names();
}

// What the first commit does before all else. It leaves no trace outside.
void CommitLog::begin() {
  if (header_.granule != 0) return;
  StoreHeader header{
      .store = id_ ? *id_ : random_id(),
      .run = random_id(),
      .rank = name_.rank,
      .world = name_.world,
      .epoch = name_.epoch,
      .granule = store_.granule(),
      .block_size = static_cast<std::uint64_t>(store_.config().block_size),
      .weights = store_.weights()};
  const std::size_t bytes = align_up(kHeaderBytes, store_.granule());
  const Pages memory(bytes);
  for (std::size_t i = 0; i < store_.directories(); ++i) {
    header.drive = static_cast<std::uint32_t>(i);
    const std::vector<std::byte> encoded = encode(header);
    std::ranges::copy(encoded, memory.first(bytes).data());
    store_.write_head(i, 0, memory.first(bytes)).wait();
  }
  // A root that is read must have been written.
  const Pages zeros(bytes);
  for (const std::uint64_t offset : kRootOffsets) {
    store_.write_head(0, offset, zeros.first(bytes)).wait();
  }
  cut_point("header written");
  lock_ = FileLock(store_.file());
  header.drive = 0;
  header_ = std::move(header);
}

std::vector<Commit> CommitLog::add(std::uint64_t step, std::string document,
                                   std::vector<std::shared_ptr<Extent>> extents,
                                   std::size_t keep, std::uint64_t least,
                                   const Vote& vote, std::int64_t time) {
  if (keep < 1) {
    throw std::invalid_argument("commit: keep must be at least 1, got 0");
  }
  check();
  begin();

  generation_ = std::max(generation_ + 1, least);
  Commit commit{generation_, step, time != 0 ? time : seconds_since_1970(),
                std::move(document), std::move(extents)};
  CommitTable table{.store = header_.store,
                    .generation = commit.generation,
                    .step = step,
                    .time = commit.time};
  const std::size_t kept = std::min(keep - 1, commits_.size());
  for (std::size_t i = commits_.size() - kept; i < commits_.size(); ++i) {
    CommitTable::Earlier& earlier = table.earlier.emplace_back();
    earlier.generation = commits_[i].generation;
    earlier.step = commits_[i].step;
    earlier.table_checksum = tables_[i].checksum;
    for (const auto& copy : tables_[i].copies) {
      earlier.tables.push_back(copy->place());
    }
  }
  table.document = commit.document;
  for (const auto& extent : commit.extents) {
    table.extents.push_back({extent->place(), extent->checksums()});
  }

  // Later commits find the space of those that have gone.
  spare_tables_.clear();
  Tables tables = write_tables(encode(table));
  if (commits_.empty()) {
    for (const auto& copy : tables.copies) {
      spare_tables_.push_back(store_.allocate(copy->size() * 5 / 4));
    }
  }
  cut_point("table written");
  try {
    store_.sync();
  } catch (...) {
    refusal_ = with_detail(
        std::current_exception(),
        "what was written since the last commit may be lost, so this store "
        "takes no further commits; the last one is as it was");
    std::rethrow_exception(refusal_);
  }
  cut_point("table flushed");

  const std::size_t slot = 1 - slot_;
  StoreRoot root{.store = header_.store,
                 .generation = commit.generation,
                 .step = step,
                 .table_checksum = tables.checksum};
  for (const auto& copy : tables.copies) root.tables.push_back(copy->place());
  try {
    write_root(root, slot);
  } catch (...) {
    bury(commit.generation, slot, std::current_exception());
  }
  cut_point("root flushed");
  if (vote) take_vote(vote, commit.generation, slot);
  cut_point("voted");

  commits_.push_back(std::move(commit));
  tables_.push_back(std::move(tables));
  slot_ = slot;
  if (!vote) give_names();
  cut_point("committed");

  std::vector<Commit> dropped;
  while (commits_.size() > keep) {
    dropped.push_back(std::move(commits_.front()));
    commits_.erase(commits_.begin());
    tables_.erase(tables_.begin());
  }
  return dropped;
}

void CommitLog::renew(std::uint64_t generation) {
  const auto found =
      std::ranges::find(commits_, generation, &Commit::generation);
  if (found == commits_.end()) return;
  const auto place = found - commits_.begin();
  std::rotate(found, found + 1, commits_.end());
  std::rotate(tables_.begin() + place, tables_.begin() + place + 1,
              tables_.end());
}

CommitLog::Tables CommitLog::write_tables(const std::vector<std::byte>& bytes) {
  const std::uint64_t padded = align_up(bytes.size(), store_.granule());
  const Pages memory(padded);
  std::ranges::copy(bytes, memory.first(padded).data());
  Tables tables{checksum(bytes), {}};
  for (int copy = 0; copy < 2; ++copy) {
    tables.copies.push_back(write_table(memory.first(padded), bytes.size()));
  }
  return tables;
}

std::shared_ptr<Extent> CommitLog::write_table(
    std::span<const std::byte> padded, std::uint64_t bytes) {
  for (bool again = false;; again = true) {
    auto extent = store_.allocate(bytes);
    try {
      store_.write(extent, 0, padded).wait();
      bytes_written_ += padded.size();
      cut_point("copy written");
      return extent;
    } catch (const IoError& error) {
      // The store does not offer that space again.
      if (again || error.error() != EIO) throw;
    }
  }
}

void CommitLog::write_root(const StoreRoot& root, std::size_t slot) {
  const std::size_t bytes = align_up(kHeaderBytes, store_.granule());
  const Pages memory(bytes);
  std::ranges::copy(encode(root), memory.first(bytes).data());
  store_.write_head(0, kRootOffsets[slot], memory.first(bytes)).wait();
  bytes_written_ += bytes;
  cut_point("root written");
  store_.sync(0);
}

// Returns if all processes have the commit.
void CommitLog::take_vote(const Vote& vote, std::uint64_t generation,
                          std::size_t slot) {
  try {
    // So that no process counts on a commit that could not be found.
    give_names();
  } catch (...) {
    bury(generation, slot, std::current_exception());
  }
  bool all = false;
  try {
    all = vote();
  } catch (...) {
    must_stop_ = with_detail(
        std::current_exception(),
        "whether all processes have this commit is not known, so nothing may "
        "be written to the store; resume from what is there");
    std::rethrow_exception(must_stop_);
  }
  if (all) return;
  bury(generation, slot, std::make_exception_ptr(StateError(kOthersFailed)));
}

// Always throws.
void CommitLog::bury(std::uint64_t generation, std::size_t slot,
                     const std::exception_ptr& error) {
  try {
    write_root({.store = header_.store,
                .kind = StoreRoot::Kind::kTombstone,
                .generation = generation},
               slot);
  } catch (...) {
    must_stop_ = with_detail(
        error,
        "whether this commit is on the drive is not known, so nothing may be "
        "written there; resume from what is there");
    std::rethrow_exception(must_stop_);
  }
  std::rethrow_exception(error);
}

void CommitLog::check() const {
  if (must_stop_ != nullptr) std::rethrow_exception(must_stop_);
  if (refusal_ != nullptr) std::rethrow_exception(refusal_);
  for (std::size_t i = 0; i < store_.directories(); ++i) {
    const File& file = store_.file(i);
    if (named_ && file.presence().links == 0) {
      throw IoError({.op = "commit",
                     .path = file.path(),
                     .error = ENOENT,
                     .detail = "the file was removed, so nobody could find "
                               "this commit"});
    }
    const auto parent = std::filesystem::path(file.path()).parent_path();
    const auto name = parent / name_.of_file(i);
    const auto there = File::identify(name);
    if (named_ || !there || *there == file.identity()) continue;
    const auto first = std::filesystem::path(store_.file().path())
                           .replace_filename(name_.of_file(0));
    throw IoError({.op = "commit",
                   .path = name.string(),
                   .error = EEXIST,
                   .detail = File::identify(first) ? kTaken : kTakenInPart});
  }
}

void CommitLog::give_names() {
  if (named_) return;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < store_.directories(); ++i) {
    names.push_back(name_.of_file(i));
  }
  gave_names_ = true;
  try {
    store_.give_names(names);
  } catch (const IoError& error) {
    IoFailure failure = error.failure();
    if (failure.error == EEXIST) {
      failure.detail = kTaken;
    }
    throw IoError(std::move(failure));
  }
  named_ = true;
}

// After names that failed: without the first file nobody finds the others. And
// after first commits that failed, here or in another process: a store of
// tombstones would be in the way of the next run. It comes at the end and not
// with the error. A file that has lost its only name gets no other one, and the
// next commit gives the rest of the names.
void CommitLog::take_names() noexcept {
  const auto path_of = [this](std::size_t i) {
    return std::filesystem::path(store_.file(i).path())
        .replace_filename(name_.of_file(i));
  };
  try {
    owner_.check();
    const auto has_name = [&](std::size_t i) {
      return File::identify(path_of(i)) == store_.file(i).identity();
    };
    if (!commits_.empty() && has_name(0)) return;  // All is there.
    for (std::size_t i = 0; i < store_.directories(); ++i) {
      if (!has_name(i)) continue;
      unlink(path_of(i).c_str());
      sync_directory(path_of(i).parent_path());
    }
  } catch (...) {
    // The next run says what was left, and that it may be removed.
  }
}

std::unique_ptr<CommitLog> CommitLog::open(Store& store, StoreName name,
                                           std::uint64_t newest) {
  auto log = std::make_unique<CommitLog>(store, std::move(name));
  log->lock_ = FileLock(store.file());
  log->named_ = true;
  CommitReader reader(store);
  log->header_ = reader.header();
  log->check_name();
  std::string damage;
  for (const StoreDamage& root : reader.damage()) {
    damage += (damage.empty() ? "" : "; ") + root.what;
  }
  for (const auto& [number, root] : reader.slots()) {
    log->generation_ = std::max(log->generation_, root.generation);
  }
  for (const auto& [number, root] : reader.slots()) {
    if (root.kind == StoreRoot::Kind::kTombstone) continue;
    if (newest != 0 && root.generation > newest) continue;
    // What the commit before the last refers to may have been written since.
    const std::string fault =
        log->take(reader.read(root), /*check_all=*/!damage.empty());
    if (!fault.empty()) {
      damage += (damage.empty() ? "" : "; ") +
                std::string("the commit of step ") + std::to_string(root.step) +
                " cannot be read: " + fault;
      continue;
    }
    log->slot_ = number;
    if (!damage.empty()) {
      log->notes_.push_back(damage + "; that of step " +
                            std::to_string(root.step) + " is taken");
    }
    return log;
  }
  if (!damage.empty()) fail_damaged(store.file().path(), damage);
  throw IoError({.op = "read commit",
                 .path = store.file().path(),
                 .error = ENOENT,
                 .detail = "nothing was committed there"});
}

void CommitLog::check_name() const {
  if (header_.rank == name_.rank && header_.world == name_.world &&
      header_.epoch == name_.epoch) {
    return;
  }
  throw std::invalid_argument(store_.file().path() +
                              ": it is another store's file, under this name");
}

// Takes a commit, and those before it that it keeps and that can be read.
// Returns why not, and has then taken nothing. Errors: IoError if the machine
// cannot read.
std::string CommitLog::take(std::vector<CommitReader::Found> found,
                            bool check_all) {
  std::vector<Commit> commits;
  std::vector<Tables> tables;
  std::vector<std::string> notes;
  for (CommitReader::Found& each : found) {
    const bool newest = &each == &found.back();
    if (each.fault.empty() && check_all) {
      try {
        check_extents(each.commit);
      } catch (const IoError& error) {
        if (!is_loss(error.error())) throw;
        each.fault = error.what();
      }
    }
    if (newest && !each.fault.empty()) return each.fault;
    if (!each.fault.empty()) {
      notes.push_back("the kept commit of step " +
                      std::to_string(each.commit.step) +
                      " cannot be read: " + each.fault);
      continue;
    }
    commits.push_back(std::move(each.commit));
    tables.push_back({each.table_checksum, std::move(each.tables)});
  }
  commits_ = std::move(commits);
  tables_ = std::move(tables);
  notes_.insert(notes_.end(), notes.begin(), notes.end());
  return "";
}

void CommitLog::check_extents(const Commit& commit) {
  for (const auto& extent : commit.extents) {
    const Pages memory(extent->padded_size());
    store_.read(extent, 0, memory.first(extent->padded_size())).wait();
  }
}

}  // namespace torch_ext
