// A write to a file of the caller, step by step. A read goes the same way, but
// does not make the file grow, and has no steps 6 and 7.
//
// 1. look() asks what the path leads to. If no operation on these bytes is
//    under way and the file can be opened without waiting, it is opened now. So
//    most errors are thrown by the call itself.
// 2. enter() puts the range into FileOrder. If it has to wait, its descriptor
//    goes back, since those before it may need it.
// 3. prepare() opens the file if that has not been done, and makes it grow. On
//    the caller's thread (may_block is false) it does neither if that could
//    take long: a file system may not answer.
// 4. chunk() says how the next bytes move. Memory that is aligned as the file
//    is moves in place. All else goes through a buffer, in which bytes lie as
//    far from a granule as in the file, so that direct I/O can take its middle.
// 5. start() submits the bytes. If some of them cannot go by direct I/O, it
//    tells FileSyncs.
// 6. settle() syncs the file, if bytes of it went through the page cache: only
//    a sync hears of a page that could not be written.
// 7. check_written() looks whether the file still has a name and its length. A
//    file that was deleted or cut meanwhile is an error (ESTALE).
// 8. leave() lets the next operations on these bytes go.

#include "file_range.h"

#include <cerrno>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"

namespace torch_ext {

FileRange::FileRange(const SharedFiles& files, Name name, std::uint64_t begin,
                     std::uint64_t size)
    : files_(files), name_(std::move(name)), begin_(begin), size_(size) {}

void FileRange::look(IoRequest::Op op) {
  place_ = {.begin = begin_,
            .end = begin_ + size_,
            .write = op == IoRequest::Op::kWrite};
  Seen seen;
  if (const int* fd = std::get_if<int>(&name_)) {
    place_.file = File::identify(*fd);
  } else {
    place_.path = std::get<std::string>(name_);
    seen.file = File::identify(place_.path, &seen.size);
    place_.file = seen.file;
  }
  if (files_.order.busy(place_)) return;
  if (!open(op, false, seen)) return;
  prepare(op, false);
  place_.file = file_->identity();
}

bool FileRange::enter(const OperationPtr& operation) {
  const FileOrder::Entered entered = files_.order.enter(place_, operation);
  order_entry_ = entered.entry;
  if (!entered.conflicts) return false;
  // The operations that it waits for may need the descriptor.
  unprepare();
  // From here on another thread may have the operation.
  return files_.order.wait(entered.entry);
}

SwapTarget::Operations FileRange::leave(const SwapOperation&,
                                        std::exception_ptr) {
  if (order_entry_ == nullptr) return {};
  return files_.order.leave(std::exchange(order_entry_, nullptr));
}

bool FileRange::prepare(IoRequest::Op op, bool may_block) {
  if (!file_ && !open(op, may_block, {})) return false;
  if (grown_ || op != IoRequest::Op::kWrite || size_ == 0) return true;
  if (file_->needs_space(begin_, size_)) {
    if (!may_block) return false;
    grow();
  }
  grown_ = true;
  return true;
}

void FileRange::unprepare() {
  file_ = nullptr;
  grown_ = false;
}

ChunkShape FileRange::chunk(const std::byte* data, std::uint64_t offset,
                            std::uint64_t rest, std::size_t buffer_size) const {
  if (data != nullptr && moves_straight(data, offset, rest)) {
    return ChunkShape::straight(rest);
  }
  const std::size_t granule = file_->granule();
  // The bytes lie as far behind a granule's beginning in the buffer as they do
  // in the file.
  return ChunkShape::buffered(rest, (begin_ + offset) % granule, granule,
                              buffer_size);
}

bool FileRange::moves_straight(const std::byte* data, std::uint64_t offset,
                               std::uint64_t length) const {
  if (!file_->direct()) return true;
  const std::size_t granule = file_->granule();
  const std::uint64_t begin = begin_ + offset;
  const std::uint64_t first = align_up(begin, granule);
  // Direct I/O begins and ends at whole granules. There is none here.
  if (first >= align_down(begin + length, granule)) return true;
  return is_aligned(data + (first - begin), file_->memory_alignment());
}

bool FileRange::is_direct(std::uint64_t offset,
                          std::span<const std::byte> bytes) const {
  return file_->direct() && is_aligned(begin_ + offset, file_->granule()) &&
         is_aligned(bytes.size(), file_->granule()) &&
         is_aligned(bytes.data(), file_->memory_alignment());
}

void FileRange::start(const SwapOperation& operation, std::uint64_t offset,
                      std::span<std::byte> bytes, Done done) {
  if (operation.out() && sync_ == nullptr && !is_direct(offset, bytes)) {
    sync_ = files_.syncs.begin(file_);
  }
  queue_->submit({.op = operation.op(),
                  .file = file_,
                  .offset = begin_ + offset,
                  .bytes = bytes,
                  .priority = operation.priority,
                  .caller = operation.caller,
                  .on_done = std::move(done)});
}

// What the page cache has taken may still fail on its way to the drive. Only a
// sync hears of that.
bool FileRange::settle(const SwapOperation& operation, Done done) {
  if (sync_ == nullptr) {
    check_written();
    return false;
  }
  const auto start = [queue = queue_, file = file_,
                      priority = operation.priority,
                      caller = operation.caller](Done synced) {
    queue->submit({.op = IoRequest::Op::kSync,
                   .file = file,
                   .priority = priority,
                   .caller = caller,
                   .on_done = std::move(synced)});
  };
  sync_->sync(start, [this, done = std::move(done)](std::exception_ptr error) {
    if (error == nullptr) {
      try {
        check_written();
      } catch (...) {
        error = std::current_exception();
      }
    }
    done(std::move(error));
  });
  return true;
}

void FileRange::check_written() const {
  if (size_ == 0 || file_ == nullptr) return;
  const bool named = std::holds_alternative<std::string>(name_);
  const File::Presence now = file_->presence();
  const bool gone = named && now.links == 0;
  if (!gone && now.size >= begin_ + size_) return;
  throw IoError({.op = "pwrite",
                 .path = file_->path(),
                 .offset = begin_,
                 .length = size_,
                 .error = ESTALE,
                 .detail = gone ? "the file was deleted or replaced meanwhile"
                                : "the file was cut meanwhile"});
}

bool FileRange::open(IoRequest::Op op, bool waits, const Seen& seen) {
  const bool write = op == IoRequest::Op::kWrite;
  FileCache::Lease file = find(write, waits, seen);
  if (!file) return false;
  queue_ = &files_.queues.queue_of(*file);
  if (!write) check_holds(*file, seen);
  file_ = std::move(file);
  return true;
}

FileCache::Lease FileRange::find(bool write, bool waits, const Seen& seen) {
  const FileCache::Request request{
      .mode = write ? File::Mode::kWrite : File::Mode::kRead,
      // Granules are seldom larger than a page.
      .buffered =
          !is_aligned(begin_, page_size()) || !is_aligned(size_, page_size()),
      .waits = waits,
      .now = seen.file};
  if (const int* fd = std::get_if<int>(&name_)) {
    return files_.cache.open(*fd, request);
  }
  return files_.cache.open(std::get<std::string>(name_), request);
}

void FileRange::grow() const {
  try {
    file_->grow(begin_, size_);
  } catch (const IoError& error) {
    // Deleted files take up space while they are kept open here.
    if (error.error() != ENOSPC || !files_.cache.drop_deleted()) throw;
    file_->grow(begin_, size_);
  }
  if (!file_->reserves()) files_.queues.note_unreserved(*file_);
}

void FileRange::check_holds(const File& file, const Seen& seen) const {
  if (size_ == 0) return;
  // Otherwise ask again: a file that was too short may have grown since.
  if (seen.file == file.identity() && begin_ + size_ <= seen.size) return;
  const std::uint64_t end = file.size();
  if (begin_ + size_ <= end) return;
  throw IoError({.op = "pread",
                 .path = file.path(),
                 .offset = begin_,
                 .length = size_,
                 .error = EIO,
                 .detail = "the file ends at byte " + std::to_string(end)});
}

}  // namespace torch_ext
