#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "torch_ext/io/file.h"

namespace torch_ext {

/// Files kept open between operations, at most kMaxDescriptors in all. A kept
/// one serves a name only while the name still leads to that very file:
/// writing to one that was deleted meanwhile would lose the bytes in silence.
/// Threads: any; no lock is held while the system opens or closes a file.
class FileCache {
 public:
  /// A file that is in use as long as a copy of this lives.
  using Lease = std::shared_ptr<const File>;
  static constexpr int kMaxDescriptors = 64;

  /// How a file is to be opened.
  struct Request {
    File::Mode mode = File::Mode::kRead;
    bool buffered = false;  ///< The buffered descriptor is needed too.
    /// True: an empty answer means that whoever asks waits; until it has got
    /// its file, those who do not wait get none. One may wait at a time.
    bool waits = false;
    /// What the path leads to, if whoever asks has just seen it.
    std::optional<File::Identity> now = std::nullopt;
  };

  /// The file that has this absolute path now; made for kWrite if there is
  /// none. Empty while operations use all descriptors that there may be, here
  /// or by the process's limit: to be called again when one has ended.
  /// Errors: those of File::open; that there is no descriptor left, and none
  /// in use here that may become free, only to whoever waits.
  Lease open(const std::string& path, const Request& request);

  /// The file behind a descriptor of the caller's, never kept. Otherwise as
  /// above.
  Lease open(int fd, const Request& request);

  /// Closes the files not in use that have no name any more, and hold disk
  /// space for nobody. Returns whether there was one.
  bool drop_deleted();

  /// Descriptors open now.
  int descriptors() const;

 private:
  struct Entry {
    std::string path;  ///< Empty: serves no name, gone when out of use.
    File::Mode mode;
    Lease file;
    int most;  ///< Descriptors that its users may come to have.

    // Whoever uses it has got it from here, under the lock.
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
  bool make_room(int wanted, std::list<Entry>& closed);
  bool close_idle(std::list<Entry>& closed);

  mutable std::mutex mutex_;
  std::list<Entry> kept_;  ///< Last used, first.
  int opening_ = 0;        ///< Descriptors promised to calls of open().
  bool awaited_ = false;
};

}  // namespace torch_ext
