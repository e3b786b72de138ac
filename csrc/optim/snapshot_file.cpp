#include "torch_ext/optim/snapshot_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "torch_ext/base/error.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {

SnapshotFile::SnapshotFile(const std::filesystem::path& directory,
                           std::uint64_t bytes)
    : file_(File::scratch(directory)), bytes_(bytes) {
  if (bytes > 0) file_.reserve(0, bytes);
}

void SnapshotFile::write(std::uint64_t offset,
                         std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const std::size_t length = std::min(bytes.size(), IoRequest::kMaxTransfer);
    const ssize_t moved = pwrite(file_.buffered_fd(), bytes.data(), length,
                                 static_cast<off_t>(offset));
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) {
      throw IoError({.op = "pwrite",
                     .path = file_.path(),
                     .offset = offset,
                     .length = length,
                     .error = moved < 0 ? errno : EIO});
    }
    offset += static_cast<std::uint64_t>(moved);
    bytes = bytes.subspan(static_cast<std::size_t>(moved));
  }
}

std::shared_ptr<std::byte> SnapshotFile::map() const {
  if (bytes_ == 0) return nullptr;
  void* const memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
           file_.buffered_fd(), 0);
  if (memory == MAP_FAILED) {
    throw IoError(
        {.op = "mmap", .path = file_.path(), .length = bytes_, .error = errno});
  }
  return {static_cast<std::byte*>(memory),
          [bytes = bytes_](std::byte* mapped) { munmap(mapped, bytes); }};
}

}  // namespace torch_ext
