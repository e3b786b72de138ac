#include "file_cache.h"

#include <algorithm>
#include <utility>

namespace torch_ext {

FileCache::Lease FileCache::lease(File file) {
  return {std::make_shared<const File>(std::move(file)),
          std::make_shared<const char>()};
}

FileCache::Lease FileCache::open(const std::string& path, File::Mode mode) {
  const auto now = File::identify(path);
  std::lock_guard lock(mutex_);
  const auto found =
      std::find_if(kept_.begin(), kept_.end(), [&](const Entry& entry) {
        return entry.mode == mode && entry.path == path;
      });
  if (found != kept_.end()) {
    if (now == found->lease.file->identity()) {
      kept_.splice(kept_.begin(), kept_, found);
      return found->lease;
    }
    others_.push_back(other(found->lease));
    kept_.erase(found);
  }
  if (!make_room()) return {};
  kept_.push_front({path, mode, lease(File::open(path, mode))});
  return kept_.front().lease;
}

FileCache::Lease FileCache::open(int fd) {
  std::lock_guard lock(mutex_);
  if (!make_room()) return {};
  Lease opened = lease(File::open(fd));
  others_.push_back(other(opened));
  return opened;
}

/// Closes files that are not in use until one more can be opened, oldest first.
bool FileCache::make_room() {
  int open = count();
  for (auto entry = kept_.end();
       open > kMaxDescriptors - kMostEach && entry != kept_.begin();) {
    --entry;
    // Whoever uses it has got it from here, under this lock.
    if (entry->lease.use.use_count() > 1) continue;
    open -= entry->lease.file->descriptors();
    entry = kept_.erase(entry);
  }
  return open <= kMaxDescriptors - kMostEach;
}

bool FileCache::drop_stale() {
  std::lock_guard lock(mutex_);
  return std::erase_if(kept_, [](const Entry& entry) {
           return entry.lease.use.use_count() == 1 &&
                  File::identify(entry.path) != entry.lease.file->identity();
         }) > 0;
}

int FileCache::count() const {
  int open = 0;
  for (const Entry& entry : kept_) open += entry.lease.file->descriptors();
  std::erase_if(others_, [&](const Other& other) {
    const auto file = other.file.lock();
    if (file == nullptr || other.use.expired()) return true;
    open += file->descriptors();
    return false;
  });
  return open;
}

int FileCache::descriptors() const {
  std::lock_guard lock(mutex_);
  return count();
}

}  // namespace torch_ext
