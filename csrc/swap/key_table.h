#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "swap_operation.h"

namespace torch_ext {

struct Versions;

/// One value of a key: being written, or complete.
struct Version {
  std::uint64_t size = 0;
  std::shared_ptr<const void> tag;
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
  /// The key's first error that no ticket has reported, or null; forgets all
  /// of the key.
  std::exception_ptr take_unseen(const std::string& key);
  /// Throws it, if there is one.
  void throw_unseen(const std::string& key);
  /// The first unseen error of any key, or null; forgets all.
  std::exception_ptr take_unseen();
  void add_failure(OperationPtr operation);

  std::shared_ptr<Version> add(const std::string& key, std::uint64_t size,
                               std::shared_ptr<const void> tag);
  /// The newest value. Errors: KeyError.
  std::shared_ptr<Version> find(const std::string& key) const;
  /// Errors: KeyError.
  void remove(const std::string& key);
  std::vector<std::string> keys() const;
  void clear();

  /// True if the version is still being written: `reader` will then be among
  /// those that resolve() returns.
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
