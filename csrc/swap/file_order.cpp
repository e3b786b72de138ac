#include "file_order.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace torch_ext {
namespace {

template <typename Map, typename Key, typename Entry>
void remove(Map& map, const Key& key, Entry* entry) {
  const auto found = map.find(key);
  found->second.remove(entry);
  if (found->second.empty()) map.erase(found);
}

}  // namespace

void FileOrder::Entries::add(Entry* entry) {
  const FilePlace& place = entry->place;
  by_begin_.emplace(place.begin, entry);
  longest_ = std::max(longest_, place.end - place.begin);
}

void FileOrder::Entries::remove(Entry* entry) {
  auto found = by_begin_.lower_bound(entry->place.begin);
  while (found->second != entry) ++found;
  by_begin_.erase(found);
}

void FileOrder::Entries::find(const FilePlace& place,
                              std::vector<Entry*>& result) const {
  // None that begins earlier can reach into the place.
  const std::uint64_t first = place.begin - std::min(place.begin, longest_);
  for (auto each = by_begin_.lower_bound(first);
       each != by_begin_.end() && each->first < place.end; ++each) {
    Entry* entry = each->second;
    if (entry->place.conflicts_with(place) &&
        std::find(result.begin(), result.end(), entry) == result.end()) {
      result.push_back(entry);
    }
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

bool FileOrder::busy(const FilePlace& place) const {
  std::lock_guard lock(mutex_);
  return !conflicts(place).empty();
}

FileOrder::Entered FileOrder::enter(FilePlace place,
                                    const OperationPtr& operation) {
  auto entry = std::make_unique<Entry>(Entry{std::move(place)});
  std::lock_guard lock(mutex_);
  const std::vector<Entry*> before = conflicts(entry->place);
  for (Entry* blocker : before) blocker->followers.push_back(entry.get());
  entry->blockers = before.size();
  if (!before.empty()) entry->waiting = operation;
  const FilePlace& at = entry->place;
  if (!at.path.empty()) by_path_[at.path].add(entry.get());
  if (at.file) by_file_[*at.file].add(entry.get());
  return {entry.release(), !before.empty()};
}

std::vector<OperationPtr> FileOrder::leave(Entry* entry) {
  const std::unique_ptr<Entry> ended(entry);
  std::vector<OperationPtr> ready;
  std::lock_guard lock(mutex_);
  const FilePlace& at = ended->place;
  if (!at.path.empty()) remove(by_path_, at.path, entry);
  if (at.file) remove(by_file_, *at.file, entry);
  for (Entry* follower : ended->followers) {
    if (--follower->blockers == 0) {
      ready.push_back(std::exchange(follower->waiting, nullptr));
    }
  }
  return ready;
}

}  // namespace torch_ext
