#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace torch_ext {

/// The `aio` section of a DeepSpeed configuration, with its meaning and
/// defaults. This is the one place that states a knob's default and range.
struct AioConfig {
  /// Bytes per request; direct I/O rounds it down to a multiple of the file's
  /// granule, but not below one.
  std::uint64_t block_size = std::uint64_t{1} << 20;
  int queue_depth = 8;         ///< Requests in flight per thread.
  int thread_count = 1;        ///< I/O threads per queue.
  bool single_submit = false;  ///< One kernel call per request, not per batch.
  bool overlap_events = true;  ///< Refill as requests complete; else drain.

  static constexpr std::uint64_t kMaxBlockSize = std::uint64_t{1} << 30;
  static constexpr int kMaxQueueDepth = 65536;  ///< fs.aio-max-nr's default.
  static constexpr int kMaxThreadCount = 256;

  /// Throws std::invalid_argument naming key, value and range.
  void validate() const;

  bool operator==(const AioConfig&) const = default;
};

/// A configuration value before it is checked. `Other` is anything that no
/// knob can take (list, object, integer beyond 64 bits): its text, for the
/// message.
struct OtherValue {
  std::string text;
};
using ConfigValue =
    std::variant<std::nullptr_t, bool, std::int64_t, std::uint64_t, double,
                 std::string, OtherValue>;
using ConfigItems = std::vector<std::pair<std::string, ConfigValue>>;

/// A parsed section, and what its reader should be told (unknown keys).
struct ParsedAioConfig {
  AioConfig config;
  std::vector<std::string> warnings;
};

/// The keys of an `aio` section, then `intra_op_parallelism` and
/// `num_threads`, which are read as `thread_count`.
std::span<const std::string_view> aio_keys() noexcept;

/// Checks the items of an `aio` section. Missing, null or "auto": the default.
/// Integers may be integral floats or decimal strings, block_size a size as
/// parse_size() reads it, flags "true" or "false" in any case.
/// Errors: std::invalid_argument naming key, value and allowed range; also
/// for a key given twice and for two names of one knob that disagree.
ParsedAioConfig read_aio_section(const ConfigItems& section);

/// Reads the `aio` section of a whole configuration in JSON (UTF-8, no
/// comments). No section, or null: the defaults. Text of any length and
/// nesting: nothing but the section and the top level's scalars is kept. A key
/// of aio_keys() beside the section is ignored, with a warning.
/// Errors: std::invalid_argument as above, for bad JSON with the byte's
/// position, for a key of the top level given twice.
ParsedAioConfig parse_aio_config(std::string_view json);

/// As parse_aio_config(), but the object may also be a section itself: one
/// without `aio` and with a key of aio_keys(). One with keys but neither warns.
ParsedAioConfig parse_aio_settings(std::string_view json);

}  // namespace torch_ext
