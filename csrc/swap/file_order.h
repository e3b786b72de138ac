#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "swap_operation.h"
#include "torch_ext/io/file.h"

namespace torch_ext {

/// Which bytes an operation on a file reads or writes.
struct FilePlace {
  std::string path = {};  ///< Absolute; empty for a descriptor.
  /// The file that has the path, if there is one yet. Another path, or a
  /// descriptor, may lead to it too.
  std::optional<File::Identity> file = std::nullopt;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  bool write = false;

  bool conflicts_with(const FilePlace& other) const noexcept {
    return (write || other.write) && begin < other.end && other.begin < end;
  }
};

/// Makes operations on the same bytes of a file take effect in the order in
/// which they entered, if one of them writes. Threads: any.
class FileOrder {
 public:
  struct Entry {
    FilePlace place;
    OperationPtr waiting = nullptr;  ///< Null once it may go.
    /// How often it is a follower, and one more between enter() and wait().
    std::size_t blockers = 0;
    std::vector<Entry*> followers = {};
  };

  /// Whether an operation there would have to wait now.
  bool busy(const FilePlace& place) const;

  struct Entered {
    Entry* entry;
    bool conflicts;  ///< Others come first. The caller calls wait() next.
  };
  /// Puts an operation into the order, until leave(). No leave() returns it
  /// before wait(), so it is still the caller's alone. If it throws, nothing
  /// has changed.
  Entered enter(FilePlace place, const OperationPtr& operation);

  /// True if the operation still has to wait. A leave() then returns it, maybe
  /// before this call returns, so it is not the caller's any more. False if it
  /// may go. REQUIRES: enter() found conflicts, and this is the first call.
  bool wait(Entry* entry);

  /// The entry's operation has ended. Returns the operations that need not wait
  /// any more. REQUIRES: the operation does not wait.
  std::vector<OperationPtr> leave(Entry* entry);

 private:
  struct HashIdentity {
    std::size_t operator()(const File::Identity& identity) const noexcept {
      return std::hash<std::uint64_t>()(identity.inode * 31 + identity.device);
    }
  };

  /// The entries of one path or file. There may be thousands at a time.
  class Entries {
   public:
    void add(Entry* entry);
    /// Does nothing if the entry is not there.
    void remove(Entry* entry);
    bool empty() const { return ordered_.empty(); }
    /// Appends the entries that conflict with `place`.
    void find(const FilePlace& place, std::vector<Entry*>& result) const;

   private:
    /// Sorts reads and writes apart, and groups ranges of about the same
    /// length. A range that is far longer than the others must not widen the
    /// search for them.
    struct Key {
      bool write = false;
      std::uint64_t longest = 0;  ///< Length, up to a power of two.
      std::uint64_t begin = 0;
      Entry* entry = nullptr;

      bool operator<(const Key& other) const {
        return std::tie(write, longest, begin, entry) <
               std::tie(other.write, other.longest, other.begin, other.entry);
      }
    };
    static Key key_of(Entry* entry);

    std::set<Key> ordered_;
  };

  /// Searches by path and by file. An entry that both lead to is there twice.
  std::vector<Entry*> conflicts(const FilePlace& place) const REQUIRES(mutex_);
  void add(Entry* entry, const std::vector<Entry*>& before) REQUIRES(mutex_);
  void remove(Entry* entry) REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::unordered_map<std::string, Entries> by_path_ GUARDED_BY(mutex_);
  std::unordered_map<File::Identity, Entries, HashIdentity> by_file_
      GUARDED_BY(mutex_);
};

}  // namespace torch_ext
