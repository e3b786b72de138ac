#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "torch_ext/io/file.h"

namespace torch_ext {

/// Files that are kept open between operations. At most kMaxDescriptors are
/// open in all. A kept file serves a name only while the name still leads to
/// that very file: writing to a deleted file would lose the bytes in silence.
/// file_cache.cpp tells how descriptors are shared out.
/// Threads: any. No lock is held while the system opens or closes a file.
class FileCache {
 public:
  /// A file that is in use while a copy of this lives.
  using Lease = std::shared_ptr<const File>;
  static constexpr int kMaxDescriptors = 64;

  /// How a file shall be opened.
  struct Request {
    File::Mode mode = File::Mode::kRead;
    bool buffered = false;  ///< The buffered descriptor is needed too.
    /// If true, the caller waits after an empty answer and asks again. Until it
    /// has its file, callers that do not wait get none. Only one caller may
    /// wait at a time.
    bool waits = false;
    /// What the path leads to, if the caller has just seen it.
    std::optional<File::Identity> now = std::nullopt;
  };

  /// The file that has this absolute path now. For kWrite it is made if there
  /// is none. The answer is empty while operations use all the descriptors that
  /// this cache or the process may have; call again when an operation has
  /// ended. Errors: those of File::open. "No descriptor left" (EMFILE, ENFILE)
  /// is thrown only to a caller that waits, and only if none in use here may
  /// become free.
  Lease open(const std::string& path, const Request& request);

  /// The file behind a descriptor of the caller's. It is never kept. Otherwise
  /// as above.
  Lease open(int fd, const Request& request);

  /// Closes files that are not in use and have no name any more: they hold disk
  /// space for nobody. Returns whether there was one.
  bool drop_deleted();

  /// Descriptors open now.
  int descriptors() const;

 private:
  struct Entry {
    std::string path;  ///< Empty: serves no name, closed after use.
    File::Mode mode;
    Lease file;
    int most;  ///< Descriptors that its users may open.

    // Users get their copies here, under the lock, so the count tells.
    bool in_use() const { return file.use_count() > 1; }
    int descriptors() const {
      const int open = file->descriptors();
      return in_use() && open < most ? most : open;
    }
  };

  template <typename Open>
  Lease add(const std::string& path, const Request& request, Open open_file);
  std::optional<Lease> find(const std::string& path, const Request& request);
  bool open_buffered(const File& file, const Request& request);
  enum class Remedy { kNone, kTryAgain, kEndOfAnother };
  Remedy remedy_for(const Request& request, const File* own, int times);
  bool make_room(int wanted, std::list<Entry>& closed) REQUIRES(mutex_);
  bool close_idle(std::list<Entry>& closed) REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::list<Entry> kept_ GUARDED_BY(mutex_);  ///< The last used comes first.
  /// Descriptors promised to calls of open().
  int opening_ GUARDED_BY(mutex_) = 0;
  bool awaited_ GUARDED_BY(mutex_) = false;
};

}  // namespace torch_ext
