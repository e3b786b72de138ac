#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "swap_operation.h"
#include "torch_ext/io/file.h"

namespace torch_ext {

/// Which bytes an operation on a file reads or writes.
struct FilePlace {
  std::string path = {};  ///< Absolute; empty for a descriptor.
  /// The file that has the path, if there is one yet: another path or a
  /// descriptor may lead to it too.
  std::optional<File::Identity> file = std::nullopt;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  bool write = false;

  bool conflicts_with(const FilePlace& other) const noexcept {
    return (write || other.write) && begin < other.end && other.begin < end;
  }
};

/// Makes operations on the same bytes of a file, of which one writes, take
/// effect in the order in which they entered. Threads: any.
class FileOrder {
 public:
  struct Entry {
    FilePlace place;
    OperationPtr waiting = nullptr;  ///< Until those before it have ended.
    std::size_t blockers = 0;        ///< How often it is among followers.
    std::vector<Entry*> followers = {};
  };

  /// Whether an operation there would have to wait now.
  bool busy(const FilePlace& place) const;

  struct Entered {
    Entry* entry;
    /// The operation has to wait until a leave() returns it. That may be before
    /// enter() has returned.
    bool waits;
  };
  /// Until leave(). When it throws, nothing has changed.
  Entered enter(FilePlace place, const OperationPtr& operation);

  /// The entry's operation has ended: those that have to wait no more.
  /// REQUIRES: It does not wait.
  std::vector<OperationPtr> leave(Entry* entry);

 private:
  struct HashIdentity {
    std::size_t operator()(const File::Identity& identity) const noexcept {
      return std::hash<std::uint64_t>()(identity.inode * 31 + identity.device);
    }
  };

  /// Those of one path or file. Thousands may be there at a time.
  class Entries {
   public:
    void add(Entry* entry);
    /// Does nothing if it is not there.
    void remove(Entry* entry);
    bool empty() const { return ordered_.empty(); }
    /// Appends those that conflict.
    void find(const FilePlace& place, std::vector<Entry*>& result) const;

   private:
    /// Reads and writes apart, and ranges of about one length: one that is far
    /// longer than the others must not widen the search for them.
    struct Key {
      bool write = false;
      std::uint64_t longest = 0;  ///< Its length up to the next power of two.
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

  /// By path and by file: one that both lead to is there twice.
  std::vector<Entry*> conflicts(const FilePlace& place) const;
  void add(Entry* entry, const std::vector<Entry*>& before);
  void remove(Entry* entry);

  mutable std::mutex mutex_;
  std::unordered_map<std::string, Entries> by_path_;
  std::unordered_map<File::Identity, Entries, HashIdentity> by_file_;
};

}  // namespace torch_ext
