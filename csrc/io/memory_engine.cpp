#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <compare>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <vector>

#include "base/mutex.h"
#include "engines.h"

namespace torch_ext {
namespace {

/// One file's bytes. Bytes within its size that were never written read as
/// zeros.
class MemoryFile {
 public:
  std::size_t read(std::uint64_t offset, std::span<std::byte> bytes) const {
    if (offset >= size_) return 0;
    bytes = bytes.first(std::min<std::uint64_t>(bytes.size(), size_ - offset));
    for (std::size_t done = 0; done < bytes.size();) {
      const std::uint64_t at = offset + done;
      const std::size_t count = within_block(at, bytes.size() - done);
      const auto block = blocks_.find(at / sizeof(Block));
      if (block == blocks_.end()) {
        std::memset(bytes.data() + done, 0, count);
      } else {
        std::memcpy(bytes.data() + done,
                    block->second->data() + at % sizeof(Block), count);
      }
      done += count;
    }
    return bytes.size();
  }

  /// Errors: std::bad_alloc; a prefix may then be written.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) {
    for (std::size_t done = 0; done < bytes.size();) {
      const std::uint64_t at = offset + done;
      const std::size_t count = within_block(at, bytes.size() - done);
      std::unique_ptr<Block>& block = blocks_[at / sizeof(Block)];
      if (block == nullptr) block = std::make_unique<Block>();
      std::memcpy(block->data() + at % sizeof(Block), bytes.data() + done,
                  count);
      done += count;
      size_ = std::max(size_, at + count);
    }
  }

 private:
  using Block = std::array<std::byte, std::size_t{1} << 16>;

  static std::size_t within_block(std::uint64_t at, std::size_t length) {
    return std::min<std::uint64_t>(sizeof(Block) - at % sizeof(Block), length);
  }

  std::map<std::uint64_t, std::unique_ptr<Block>> blocks_;
  std::uint64_t size_ = 0;
};

/// Tells files apart. The inode number of a file that is gone comes back, but
/// not with the same time of birth.
struct FileId {
  std::uint32_t device_major, device_minor;
  std::uint64_t inode;
  std::int64_t birth_seconds;
  std::uint32_t birth_nanoseconds;

  auto operator<=>(const FileId&) const = default;
};

/// A disk in RAM. Threads: any.
class MemoryDisk {
 public:
  /// Carries out a request. Returns bytes moved or -errno, as the kernel would.
  std::int64_t carry_out(const IoRequest& request) {
    struct statx file;
    if (statx(request.fd, "", AT_EMPTY_PATH, STATX_INO | STATX_BTIME, &file) !=
        0) {
      return -errno;
    }
    if (request.op == IoRequest::Op::kSync) return 0;
    if (!may(request)) return -EBADF;
    constexpr std::uint64_t kMaxOffset =
        std::numeric_limits<std::int64_t>::max();
    const std::size_t length =
        std::min(request.length, IoRequest::kMaxTransfer);
    if (request.offset > kMaxOffset - length) return -EINVAL;

    const MutexLock lock(mutex_);
    MemoryFile& data =
        files_[{file.stx_dev_major, file.stx_dev_minor, file.stx_ino,
                file.stx_btime.tv_sec, file.stx_btime.tv_nsec}];
    if (request.op == IoRequest::Op::kRead) {
      return static_cast<std::int64_t>(
          data.read(request.offset, {request.data, length}));
    }
    try {
      data.write(request.offset, {request.data, length});
    } catch (const std::bad_alloc&) {
      return -ENOSPC;
    }
    return static_cast<std::int64_t>(length);
  }

 private:
  static bool may(const IoRequest& request) {
    const int access = fcntl(request.fd, F_GETFL) & O_ACCMODE;
    return access == O_RDWR ||
           access == (request.op == IoRequest::Op::kRead ? O_RDONLY : O_WRONLY);
  }

  Mutex mutex_;
  std::map<FileId, MemoryFile> files_ GUARDED_BY(mutex_);
};

/// Moves the bytes when they are polled for, in code that sanitizers see.
class MemoryEngine final : public IoEngine {
 public:
  MemoryEngine(std::size_t depth, std::shared_ptr<MemoryDisk> disk)
      : depth_(depth), disk_(std::move(disk)) {
    waiting_.reserve(depth);
  }

  ~MemoryEngine() override {
    for (const IoRequest& request : waiting_) disk_->carry_out(request);
  }

  std::string_view name() const noexcept override { return "memory"; }
  std::size_t depth() const noexcept override { return depth_; }

  std::size_t submit(std::span<const IoRequest> batch) override {
    batch = batch.first(std::min(batch.size(), depth_ - waiting_.size()));
    waiting_.insert(waiting_.end(), batch.begin(), batch.end());
    return batch.size();
  }

  std::size_t poll(std::span<IoCompletion> out, std::size_t,
                   std::chrono::nanoseconds) override {
    const std::size_t count = std::min(out.size(), waiting_.size());
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = {waiting_[i].cookie, disk_->carry_out(waiting_[i])};
    }
    waiting_.erase(waiting_.begin(),
                   waiting_.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }

  void wake() noexcept override {}

 private:
  const std::size_t depth_;
  const std::shared_ptr<MemoryDisk> disk_;
  std::vector<IoRequest> waiting_;
};

}  // namespace

IoEngineFactory make_memory_engine_factory() {
  return [disk = std::make_shared<MemoryDisk>()](
             int depth) -> std::unique_ptr<IoEngine> {
    return std::make_unique<MemoryEngine>(static_cast<std::size_t>(depth),
                                          disk);
  };
}

}  // namespace torch_ext
