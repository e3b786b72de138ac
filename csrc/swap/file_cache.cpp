#include "file_cache.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

int descriptors_of(bool buffered) { return buffered ? 2 : 1; }

// The process has no descriptor left, but the cache may have some.
bool is_shortage(const IoError& error) {
  return error.error() == EMFILE || error.error() == ENFILE;
}

}  // namespace

FileCache::Lease FileCache::open(const std::string& path,
                                 const Request& request) {
  if (std::optional<Lease> kept = find(path, request)) {
    if (*kept && request.buffered) open_buffered(*kept->file);
    return *kept;
  }
  return add(path, request, [&] { return File::open(path, request.mode); });
}

FileCache::Lease FileCache::open(int fd, const Request& request) {
  return add("", request, [fd] { return File::open(fd); });
}

/// The file if it is kept; nothing if it has to be opened.
std::optional<FileCache::Lease> FileCache::find(const std::string& path,
                                                const Request& request) {
  const auto now = File::identify(path);
  std::list<Entry> closed;
  std::lock_guard lock(mutex_);
  if (awaited_ && !request.waits) return Lease();
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [&](const Entry& entry) {
        return entry.path == path && entry.mode == request.mode;
      });
  if (found == kept_.end()) return std::nullopt;
  if (now != found->lease.file->identity()) {
    found->path.clear();
    if (!found->in_use()) closed.splice(closed.end(), kept_, found);
    return std::nullopt;
  }
  kept_.splice(kept_.begin(), kept_, found);
  const int wanted = descriptors_of(request.buffered);
  const int before = found->descriptors();
  if (!found->in_use()) found->most = before;
  Lease lease = found->lease;
  if (wanted > before && !make_room(wanted - before, closed)) {
    awaited_ |= request.waits;
    return Lease();
  }
  found->most = std::max(found->most, wanted);
  if (request.waits) awaited_ = false;
  return lease;
}

void FileCache::open_buffered(const File& file) {
  for (;;) {
    try {
      file.buffered_fd();
      return;
    } catch (const IoError& error) {
      std::list<Entry> closed;
      std::lock_guard lock(mutex_);
      if (!is_shortage(error) || !close_idle(closed)) throw;
    }
  }
}

template <typename Open>
FileCache::Lease FileCache::add(const std::string& path, const Request& request,
                                Open open_file) {
  const int wanted = descriptors_of(request.buffered);
  for (;;) {
    // Closed after the lock: closing may take long.
    std::list<Entry> closed;
    {
      std::lock_guard lock(mutex_);
      if (awaited_ && !request.waits) return {};
      if (!make_room(wanted, closed)) {
        awaited_ |= request.waits;
        return {};
      }
      opening_ += wanted;
    }
    closed.clear();
    try {
      const auto is_open = std::make_shared<std::atomic<bool>>(true);
      const std::shared_ptr<const File> file(new File(open_file()),
                                             [is_open](const File* closing) {
                                               delete closing;
                                               *is_open = false;
                                             });
      if (request.buffered) file->buffered_fd();
      Lease lease{file, std::make_shared<const char>()};
      std::lock_guard lock(mutex_);
      opening_ -= wanted;
      kept_.push_front({path, request.mode, lease, is_open, wanted});
      if (request.waits) awaited_ = false;
      return lease;
    } catch (const IoError& error) {
      std::lock_guard lock(mutex_);
      opening_ -= wanted;
      if (request.waits) awaited_ = false;
      if (!is_shortage(error)) throw;
      if (close_idle(closed)) continue;
      if (kept_.empty()) throw;
      awaited_ |= request.waits;
      return {};
    } catch (...) {
      std::lock_guard lock(mutex_);
      opening_ -= wanted;
      if (request.waits) awaited_ = false;
      throw;
    }
  }
}

/// Takes out files that are not in use, oldest first, until `wanted` more
/// descriptors can be opened. False: more are in use.
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

bool FileCache::drop_stale() {
  std::vector<Entry> idle;
  {
    std::lock_guard lock(mutex_);
    for (const Entry& entry : kept_) {
      if (!entry.in_use()) idle.push_back(entry);
    }
  }
  // Copies make them look used; only this call may take them for idle.
  std::vector<std::shared_ptr<const std::atomic<bool>>> dropped;
  for (Entry& entry : idle) {
    const bool stale = entry.path.empty() || File::identify(entry.path) !=
                                                 entry.lease.file->identity();
    std::list<Entry> closed;
    std::lock_guard lock(mutex_);
    entry.lease = {};
    if (!stale) continue;
    const auto found = std::find_if(
        kept_.begin(), kept_.end(),
        [&](const Entry& kept) { return kept.is_open == entry.is_open; });
    if (found == kept_.end() || found->in_use()) continue;
    closed.splice(closed.end(), kept_, found);
    dropped.push_back(entry.is_open);
  }
  // An I/O thread lets go of a file a little after the operation's end.
  const auto is_open = [](const auto& flag) { return flag->load(); };
  for (int i = 0; i < 1000; ++i) {
    if (std::none_of(dropped.begin(), dropped.end(), is_open)) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return !dropped.empty();
}

int FileCache::descriptors() const {
  std::lock_guard lock(mutex_);
  int open = 0;
  for (const Entry& entry : kept_) open += entry.lease.file->descriptors();
  return open;
}

}  // namespace torch_ext
