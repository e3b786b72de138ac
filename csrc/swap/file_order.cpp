#include "file_order.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace torch_ext {
namespace {

template <typename Map, typename Key>
void remove(Map& map, const Key& key, FileOrder::Entry* entry) {
  const auto found = map.find(key);
  std::erase(found->second, entry);
  if (found->second.empty()) map.erase(found);
}

}  // namespace

std::vector<FileOrder::Entry*> FileOrder::conflicts(
    const FilePlace& place) const {
  std::vector<Entry*> result;
  const auto add = [&](const Entries& entries) {
    for (Entry* entry : entries) {
      if (entry->place.conflicts_with(place) &&
          std::find(result.begin(), result.end(), entry) == result.end()) {
        result.push_back(entry);
      }
    }
  };
  if (!place.path.empty()) {
    const auto found = by_path_.find(place.path);
    if (found != by_path_.end()) add(found->second);
  }
  if (place.file) {
    const auto found = by_file_.find(*place.file);
    if (found != by_file_.end()) add(found->second);
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
  if (!at.path.empty()) by_path_[at.path].push_back(entry.get());
  if (at.file) by_file_[*at.file].push_back(entry.get());
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
