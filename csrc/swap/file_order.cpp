#include "file_order.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <utility>

#include "base/mutex.h"

namespace torch_ext {
namespace {

template <typename Map, typename Key, typename Entry>
void remove_from(Map& map, const Key& key, Entry* entry) {
  const auto found = map.find(key);
  if (found == map.end()) return;
  found->second.remove(entry);
  if (found->second.empty()) map.erase(found);
}

// Whether everything that conflicts with `earlier` conflicts with `later` too,
// given that these two conflict.
bool hides(const FilePlace& later, const FilePlace& earlier) {
  return later.write && later.begin <= earlier.begin &&
         earlier.end <= later.end;
}

}  // namespace

FileOrder::Entries::Key FileOrder::Entries::key_of(Entry* entry) {
  const FilePlace& place = entry->place;
  return {.write = place.write,
          .longest = std::bit_ceil(place.end - place.begin),
          .begin = place.begin,
          .entry = entry};
}

void FileOrder::Entries::add(Entry* entry) { ordered_.insert(key_of(entry)); }

void FileOrder::Entries::remove(Entry* entry) { ordered_.erase(key_of(entry)); }

void FileOrder::Entries::find(const FilePlace& place,
                              std::vector<Entry*>& result) const {
  // Reads do not conflict with each other.
  auto each =
      place.write ? ordered_.begin() : ordered_.lower_bound({.write = true});
  while (each != ordered_.end()) {
    Key group{.write = each->write, .longest = each->longest};
    // No range of this group that begins earlier can reach into the place.
    group.begin = place.begin - std::min(place.begin, group.longest - 1);
    for (each = ordered_.lower_bound(group);
         each != ordered_.end() && each->write == group.write &&
         each->longest == group.longest && each->begin < place.end;
         ++each) {
      if (each->entry->place.conflicts_with(place)) {
        result.push_back(each->entry);
      }
    }
    each = ordered_.lower_bound(
        {.write = group.write, .longest = group.longest + 1});
  }
}

std::vector<FileOrder::Entry*> FileOrder::conflicts(
    const FilePlace& place) const {
  std::vector<Entry*> result;
  if (!place.path.empty()) {
    const auto found = by_path_.find(place.path);
    if (found != by_path_.end()) found->second.find(place, result);
  }
  if (place.file) {
    const auto found = by_file_.find(*place.file);
    if (found != by_file_.end()) found->second.find(place, result);
  }
  return result;
}

void FileOrder::add(Entry* entry, const std::vector<Entry*>& before) {
  const FilePlace& at = entry->place;
  Entries* named = at.path.empty() ? nullptr : &by_path_[at.path];
  Entries* same = at.file ? &by_file_[*at.file] : nullptr;
  if (named != nullptr) named->add(entry);
  if (same != nullptr) same->add(entry);
  // Whoever would wait for a hidden one waits for this one, and so for both.
  // Otherwise, of many operations on the same bytes, each would wait for all
  // before it.
  for (Entry* blocker : before) {
    if (!hides(at, blocker->place)) continue;
    if (named != nullptr) named->remove(blocker);
    if (same != nullptr) same->remove(blocker);
  }
}

void FileOrder::remove(Entry* entry) {
  const FilePlace& at = entry->place;
  if (!at.path.empty()) remove_from(by_path_, at.path, entry);
  if (at.file) remove_from(by_file_, *at.file, entry);
}

bool FileOrder::busy(const FilePlace& place) const {
  const MutexLock lock(mutex_);
  return !conflicts(place).empty();
}

FileOrder::Entered FileOrder::enter(FilePlace place,
                                    const OperationPtr& operation) {
  auto entry = std::make_unique<Entry>(Entry{std::move(place)});
  const MutexLock lock(mutex_);
  const std::vector<Entry*> before = conflicts(entry->place);
  if (!before.empty()) {
    entry->blockers = before.size() + 1;
    entry->waiting = operation;
  }
  try {
    for (Entry* blocker : before) blocker->followers.push_back(entry.get());
    add(entry.get(), before);
  } catch (...) {
    for (Entry* blocker : before) std::erase(blocker->followers, entry.get());
    remove(entry.get());
    throw;
  }
  return {entry.release(), !before.empty()};
}

bool FileOrder::wait(Entry* entry) {
  OperationPtr goes;
  const MutexLock lock(mutex_);
  if (--entry->blockers > 0) return true;
  goes.swap(entry->waiting);
  return false;
}

std::vector<OperationPtr> FileOrder::leave(Entry* entry) {
  std::unique_ptr<Entry> ended;
  std::vector<OperationPtr> ready;
  const MutexLock lock(mutex_);
  ready.reserve(entry->followers.size());
  ended.reset(entry);
  remove(entry);
  for (Entry* follower : ended->followers) {
    if (--follower->blockers == 0) {
      ready.push_back(std::exchange(follower->waiting, nullptr));
    }
  }
  return ready;
}

}  // namespace torch_ext
