#include "torch_ext/io/file.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "file_size_signal.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

/// Where direct and buffered I/O may meet: the page cache works in pages.
constexpr std::size_t kPage = 4096;
/// Suits every device where the kernel does not say what this one needs.
constexpr std::size_t kSafeAlignment = 4096;

constexpr std::uint64_t kMaxFileSize = std::numeric_limits<std::int64_t>::max();

[[noreturn]] void fail(std::string op, std::string path, int error,
                       std::string detail = {}) {
  throw IoError({.op = std::move(op),
                 .path = std::move(path),
                 .error = error,
                 .detail = std::move(detail)});
}

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  int fd = -1;
  do {
    fd = ::open(path, flags | O_CLOEXEC | O_NOCTTY, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

std::string absolute_path(const std::filesystem::path& path) {
  if (path.empty() || path.native().find('\0') != std::string::npos) {
    throw std::invalid_argument(
        "a path must not be empty or contain a NUL character");
  }
  std::error_code error;
  const std::filesystem::path full = std::filesystem::absolute(path, error);
  if (error) fail("getcwd", path.native(), error.value());
  return full.native();
}

/// Opens or makes a file that need not be a regular one yet. `created` tells
/// which.
int open_or_create(const std::string& path, int access, bool& created) {
  // O_NONBLOCK: opening a FIFO would wait for its other end.
  const int flags = access | O_NOFOLLOW | O_NONBLOCK;
  // Another process may make or remove the file in between, but not for ever.
  for (int attempt = 0; attempt < 100; ++attempt) {
    created = false;
    int fd = open_retrying(path.c_str(), flags);
    if (fd >= 0 || errno != ENOENT || access == O_RDONLY) return fd;
    created = true;
    fd = open_retrying(path.c_str(), flags | O_CREAT | O_EXCL, 0600);
    if (fd >= 0 || errno != EEXIST) return fd;
  }
  return -1;
}

void check_regular(int fd, const std::string& path) {
  struct stat status;
  if (fstat(fd, &status) != 0) fail("fstat", path, errno);
  if (S_ISDIR(status.st_mode)) fail("open", path, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    fail("open", path, EINVAL, "not a regular file");
  }
}

bool same_file(int a, int b) {
  struct stat first;
  struct stat second;
  return fstat(a, &first) == 0 && fstat(b, &second) == 0 &&
         first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

/// What statx says about direct I/O; 0 and 0: the file has none.
struct DirectAlignment {
  std::size_t memory = kSafeAlignment;
  std::size_t offset = kSafeAlignment;
};

DirectAlignment direct_alignment(int fd) {
  // The kernel's structure: a C library's may lack the fields of newer ones.
  struct KernelStatx {
    std::uint32_t mask;
    std::uint32_t unused[37];
    std::uint32_t memory;
    std::uint32_t offset;
    std::uint64_t spare[12];
  };
  static_assert(sizeof(KernelStatx) == 256);
  static_assert(offsetof(KernelStatx, memory) == 0x98);
  constexpr unsigned kDirectAlignment = 0x2000;  // STATX_DIOALIGN
  KernelStatx status = {};
  if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kDirectAlignment, &status) !=
          0 ||
      (status.mask & kDirectAlignment) == 0) {
    return {};
  }
  return {status.memory, status.offset};
}

/// A second descriptor of the file behind `fd`, with O_DIRECT: through /proc,
/// else by `name` if it has one. -1 and errno where there is none.
int reopen_direct(int fd, int access, const std::string& name) {
  const int flags = access | O_DIRECT;
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const int direct = open_retrying(link.c_str(), flags);
  if (direct >= 0 || errno != ENOENT || name.empty()) return direct;
  return open_retrying(name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK);
}

bool is_shortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOMEM;
}

std::string refusal(int error) {
  if (error == EINVAL) return "the file system refuses O_DIRECT";
  return "opening the file again with O_DIRECT failed (" + errno_name(error) +
         ")";
}

std::string random_name() {
  std::uint64_t words[2];
  if (getrandom(words, sizeof(words), 0) != sizeof(words)) {
    fail("getrandom", "", errno);
  }
  char name[64];
  std::snprintf(name, sizeof(name), ".torch_ext-%016llx%016llx",
                static_cast<unsigned long long>(words[0]),
                static_cast<unsigned long long>(words[1]));
  return name;
}

int open_unnamed(const std::string& directory) {
  const int fd =
      open_retrying(directory.c_str(), O_TMPFILE | O_RDWR | O_EXCL, 0600);
  // All that file systems and kernels without O_TMPFILE say.
  const bool unsupported = errno == EOPNOTSUPP || errno == EISDIR ||
                           errno == EINVAL || errno == ENOENT;
  if (fd < 0 && !unsupported) fail("open", directory, errno);
  return fd;
}

int open_and_unlink(const std::string& directory) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    const std::string path = directory + "/" + random_name();
    const int fd = open_retrying(path.c_str(),
                                 O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
    if (fd < 0 && errno == EEXIST) continue;
    if (fd < 0) fail("open", directory, errno);
    if (unlink(path.c_str()) == 0) return fd;
    const int error = errno;
    close(fd);
    fail("unlink", path, error);
  }
  fail("open", directory, EEXIST);
}

