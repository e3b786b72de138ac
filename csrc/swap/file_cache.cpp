// How at most 64 descriptors serve any number of operations.
//
// A file counts one descriptor, or two once it may open its buffered one. Files
// in use, files that are kept, and calls that are opening one right now all
// count. make_room() closes kept files that nobody uses, the oldest first. If
// that does not help, open() returns nothing.
//
// What comes then depends on who asks. A caller on its own thread does not
// wait: it hands its operation to the transfer thread. The transfer thread
// waits for the end of another operation, and `awaited_` says so. While it is
// set, callers that do not wait get nothing, so that they cannot take each
// descriptor that becomes free before the waiting thread does.
//
// The process may have fewer descriptors than we allow ourselves. After EMFILE
// or ENFILE, remedy_for() closes all idle files, and open() tries again. If
// there are none, the end of another operation may help. It is an error only if
// no other file is in use here.
//
// Files are closed outside the lock, in lists that are destroyed after it: a
// close may take long.

#include "file_cache.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

int descriptors_of(bool buffered) { return buffered ? 2 : 1; }

// True if the process has no descriptor left. The cache may have some to close.
bool is_shortage(const IoError& error) {
  return error.error() == EMFILE || error.error() == ENFILE;
}

}  // namespace

FileCache::Lease FileCache::open(const std::string& path,
                                 const Request& request) {
  if (std::optional<Lease> kept = find(path, request)) {
    if (*kept && request.buffered && !open_buffered(**kept, request)) return {};
    return *kept;
  }
  return add(path, request, [&] { return File::open(path, request.mode); });
}

FileCache::Lease FileCache::open(int fd, const Request& request) {
  return add("", request, [fd] { return File::open(fd); });
}

/// The file, if it is kept. An empty lease if the caller must ask again.
/// Nothing if the file has to be opened.
std::optional<FileCache::Lease> FileCache::find(const std::string& path,
                                                const Request& request) {
  const auto now = request.now ? request.now : File::identify(path);
  std::list<Entry> closed;
  const MutexLock lock(mutex_);
  if (awaited_ && !request.waits) return Lease();
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [&](const Entry& entry) {
        return entry.path == path && entry.mode == request.mode;
      });
  if (found == kept_.end()) return std::nullopt;
  if (now != found->file->identity()) {
    found->path.clear();
    if (!found->in_use()) closed.splice(closed.end(), kept_, found);
    return std::nullopt;
  }
  kept_.splice(kept_.begin(), kept_, found);
  const int wanted = descriptors_of(request.buffered);
  const int before = found->descriptors();
  if (!found->in_use()) found->most = before;
  Lease file = found->file;
  if (wanted > before && !make_room(wanted - before, closed)) {
    awaited_ |= request.waits;
    return Lease();
  }
  found->most = std::max(found->most, wanted);
  if (request.waits) awaited_ = false;
  return file;
}

bool FileCache::open_buffered(const File& file, const Request& request) {
  for (int times = 0;;) {
    try {
      file.buffered_fd();
      return true;
    } catch (const IoError& error) {
      if (!is_shortage(error)) throw;
      const Remedy remedy = remedy_for(request, &file, ++times);
      if (remedy == Remedy::kNone) throw;
      if (remedy == Remedy::kEndOfAnother) return false;
    }
  }
}

/// What helps a caller that has met a shortage for the n-th time. `own` is the
/// file that it uses itself.
FileCache::Remedy FileCache::remedy_for(const Request& request, const File* own,
                                        int times) {
  constexpr int kMostTimes = 100;
  {
    std::list<Entry> closed;  // Destroyed after the lock.
    const MutexLock lock(mutex_);
    if (close_idle(closed)) return Remedy::kTryAgain;
    const bool others =
        std::any_of(kept_.begin(), kept_.end(), [own](const Entry& entry) {
          return entry.file.get() != own && entry.in_use();
        });
    // A caller that does not wait leaves it to the one that does.
    if (others || !request.waits) {
      awaited_ |= request.waits;
      return Remedy::kEndOfAnother;
    }
  }
  // Other threads, here or elsewhere, may be about to close a file.
  if (times >= kMostTimes) return Remedy::kNone;
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return Remedy::kTryAgain;
}

