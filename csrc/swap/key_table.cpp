#include "key_table.h"

#include <algorithm>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

bool Version::prepare(IoRequest::Op op, bool may_block) {
  // A read may be called while the write's thread sets the extent.
  if (op != IoRequest::Op::kWrite) return true;
  if (extent == nullptr) {
    extent = may_block ? store.allocate(size) : store.try_allocate(size);
  }
  return extent != nullptr;
}

std::uint64_t Version::in_place(const std::byte* data, std::uint64_t,
                                std::uint64_t rest) const {
  if (!is_aligned(data, store.memory_alignment())) return 0;
  // What does not fill the last granule has to be padded.
  return is_aligned(rest, granule())
             ? rest
             : align_down(rest, store.config().block_size);
}

std::size_t Version::lead(std::uint64_t) const { return 0; }

std::uint64_t Version::padded(std::uint64_t length) const {
  return align_up(length, granule());
}

std::size_t Version::granule() const { return store.granule(); }

void Version::start(const SwapOperation& operation, std::uint64_t offset,
                    std::span<std::byte> bytes, Done done) {
  if (operation.out()) {
    store.write(extent, offset, bytes, std::move(done), operation.priority,
                operation.caller);
  } else {
    store.read(extent, offset, bytes, std::move(done), operation.priority,
               operation.caller);
  }
}

void KeyTable::throw_unseen(const std::string& key) {
  std::exception_ptr unseen;
  std::lock_guard lock(mutex_);
  std::erase_if(failures_, [&](const OperationPtr& operation) {
    if (operation->key != key) return operation->error_seen.load();
    if (unseen == nullptr && !operation->error_seen.exchange(true)) {
      unseen = operation->error;
    }
    return true;
  });
  if (unseen != nullptr) std::rethrow_exception(unseen);
}

std::exception_ptr KeyTable::take_unseen() {
  std::lock_guard lock(mutex_);
  for (const OperationPtr& operation : std::exchange(failures_, {})) {
    if (!operation->error_seen.exchange(true)) return operation->error;
  }
  return nullptr;
}

void KeyTable::add_failure(OperationPtr operation) {
  std::lock_guard lock(mutex_);
  std::erase_if(failures_, [](const OperationPtr& failed) {
    return failed->error_seen.load();
  });
  failures_.push_back(std::move(operation));
}

void KeyTable::add(const std::string& key,
                   const std::shared_ptr<Version>& version) {
  std::lock_guard lock(mutex_);
  auto& versions = keys_[key];
  if (versions == nullptr) {
    versions = std::make_shared<Versions>();
    versions->key = key;
  }
  version->of = versions;
  versions->list.push_back(version);
}

std::shared_ptr<Version> KeyTable::find_locked(const std::string& key) const {
  const auto found = keys_.find(key);
  if (found == keys_.end()) throw KeyError("no such key: '" + key + "'");
  return found->second->list.back();
}

std::shared_ptr<Version> KeyTable::find(const std::string& key) const {
  std::lock_guard lock(mutex_);
  return find_locked(key);
}

void KeyTable::remove(const std::string& key) {
  std::shared_ptr<Versions> dropped;
  std::lock_guard lock(mutex_);
  find_locked(key);
  dropped = std::move(keys_.extract(key).mapped());
}

std::vector<std::string> KeyTable::keys() const {
  std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [key, versions] : keys_) names.push_back(key);
  return names;
}

void KeyTable::clear() {
  std::map<std::string, std::shared_ptr<Versions>> dropped;
  std::lock_guard lock(mutex_);
  dropped.swap(keys_);
}

bool KeyTable::park(const OperationPtr& reader) {
  std::lock_guard lock(mutex_);
  Version& version = *reader->version;
  if (version.error != nullptr) std::rethrow_exception(version.error);
  if (version.ready) return false;
  version.readers.push_back(reader);
  return true;
}

std::vector<OperationPtr> KeyTable::resolve(
    const std::shared_ptr<Version>& version, std::exception_ptr error) {
  std::vector<std::shared_ptr<Version>> dropped;
  std::lock_guard lock(mutex_);
  version->error = error;
  version->ready = error == nullptr;
  if (auto versions = version->of.lock()) {
    auto& list = versions->list;
    const auto here = std::find(list.begin(), list.end(), version);
    if (here != list.end()) {
      // A complete value takes the place of all that were called before it,
      // a failed one only leaves.
      const auto first = version->ready ? list.begin() : here;
      const auto last = version->ready ? here : here + 1;
      dropped.assign(first, last);
      list.erase(first, last);
    }
    const auto entry = keys_.find(versions->key);
    if (list.empty() && entry != keys_.end() && entry->second == versions) {
      keys_.erase(entry);
    }
  }
  return std::exchange(version->readers, {});
}

}  // namespace torch_ext