void close_if_open(int fd) {
  if (fd >= 0) close(fd);
}

}  // namespace

File::File(std::string path, int fd)
    : path_(std::move(path)), buffered_fd_(fd) {}

File File::open(const std::filesystem::path& path, Mode mode) {
  const int access = mode == Mode::kRead    ? O_RDONLY
                     : mode == Mode::kWrite ? O_WRONLY
                                            : O_RDWR;
  const std::string name = absolute_path(path);
  bool created = false;
  File file(name, open_or_create(name, access, created));
  if (file.buffered_fd_ < 0) {
    fail("open", name, errno, errno == ELOOP ? "links are not followed" : "");
  }
  check_regular(file.buffered_fd_, name);
  // Only the opening was not to block.
  if (fcntl(file.buffered_fd_, F_SETFL, 0) != 0) fail("fcntl", name, errno);
  if (created) file.make_private();
  file.add_direct(access, name);
  return file;
}

File File::scratch(const std::filesystem::path& directory) {
  const std::string parent = absolute_path(directory);
  int fd = open_unnamed(parent);
  if (fd < 0) fd = open_and_unlink(parent);
  File file((std::filesystem::path(parent) / "[scratch]").native(), fd);
  file.make_private();
  file.add_direct(O_RDWR, "");
  return file;
}

/// A umask can only have taken permissions away: 0600 needs all it has.
void File::make_private() const {
  if (fchmod(buffered_fd_, 0600) != 0) fail("fchmod", path_, errno);
}

void File::add_direct(int access, const std::string& name) {
  const DirectAlignment alignment = direct_alignment(buffered_fd_);
  if (alignment.memory == 0 || alignment.offset == 0) {
    reason_ = "the file system has no direct I/O for this file";
    return;
  }
  direct_fd_ = reopen_direct(buffered_fd_, access, name);
  if (direct_fd_ < 0) {
    if (is_shortage(errno)) fail("open", path_, errno, "with O_DIRECT");
    reason_ = refusal(errno);
    return;
  }
  if (!same_file(buffered_fd_, direct_fd_)) {
    close(std::exchange(direct_fd_, -1));
    reason_ = "another file took its name while it was opened";
    return;
  }
  memory_alignment_ = alignment.memory;
  offset_alignment_ = alignment.offset;
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      reason_(std::move(other.reason_)),
      direct_fd_(std::exchange(other.direct_fd_, -1)),
      buffered_fd_(std::exchange(other.buffered_fd_, -1)),
      memory_alignment_(other.memory_alignment_),
      offset_alignment_(other.offset_alignment_) {}

File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(reason_, other.reason_);
  std::swap(direct_fd_, other.direct_fd_);
  std::swap(buffered_fd_, other.buffered_fd_);
  std::swap(memory_alignment_, other.memory_alignment_);
  std::swap(offset_alignment_, other.offset_alignment_);
  return *this;
}

File::~File() {
  close_if_open(direct_fd_);
  close_if_open(buffered_fd_);
}

std::size_t File::granule() const noexcept {
  return std::max({kPage, memory_alignment_, offset_alignment_});
}

std::uint64_t File::size() const {
  struct stat status;
  if (fstat(buffered_fd_, &status) != 0) fail("fstat", path_, errno);
  return static_cast<std::uint64_t>(status.st_size);
}

void File::reserve(std::uint64_t offset, std::uint64_t length) const {
  const auto failed = [&](const char* op, int error) {
    return IoError({.op = op,
                    .path = path_,
                    .offset = offset,
                    .length = length,
                    .error = error});
  };
  if (length == 0) return;
  if (offset > kMaxFileSize || length > kMaxFileSize - offset) {
    throw failed("fallocate", EFBIG);
  }
  const auto end = static_cast<off_t>(offset + length);
  const auto old_size = static_cast<off_t>(size());
  const FileSizeSignalBlocked signal_blocked;
  int error = 0;
  do {
    error = fallocate(buffered_fd_, 0, static_cast<off_t>(offset),
                      static_cast<off_t>(length)) == 0
                ? 0
                : errno;
  } while (error == EINTR);
  if (error == 0) return;
  if (error == EOPNOTSUPP || error == ENOSYS) {
    if (end > old_size && ftruncate(buffered_fd_, end) != 0) {
      throw failed("ftruncate", errno);
    }
    return;
  }
  // Gives back what was reserved before the failure; that is what counts.
  if (end > old_size) {
    static_cast<void>(ftruncate(buffered_fd_, old_size) == 0);
  }
  throw failed("fallocate", error);
}

void File::write(std::uint64_t offset, std::span<const std::byte> bytes) const {
  const FileSizeSignalBlocked signal_blocked;
  while (!bytes.empty()) {
    const std::size_t length = std::min(bytes.size(), IoRequest::kMaxTransfer);
    const ssize_t moved =
        pwrite(buffered_fd_, bytes.data(), length, static_cast<off_t>(offset));
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) {
      throw IoError({.op = "pwrite",
                     .path = path_,
                     .offset = offset,
                     .length = length,
                     .error = moved < 0 ? errno : EIO});
    }
    offset += static_cast<std::uint64_t>(moved);
    bytes = bytes.subspan(static_cast<std::size_t>(moved));
  }
}

}  // namespace torch_ext
