#include "torch_ext/optim/snapshot_file.h"

#include <sys/mman.h>

#include <cerrno>

#include "torch_ext/base/error.h"

namespace torch_ext {

SnapshotFile::SnapshotFile(const std::filesystem::path& directory,
                           std::uint64_t bytes)
    : file_(File::scratch(directory)), bytes_(bytes) {
  if (bytes > 0) file_.reserve(0, bytes);
}

void SnapshotFile::write(std::uint64_t offset,
                         std::span<const std::byte> bytes) {
  file_.write(offset, bytes);
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
