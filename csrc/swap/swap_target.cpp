#include "swap_target.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "torch_ext/base/align.h"

namespace torch_ext {

ChunkShape ChunkShape::buffered(std::uint64_t rest, std::size_t lead,
                                std::size_t granule, std::size_t buffer_size) {
  const std::uint64_t most = align_down(buffer_size, granule);
  if (most == 0) {
    throw std::invalid_argument(
        "host buffers of " + std::to_string(buffer_size) +
        " bytes are too small for this file system's unit of " +
        std::to_string(granule) +
        ": raise block_size to as much, and host_memory to at least "
        "block_size");
  }
  const std::uint64_t length = std::min<std::uint64_t>(rest, most - lead);
  return {.length = length,
          .in_place = false,
          .lead = lead,
          .padded = length,
          .room = align_up(lead + length, granule)};
}

}  // namespace torch_ext
