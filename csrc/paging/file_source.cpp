// How a range of a file becomes a unit
//
// Direct I/O takes whole granules of the file. So a read begins in the granule
// in which the range begins, and the range begins somewhere in the first page
// of the unit's memory. There it lies at a multiple of 64, as torch's own
// memory does: some kernels of its libraries give other bits elsewhere. Files
// have tensors at any multiple of 8, so the bytes may have to move down by less
// than 64.
//
// The read is made of pieces, which end in any order. A piece is hashed and
// moved when it has arrived, while it is in the processor's cache. It moves
// within its own memory, but for its first bytes, which belong to the end of
// the piece before. They wait until all pieces are there.
//
// The hashes of the first read are kept, and compared from then on. A file that
// was written to since then has another size or time of change.

#include "file_source.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/checksum.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

constexpr std::uint64_t kAlignment = 64;
constexpr std::uint64_t kPiece = std::uint64_t{1} << 20;

struct stat stat_of(const File& file) {
  struct stat now = {};
  if (::fstat(file.fd(), &now) != 0) {
    throw IoError({.op = "fstat", .path = file.path(), .error = errno});
  }
  return now;
}

bool same_stamp(const struct stat& a, const struct stat& b) {
  return a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec &&
         a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

/// A read that runs.
struct FileSource::Read {
  Read(std::byte* to, Done on_end, std::size_t pieces)
      : memory(to), done(std::move(on_end)), open(pieces), heads(pieces) {}

  std::byte* const memory;
  Done done;
  std::atomic<std::size_t> open;  ///< Pieces that have not ended.
  /// The first bytes of each piece.
  std::vector<std::array<std::byte, kAlignment>> heads;
  std::vector<std::uint64_t> hashes;  ///< If they are not known yet.
  Mutex mutex;
  std::exception_ptr error GUARDED_BY(mutex);
};

FileSource::FileSource(FileRange range, std::shared_ptr<IoQueue> queue,
                       bool verify)
    : range_(std::move(range)), queue_(std::move(queue)), verify_(verify) {
  const File& file = *range_.file;
  stamp_ = stat_of(file);
  const auto size = static_cast<std::uint64_t>(stamp_.st_size);
  if (range_.offset > size || range_.bytes > size - range_.offset) {
    throw std::invalid_argument(
        file.path() + ": it has " + std::to_string(size) + " bytes, but " +
        std::to_string(range_.bytes) + " from byte " +
        std::to_string(range_.offset) + " on are needed");
  }
  const std::uint64_t granule = file.granule();
  const std::uint64_t end = range_.offset + range_.bytes;
  first_ = align_down(range_.offset, granule);
  length_ = std::min(align_up(end, granule), size) - first_;
  const std::uint64_t place = range_.offset - first_;
  skew_ = align_down(place, kAlignment);
  shift_ = place - skew_;
}

std::size_t FileSource::pieces() const {
  return static_cast<std::size_t>((length_ + kPiece - 1) / kPiece);
}

void FileSource::read(std::byte* memory, IoPriority priority,
                      std::uint64_t caller, Done done) {
  const std::size_t count = pieces();
  const auto read = std::make_shared<Read>(memory, std::move(done), count);
  if (verify_ && !hashed_) read->hashes.resize(count);
  std::vector<IoQueue::Prepared> prepared;
  prepared.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t begin = i * kPiece;
    prepared.push_back(queue_->prepare(
        {.file = range_.file,
         .offset = first_ + begin,
         .bytes = {memory + begin, std::min(kPiece, length_ - begin)},
         .priority = priority,
         .caller = caller,
         .on_done = [this, read, i](std::exception_ptr error) {
           end_piece(*read, i, std::move(error));
         }}));
  }
  tickets_.clear();
  tickets_.reserve(count);
  for (IoQueue::Prepared& each : prepared) {
    tickets_.push_back(queue_->start(std::move(each)));
  }
}

void FileSource::promote(IoPriority priority) {
  for (const Ticket& ticket : tickets_) queue_->promote(ticket, priority);
}

void FileSource::end_piece(Read& read, std::size_t i,
                           std::exception_ptr error) noexcept {
  std::byte* const begin = read.memory + i * kPiece;
  const std::uint64_t bytes = std::min(kPiece, length_ - i * kPiece);
  if (error == nullptr) {
    try {
      check_hash(read, i);
    } catch (...) {
      error = std::current_exception();
    }
    const std::uint64_t head = std::min(shift_, bytes);
    std::memcpy(read.heads[i].data(), begin, head);
    if (shift_ > 0) std::memmove(begin, begin + head, bytes - head);
  }
  if (error != nullptr) {
    const MutexLock lock(read.mutex);
    if (read.error == nullptr) read.error = std::move(error);
  }
  if (read.open.fetch_sub(1) > 1) return;
  // The heads go to where the pieces before them end now.
  for (std::size_t next = 1; next < pieces(); ++next) {
    const std::uint64_t head =
        std::min(shift_, length_ - std::uint64_t{next} * kPiece);
    std::memcpy(read.memory + next * kPiece - shift_, read.heads[next].data(),
                head);
  }
  std::exception_ptr first;
  {
    const MutexLock lock(read.mutex);
    first = read.error;
  }
  if (first == nullptr) {
    try {
      check_unchanged();
      if (!read.hashes.empty()) {
        hashes_ = std::move(read.hashes);
        hashed_ = true;
      }
    } catch (...) {
      first = std::current_exception();
    }
  }
  const Done done = std::move(read.done);
  done(first);
}

void FileSource::check_hash(Read& read, std::size_t i) {
  if (!verify_) return;
  const std::uint64_t begin = i * kPiece;
  const std::uint64_t bytes = std::min(kPiece, length_ - begin);
  const std::uint64_t hash = checksum({read.memory + begin, bytes});
  if (!read.hashes.empty()) {
    read.hashes[i] = hash;
  } else if (hash != hashes_[i]) {
    throw IoError({.op = "read",
                   .path = range_.file->path(),
                   .offset = first_ + begin,
                   .length = bytes,
                   .error = EIO,
                   .detail = "checksum mismatch: these are not the bytes that "
                             "were read before"});
  }
}

void FileSource::check_unchanged() const {
  if (same_stamp(stat_of(*range_.file), stamp_)) return;
  throw IoError({.op = "read",
                 .path = range_.file->path(),
                 .offset = range_.offset,
                 .length = range_.bytes,
                 .error = EIO,
                 .detail = "the file has been written to since the parameters "
                           "were offloaded from it"});
}

}  // namespace torch_ext
