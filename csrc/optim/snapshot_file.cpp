#include "torch_ext/optim/snapshot_file.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>

#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

SnapshotFile::SnapshotFile(const std::filesystem::path& directory,
                           std::uint64_t bytes)
    : file_(File::scratch(directory)), bytes_(bytes) {
  if (bytes == 0) return;
  // Without fallocate, the writes themselves make sure of space. map() hears if
  // one of them fails, and nothing else depends on them.
  file_.reserves() ? file_.reserve(0, bytes) : file_.check_room(bytes);
}

void SnapshotFile::write(std::uint64_t offset,
                         std::span<const std::byte> bytes) {
  file_.write(offset, bytes);
  if (!bytes.empty()) {
    written_.push_back({offset, bytes.size(), checksum(bytes)});
  }
}

void SnapshotFile::check_written() const {
  file_.sync();
  const std::size_t granule = file_.granule();
  std::uint64_t longest = 0;
  for (const Written& piece : written_) {
    longest = std::max(longest, piece.length);
  }
  const std::size_t room = align_up(longest, granule) + 2 * granule;
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(granule, room), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  const std::span<std::byte> buffer(static_cast<std::byte*>(memory.get()),
                                    room);
  file_.drop_cache();
  for (const Written& piece : written_) {
    const std::uint64_t begin = align_down(piece.offset, granule);
    const std::uint64_t end = align_up(piece.offset + piece.length, granule);
    const std::size_t got = file_.read(begin, buffer.first(end - begin));
    const std::uint64_t lead = piece.offset - begin;
    if (got >= lead + piece.length &&
        checksum(buffer.subspan(lead, piece.length)) == piece.checksum) {
      continue;
    }
    throw IoError({.op = "pread",
                   .path = file_.path(),
                   .offset = piece.offset,
                   .length = piece.length,
                   .error = EIO,
                   .detail = "the drive does not hold what was written to it: "
                             "it may be full or failing"});
  }
}

std::shared_ptr<std::byte> SnapshotFile::map() const {
  if (bytes_ == 0) return nullptr;
  check_written();
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