template <typename Open>
FileCache::Lease FileCache::add(const std::string& path, const Request& request,
                                Open open_file) {
  const int wanted = descriptors_of(request.buffered);
  for (int times = 0;;) {
    // These are closed after the lock is released, since closing may take long.
    std::list<Entry> closed;
    {
      const MutexLock lock(mutex_);
      if (awaited_ && !request.waits) return {};
      if (!make_room(wanted, closed)) {
        awaited_ |= request.waits;
        return {};
      }
      opening_ += wanted;
    }
    closed.clear();
    try {
      const auto file = std::make_shared<const File>(open_file());
      if (request.buffered) file->buffered_fd();
      const MutexLock lock(mutex_);
      opening_ -= wanted;
      kept_.push_front({path, request.mode, file, wanted});
      if (request.waits) awaited_ = false;
      return file;
    } catch (const IoError& error) {
      {
        const MutexLock lock(mutex_);
        opening_ -= wanted;
        if (request.waits) awaited_ = false;
      }
      if (!is_shortage(error)) throw;
      const Remedy remedy = remedy_for(request, nullptr, ++times);
      if (remedy == Remedy::kNone) throw;
      if (remedy == Remedy::kEndOfAnother) return {};
    } catch (...) {
      const MutexLock lock(mutex_);
      opening_ -= wanted;
      if (request.waits) awaited_ = false;
      throw;
    }
  }
}

/// Takes out files that are not in use, oldest first, until `wanted` more
/// descriptors can be opened. False if too many are in use.
bool FileCache::make_room(int wanted, std::list<Entry>& closed) {
  int open = opening_ + wanted;
  for (auto entry = kept_.begin(); entry != kept_.end();) {
    const auto next = std::next(entry);
    if (entry->path.empty() && !entry->in_use()) {
      closed.splice(closed.end(), kept_, entry);
    } else {
      open += entry->descriptors();
    }
    entry = next;
  }
  for (auto entry = kept_.end();
       open > kMaxDescriptors && entry != kept_.begin();) {
    --entry;
    if (entry->in_use()) continue;
    open -= entry->descriptors();
    closed.splice(closed.end(), kept_, entry++);
  }
  return open <= kMaxDescriptors;
}

bool FileCache::close_idle(std::list<Entry>& closed) {
  const std::size_t before = kept_.size();
  for (auto entry = kept_.begin(); entry != kept_.end();) {
    const auto next = std::next(entry);
    if (!entry->in_use()) closed.splice(closed.end(), kept_, entry);
    entry = next;
  }
  return kept_.size() < before;
}

bool FileCache::drop_deleted() {
  std::vector<Entry> idle;
  {
    const MutexLock lock(mutex_);
    for (const Entry& entry : kept_) {
      if (!entry.in_use()) idle.push_back(entry);
    }
  }
  bool dropped = false;
  for (Entry& entry : idle) {
    bool deleted = true;  // Stays so if the file cannot be asked.
    try {
      deleted = entry.file->presence().links == 0;
    } catch (const IoError&) {
    }
    std::list<Entry> closed;
    const MutexLock lock(mutex_);
    const File* file = entry.file.get();
    // The copy made the file look used.
    entry.file = nullptr;
    if (!deleted) continue;
    const auto found = std::find_if(
        kept_.begin(), kept_.end(),
        [&](const Entry& kept) { return kept.file.get() == file; });
    if (found == kept_.end() || found->in_use()) continue;
    closed.splice(closed.end(), kept_, found);
    dropped = true;
  }
  return dropped;
}

int FileCache::descriptors() const {
  const MutexLock lock(mutex_);
  int open = 0;
  for (const Entry& entry : kept_) open += entry.file->descriptors();
  return open;
}

}  // namespace torch_ext
