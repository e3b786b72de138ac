// How values of one key replace each other.
//
// Each swap_out makes a StoredValue with space of its own, and adds it at the
// end of the key's list. So writes of one key run side by side, and a value is
// never overwritten. The list holds at most one complete value, at its
// beginning. The others are still being written.
//
// - A swap_in takes the last value of the list. If that is not complete, the
//   operation waits among the value's readers, and leave() of the write brings
//   it back.
// - When a write succeeds, its value stays and all values before it are
//   dropped: they were called earlier. This holds even if their own writes end
//   later.
// - When a write fails, only its value is dropped. Readers that waited for it
//   fail with its error, since older bytes would be wrong in silence. The key
//   keeps its older value, or is gone if it has none.
// - remove() takes the whole list out of the table. Operations under way keep
//   their value, and so its space, until they end.
//
// A value's space is freed with the last reference to the value. The table
// drops its references only after its lock is released.

#include "key_table.h"

#include <algorithm>
#include <utility>

#include "base/mutex.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

/// A key's values, oldest first: at most one complete value, then those that
/// are still being written.
struct StoredValue::Key {
  std::string name;
  std::shared_ptr<std::atomic<bool>> removed =
      std::make_shared<std::atomic<bool>>(false);
  std::vector<std::shared_ptr<StoredValue>> values;
};

// Writers do not wait for each other. Each has space of its own, and the
// table's order is that of the calls.
bool StoredValue::enter(const OperationPtr& operation) {
  return !operation->out() && table_.park(*this, operation);
}

SwapTarget::Operations StoredValue::leave(const SwapOperation& operation,
                                          std::exception_ptr error) {
  if (!operation.out()) return {};
  Operations readers = table_.resolve(shared_from_this(), error);
  // Whoever asked for a value that was not written fails. An older value would
  // be stale data in silence.
  for (const OperationPtr& reader : readers) reader->error = error;
  return readers;
}

bool StoredValue::prepare(IoRequest::Op op, bool may_block) {
  if (op != IoRequest::Op::kWrite) return true;
  if (extent_ == nullptr) {
    extent_ = may_block ? store_.allocate(size_) : store_.try_allocate(size_);
  }
  return extent_ != nullptr;
}

ChunkShape StoredValue::chunk(const std::byte* data, std::uint64_t,
                              std::uint64_t rest,
                              std::size_t buffer_size) const {
  const std::size_t granule = store_.granule();
  if (data != nullptr && is_aligned(data, store_.memory_alignment())) {
    // Bytes that do not fill the last granule have to be padded.
    const std::uint64_t straight =
        is_aligned(rest, granule)
            ? rest
            : align_down(rest, store_.config().block_size);
    if (straight > 0) return ChunkShape::straight(straight);
  }
  ChunkShape shape = ChunkShape::buffered(rest, 0, granule, buffer_size);
  shape.padded = shape.room;
  return shape;
}

void StoredValue::start(const SwapOperation& operation, std::uint64_t offset,
                        std::span<std::byte> bytes, Done done) {
  Store::Request request{
      extent_,         offset, bytes, std::move(done), operation.priority,
      operation.caller};
  operation.out() ? store_.write(std::move(request))
                  : store_.read(std::move(request));
}

void KeyTable::add(const std::string& key,
                   const std::shared_ptr<StoredValue>& value) {
  const MutexLock lock(mutex_);
  auto& entry = keys_[key];
  if (entry == nullptr) {
    entry = std::make_shared<StoredValue::Key>();
    entry->name = key;
  }
  value->key_ = entry;
  value->key_removed_ = entry->removed;
  entry->values.push_back(value);
}

std::shared_ptr<StoredValue> KeyTable::find_locked(
    const std::string& key) const {
  const auto found = keys_.find(key);
  if (found == keys_.end()) throw KeyError("no such key: '" + key + "'");
  return found->second->values.back();
}

std::shared_ptr<StoredValue> KeyTable::find(const std::string& key) const {
  const MutexLock lock(mutex_);
  return find_locked(key);
}

void KeyTable::remove(const std::string& key) {
  std::shared_ptr<StoredValue::Key> dropped;
  const MutexLock lock(mutex_);
  find_locked(key);
  dropped = std::move(keys_.extract(key).mapped());
  *dropped->removed = true;
}

std::vector<std::string> KeyTable::keys() const {
  const MutexLock lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [name, entry] : keys_) names.push_back(name);
  return names;
}

void KeyTable::clear() {
  std::map<std::string, std::shared_ptr<StoredValue::Key>> dropped;
  const MutexLock lock(mutex_);
  dropped.swap(keys_);
}

bool KeyTable::park(StoredValue& value, const OperationPtr& reader) {
  const MutexLock lock(mutex_);
  if (value.error_ != nullptr) std::rethrow_exception(value.error_);
  if (value.complete_) return false;
  value.readers_.push_back(reader);
  return true;
}

SwapTarget::Operations KeyTable::resolve(
    const std::shared_ptr<StoredValue>& value, std::exception_ptr error) {
  std::vector<std::shared_ptr<StoredValue>> dropped;
  const MutexLock lock(mutex_);
  value->error_ = error;
  value->complete_ = error == nullptr;
  if (auto entry = value->key_.lock()) {
    auto& values = entry->values;
    const auto here = std::find(values.begin(), values.end(), value);
    if (here != values.end()) {
      // A complete value takes the place of all values that were called before
      // it. A failed one only leaves.
      const auto first = value->complete_ ? values.begin() : here;
      const auto last = value->complete_ ? here : here + 1;
      dropped.assign(first, last);
      values.erase(first, last);
    }
    const auto place = keys_.find(entry->name);
    if (values.empty() && place != keys_.end() && place->second == entry) {
      keys_.erase(place);
    }
  }
  return std::exchange(value->readers_, {});
}

}  // namespace torch_ext
