#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "swap_operation.h"
#include "swap_target.h"

namespace torch_ext {

struct Versions;

/// One value of a key: being written, or complete.
struct Version final : SwapTarget {
  /// `on` outlives every operation, not every version.
  Version(Store& on, std::uint64_t bytes, std::shared_ptr<const void> its_tag)
      : store(on), size(bytes), tag(std::move(its_tag)) {}

  bool prepare(IoRequest::Op op, bool may_block) override;
  std::uint64_t in_place(const std::byte* data, std::uint64_t offset,
                         std::uint64_t rest) const override;
  std::size_t lead(std::uint64_t offset) const override;
  std::uint64_t padded(std::uint64_t length) const override;
  std::size_t granule() const override;
  void start(const SwapOperation& operation, std::uint64_t offset,
             std::span<std::byte> bytes, Done done) override;

  Store& store;
  const std::uint64_t size;
  const std::shared_ptr<const void> tag;
  std::shared_ptr<Extent> extent;  ///< Set before the first write.
  std::weak_ptr<Versions> of;

  // Under the table's lock.
  bool ready = false;
  std::exception_ptr error;
  std::vector<OperationPtr> readers;  ///< Called before it was ready.
};

/// A key's values, oldest first: at most one that is ready, and after it
/// those still being written.
struct Versions {
  std::string key;
  std::vector<std::shared_ptr<Version>> list;
};

/// Which value a key has, and which errors its user has not seen.
/// Threads: any.
class KeyTable {
 public:
  /// Throws the key's first error that no ticket has reported, if there is
  /// one; forgets all of the key.
  void throw_unseen(const std::string& key);
  /// The first unseen error of any key, or null; forgets all.
  std::exception_ptr take_unseen();
  void add_failure(OperationPtr operation);

  void add(const std::string& key, const std::shared_ptr<Version>& version);
  /// The newest value. Errors: KeyError.
  std::shared_ptr<Version> find(const std::string& key) const;
  /// Errors: KeyError.
  void remove(const std::string& key);
  std::vector<std::string> keys() const;
  void clear();

  /// True if the version is still being written: `reader` will then be among
  /// those that resolve() returns. Errors: the one the write failed with.
  bool park(const OperationPtr& reader);

  /// The version is complete (null) or failed; returns who waited for that.
  std::vector<OperationPtr> resolve(const std::shared_ptr<Version>& version,
                                    std::exception_ptr error);

 private:
  std::shared_ptr<Version> find_locked(const std::string& key) const;

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Versions>> keys_;
  std::vector<OperationPtr> failures_;
};

}  // namespace torch_ext
