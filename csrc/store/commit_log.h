#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/owner_process.h"
#include "commit_reader.h"
#include "io/file_lock.h"
#include "store_format.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// The error of a commit that failed in another process only.
inline constexpr const char* kOthersFailed =
    "commit: another process could not commit";

/// Makes extents of a store survive the process. commit_log.cpp tells how.
///
/// The owner keeps one rule: an extent of a commit is never written again
/// before that commit has been dropped.
/// Threads: one at a time. The store must outlive the object.
class CommitLog {
 public:
  /// For a store of scratch files. Nothing happens before the first commit.
  /// `id`: the store's; none is a random one.
  CommitLog(Store& store, StoreName name, std::optional<StoreId> id = {});
  CommitLog(const CommitLog&) = delete;
  CommitLog& operator=(const CommitLog&) = delete;
  /// Takes back the names of files that nobody could resume from.
  ~CommitLog();

  /// For a store that was made with the files of `name`: becomes their owner,
  /// reads the commits, and takes their extents.
  /// Errors: IoError: EAGAIN if another process is the owner, ENOENT if there
  /// is no commit, EIO if none can be read. std::invalid_argument if a file is
  /// not of this store. `newest`: later commits do not count, since other
  /// processes do not have them. 0: all count.
  static std::unique_ptr<CommitLog> open(Store& store, StoreName name,
                                         std::uint64_t newest = 0);

  /// Throws what add() would throw before it writes anything.
  void check() const;

  /// Asks the other processes of a commit whether theirs is durable too. Called
  /// once this process's is; returns whether all are. What it throws means that
  /// nobody knows.
  using Vote = std::function<bool()>;

  /// Makes these extents durable, with a new generation. All their writes have
  /// ended. Returns the commits beyond the newest `keep` (>= 1), whose extents
  /// may be written again. `least`: the least number that the generation may
  /// have, which makes it the same in all processes. `time`: the commit's; 0 is
  /// now.
  /// Errors: IoError: EEXIST if another run's store has the name, ENOENT if the
  /// file was removed, and what the drive says. The last commit is what it was
  /// then, unless must_stop() is set. If only the names failed, commits() has
  /// the new one, and its extents are not to be written. Files that have a name
  /// by then keep it for the next commit.
  std::vector<Commit> add(std::uint64_t step, std::string document,
                          std::vector<std::shared_ptr<Extent>> extents,
                          std::size_t keep = 1, std::uint64_t least = 0,
                          const Vote& vote = {}, std::int64_t time = 0);

  /// Makes a commit that is kept the last one to go, as the newest is. The next
  /// commit makes this durable.
  void renew(std::uint64_t generation);

  /// The generation that add() tries next.
  std::uint64_t next_generation() const noexcept { return generation_ + 1; }

  /// The store's id. REQUIRES: there is a commit.
  const StoreId& id() const noexcept { return header_.store; }
  /// What its files are called.
  const StoreName& name() const noexcept { return name_; }

  /// In the order in which they go: oldest first, but for renew().
  const std::vector<Commit>& commits() const noexcept { return commits_; }

  /// Set if nobody can say which commit the drive has. Then nothing may be
  /// written to any extent, not even to those of no commit.
  const std::exception_ptr& must_stop() const noexcept { return must_stop_; }

  /// What a log should say, such as which commit could not be read.
  const std::vector<std::string>& notes() const noexcept { return notes_; }

  /// How many bytes commits have written, besides their extents.
  std::uint64_t bytes_written() const noexcept { return bytes_written_; }

 private:
  struct Tables {
    std::uint64_t checksum = 0;
    std::vector<std::shared_ptr<Extent>> copies;
  };

  void begin();
  Tables write_tables(const std::vector<std::byte>& bytes);
  std::shared_ptr<Extent> write_table(std::span<const std::byte> padded,
                                      std::uint64_t bytes);
  void write_root(const StoreRoot& root, std::size_t slot);
  void take_vote(const Vote& vote, std::uint64_t generation, std::size_t slot);
  void bury(std::uint64_t generation, std::size_t slot,
            const std::exception_ptr& error);
  void give_names();
  void take_names() noexcept;

  void check_name() const;
  std::string take(std::vector<CommitReader::Found> found, bool check_all);
  void check_extents(const Commit& commit);

  const OwnerProcess owner_{"commit"};
  Store& store_;
  const StoreName name_;
  const std::optional<StoreId> id_;  ///< What was asked for.
  StoreHeader header_;
  FileLock lock_;
  bool gave_names_ = false;  ///< Or tried to. Others' stores are not ours.
  bool named_ = false;       ///< All files are.
  std::vector<Commit> commits_;
  std::vector<Tables> tables_;  ///< Each commit's.
  /// Space that the second commit's tables are sure to find.
  std::vector<std::shared_ptr<Extent>> spare_tables_;
  std::uint64_t generation_ = 0;  ///< The last that was tried.
  std::size_t slot_ = 1;          ///< Has the last commit's root.
  std::exception_ptr refusal_;    ///< What all further commits throw.
  std::exception_ptr must_stop_;
  std::vector<std::string> notes_;
  std::uint64_t bytes_written_ = 0;
};

}  // namespace torch_ext
