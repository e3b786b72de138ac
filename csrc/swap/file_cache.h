#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// Files kept open between operations, at most kMaxDescriptors in all. A kept
/// one serves a name only while the name still leads to that very file:
/// writing to one that was deleted meanwhile would lose the bytes in silence.
/// Threads: any.
class FileCache {
 public:
  /// A file that is in use as long as a copy of this lives.
  struct Lease {
    std::shared_ptr<const File> file = nullptr;
    /// Not the file's own count: the I/O lets go of that a little after its
    /// end, when whoever waits for descriptors has looked already.
    std::shared_ptr<const void> use = nullptr;
    explicit operator bool() const { return file != nullptr; }
  };
  static constexpr int kMaxDescriptors = 64;
  /// Of one file.
  static constexpr int kMostEach = 2;

  /// The file that has this absolute path now; made for kWrite if there is
  /// none. Empty while operations use all descriptors that there may be: to be
  /// called again when one has ended. Errors: those of File::open.
  Lease open(const std::string& path, File::Mode mode);

  /// The file behind a descriptor of the caller's, never kept. Otherwise as
  /// above.
  Lease open(int fd);

  /// Closes the files not in use whose names lead elsewhere now, and which hold
  /// disk space for nobody. Returns whether there was one.
  bool drop_stale();

  /// Descriptors open now.
  int descriptors() const;

 private:
  struct Entry {
    std::string path;
    File::Mode mode;
    Lease lease;
  };
  /// Of a file in use that serves no name any more.
  struct Other {
    std::weak_ptr<const File> file;
    std::weak_ptr<const void> use;
  };

  static Lease lease(File file);
  static Other other(const Lease& lease) { return {lease.file, lease.use}; }

  bool make_room();
  int count() const;

  mutable std::mutex mutex_;
  std::list<Entry> kept_;  ///< Last used, first.
  mutable std::vector<Other> others_;
};

}  // namespace torch_ext
