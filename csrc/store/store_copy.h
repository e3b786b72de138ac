#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "commit_log.h"
#include "torch_ext/store/directories.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// A store that shall have one commit of another. store_copy.cpp tells how it
/// is made.
/// Threads: one at a time. The store that is copied must outlive the object.
class StoreCopy {
 public:
  /// In `to`, under the name that the store of `log` has. `place`: more of what
  /// tells this copy from others, such as where other processes make theirs.
  /// Errors: std::invalid_argument if there are not as many directories as the
  /// store has, with its weights. IoError if there is no such directory.
  StoreCopy(Store& from, const CommitLog& log, DirectoryList to,
            const std::string& place = {});

  /// What is in the directories.
  enum class There {
    kNothing,
    kUnfinished,  ///< This copy's files, without the first: a call was killed,
                  ///< or that file is elsewhere.
    kCopy,        ///< This copy, whole as far as names tell.
    /// Something else that has the name of one of its files; or a store that
    /// resume() could take in its place. Stores of other processes that have
    /// the same world and epoch are not in the way.
    kOther,
  };
  /// Errors: IoError if a file cannot be read.
  There there() const;

  /// Throws IoError (EEXIST) with the file that is in the way, if there() is
  /// kOther.
  void refuse_others() const;

  struct Report {
    bool reflink = false;     ///< Blocks are shared. Else bytes were copied.
    std::uint64_t bytes = 0;  ///< The extents', padded.
  };
  /// Makes a commit of the log durable there, the last one. `replace`: a whole
  /// copy that nobody uses or has committed to makes way, since other processes
  /// have none. `vote`: as in CommitLog::add().
  /// Errors: IoError: those of refuse_others(); EEXIST if the copy or files of
  /// it are there. EAGAIN if a process uses the one that is to make way. ENOSPC
  /// before a byte is written. EIO if an extent is damaged. No file has a name
  /// then, except where `vote` throws: nobody knows whether the copy counts.
  Report make(bool replace = false, const CommitLog::Vote& vote = {});

 private:
  std::string path(std::size_t directory) const;
  bool is_mine(std::size_t directory) const;
  std::string other_file() const;
  [[noreturn]] void fail_taken(const std::string& file) const;
  bool is_unused() const;
  void make_way(bool replace) const;
  std::vector<std::shared_ptr<Extent>> reserve(Store& store) const;
  bool share(Store& store,
             const std::vector<std::shared_ptr<Extent>>& extents) const;
  void copy(Store& store,
            const std::vector<std::shared_ptr<Extent>>& extents) const;
  void take_names(const Store& store) const noexcept;

  Store& from_;
  const CommitLog& log_;
  const DirectoryList to_;
  StoreId id_;
};

}  // namespace torch_ext
