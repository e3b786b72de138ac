#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace torch_ext {

/// Bytes in a size such as "4GiB", "1M", "512 KB" or "4096".
/// K, M, G, T and KiB, MiB, GiB, TiB are powers of 1024. KB, MB, GB, TB are
/// powers of 1000. B or no unit is bytes. Units may be in any case. A fraction
/// is read if it gives whole bytes ("1.5G"). One space may stand before the
/// unit. Errors: std::invalid_argument with the text and what is allowed. That
/// is the answer to negative sizes, to sizes of 2^63 or more, and to any other
/// text.
std::uint64_t parse_size(std::string_view text);

/// A size as messages show it, such as "1.5 GiB", with at most two decimals.
std::string format_size(std::uint64_t bytes);

}  // namespace torch_ext
