#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "swap_operation.h"
#include "swap_target.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

class KeyTable;

/// One value of a key: it is being written, complete, or failed. Its readers
/// wait until it is complete. key_table.cpp tells how values replace each
/// other.
class StoredValue final : public SwapTarget,
                          public std::enable_shared_from_this<StoredValue> {
 public:
  /// `table` and `store` outlive every operation, but not every value.
  StoredValue(KeyTable& table, Store& store, std::uint64_t size,
              std::shared_ptr<const void> tag)
      : table_(table), store_(store), size_(size), tag_(std::move(tag)) {}

  std::uint64_t size() const { return size_; }
  const std::shared_ptr<const void>& tag() const { return tag_; }
  /// Whether the key has been removed since. Null before KeyTable::add().
  const std::shared_ptr<std::atomic<bool>>& key_removed() const {
    return key_removed_;
  }

  bool enter(const OperationPtr& operation) override;
  Operations leave(const SwapOperation& operation,
                   std::exception_ptr error) override;
  bool prepare(IoRequest::Op op, bool may_block) override;
  ChunkShape chunk(const std::byte* data, std::uint64_t offset,
                   std::uint64_t rest, std::size_t buffer_size) const override;
  void start(const SwapOperation& operation, std::uint64_t offset,
             std::span<std::byte> bytes, Done done) override;

 private:
  friend class KeyTable;
  struct Key;

  KeyTable& table_;
  Store& store_;
  const std::uint64_t size_;
  const std::shared_ptr<const void> tag_;
  std::shared_ptr<std::atomic<bool>> key_removed_;  ///< Set by add().
  std::shared_ptr<Extent> extent_;  ///< Set before the first write.

  // Guarded by the table's lock.
  std::weak_ptr<Key> key_;
  bool complete_ = false;
  std::exception_ptr error_;
  Operations readers_;  ///< Wait until it is complete.
};

/// Which value a key has. Threads: any.
class KeyTable {
 public:
  /// Makes `value` the newest value of the key. The older one stays the key's
  /// value if this one fails.
  void add(const std::string& key, const std::shared_ptr<StoredValue>& value);
  /// The newest value. Errors: KeyError.
  std::shared_ptr<StoredValue> find(const std::string& key) const;
  /// Forgets the key. Errors: KeyError.
  void remove(const std::string& key);
  std::vector<std::string> keys() const;
  void clear();

 private:
  friend class StoredValue;

  /// True if the value is still being written; resolve() will then return
  /// `reader`. Errors: the error that the write failed with.
  bool park(StoredValue& value, const OperationPtr& reader);
  /// The value is complete (`error` is null) or failed. Returns the operations
  /// that waited for that.
  SwapTarget::Operations resolve(const std::shared_ptr<StoredValue>& value,
                                 std::exception_ptr error);
  std::shared_ptr<StoredValue> find_locked(const std::string& key) const
      REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::map<std::string, std::shared_ptr<StoredValue::Key>> keys_
      GUARDED_BY(mutex_);
};

}  // namespace torch_ext
