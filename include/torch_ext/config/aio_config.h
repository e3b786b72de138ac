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

/// The `aio` section of a DeepSpeed configuration, with DeepSpeed's meaning and
/// defaults. Only this struct states a knob's default and range.
struct AioConfig {
  /// Bytes per request. Direct I/O rounds it down to a multiple of the file's
  /// granule, but not below one granule.
  std::uint64_t block_size = std::uint64_t{1} << 20;
  int queue_depth = 8;         ///< Requests in flight per thread.
  int thread_count = 1;        ///< I/O threads per queue.
  bool single_submit = false;  ///< One kernel call per request, not per batch.
  bool overlap_events = true;  ///< Refill as requests complete; else drain.

  static constexpr std::uint64_t kMaxBlockSize = std::uint64_t{1} << 30;
  static constexpr int kMaxQueueDepth = 65536;  ///< fs.aio-max-nr's default.
  static constexpr int kMaxThreadCount = 256;

  /// Errors: std::invalid_argument that names key, value and range.
  void validate() const;

  bool operator==(const AioConfig&) const = default;
};

/// Text for the message about a value that no knob can take: a list, an object,
/// an integer beyond 64 bits.
struct OtherValue {
  std::string text;
};
using ConfigValue =
    std::variant<std::nullptr_t, bool, std::int64_t, std::uint64_t, double,
                 std::string, OtherValue>;
using ConfigItems = std::vector<std::pair<std::string, ConfigValue>>;

/// A parsed section, and what its author should be told, such as unknown keys.
struct ParsedAioConfig {
  AioConfig config;
  std::vector<std::string> warnings;
};

/// The keys of an `aio` section, then `intra_op_parallelism` and `num_threads`,
/// which are read as `thread_count`.
std::span<const std::string_view> aio_keys() noexcept;

/// Checks the items of an `aio` section. A value that is missing, null or
/// "auto" means the default. An integer may be an integral float or a decimal
/// string. block_size may be a size that parse_size() reads. A flag may be
/// "true" or "false" in any case.
/// Errors: std::invalid_argument that names key, value and allowed range. It
/// also refuses a key that is given twice, and two names of one knob that
/// disagree.
ParsedAioConfig read_aio_section(const ConfigItems& section);

/// Reads a configuration of which `top` are the items, without `aio`, and
/// `section` those of its `aio`, or null if it has none. A key of aio_keys()
/// beside the section is ignored, with a warning. With `bare`, the items may
/// also be a section themselves: there is no `aio` then, but a key of
/// aio_keys(). With `bare`, a configuration that has keys, but none of these,
/// gives a warning. Errors: as read_aio_section().
ParsedAioConfig read_aio_config(const ConfigItems& top,
                                const ConfigItems* section, bool bare);

/// Reads the `aio` section of a whole configuration in JSON (UTF-8, no
/// comments). Without a section, or with null, the defaults hold. The text may
/// have any length and nesting: only the section and the top level's scalars
/// are kept. Warnings, and errors: as read_aio_config(); std::invalid_argument
/// also for bad JSON (with the byte's position), and for a key of the top level
/// that is given twice.
ParsedAioConfig parse_aio_config(std::string_view json);

/// As parse_aio_config(), but the object may also be a section itself.
ParsedAioConfig parse_aio_settings(std::string_view json);

}  // namespace torch_ext
