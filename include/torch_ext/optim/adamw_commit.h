#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// What a commit of OffloadedAdamW says besides the state and the values. C++
/// and Python write and read the same text: docs/file_format.md describes it.
struct AdamWCommit {
  /// The options of a group, or the defaults.
  struct Numbers {
    double lr = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double eps = 1e-8;
    double weight_decay = 1e-2;
    bool maximize = false;
    bool operator==(const Numbers&) const = default;
  };
  struct Group {
    Numbers options = {};
    std::vector<std::string> parameters = {};  ///< Their names, in order.
    bool operator==(const Group&) const = default;
  };
  /// What a parameter has to have in common with the one that was committed.
  struct Kind {
    std::vector<std::int64_t> shape = {};
    std::string dtype = {};  ///< As Python calls it: "float32".
    /// Its dimensions from the slowest to the fastest in memory. Those of size
    /// 1 are left out.
    std::vector<std::int64_t> order = {};
    bool operator==(const Kind&) const = default;
  };
  struct Parameter {
    std::size_t slot = 0;
    std::uint64_t first = 0;  ///< Where it begins in the whole of a shard.
    std::optional<Kind> kind = {};          ///< Not for a frozen one.
    std::optional<std::size_t> value = {};  ///< The index of its values.
    bool operator==(const Parameter&) const = default;
  };

  StateFormat state_format = StateFormat::kExact;
  std::uint64_t seed = 0;
  std::size_t next_slot = 0;
  Numbers defaults = {};
  std::vector<Group> groups = {};
  std::map<std::string, Parameter> parameters = {};  ///< By name.
  std::string extra = {};  ///< Any bytes. Empty: nothing.
  /// What Python has committed that has no place here, in words. It is not
  /// written.
  std::vector<std::string> notes = {};
  bool operator==(const AdamWCommit&) const = default;
};

/// Returns the text that OptimizerOffload::commit() takes as its document.
/// Errors: std::invalid_argument if a name is not in UTF-8.
std::string adamw_commit_text(const AdamWCommit& commit);

/// Reads such a text. Each parameter has one name, and is in one group. No two
/// have the same slot or value. `path` is the store's, for errors.
/// Errors: IoError (EIO) that says what is wrong with a text that commit() does
/// not write. std::invalid_argument for one of another class, of a later
/// version, or with options that this optimizer does not have.
AdamWCommit parse_adamw_commit(std::string_view text, const std::string& path);

}  // namespace torch_ext
