// Files, and how they are given space before they are written.
//
// A file is opened once by name, without following links. The same descriptor
// becomes the direct one, so no other file can take the name in between. The
// buffered descriptor comes later, through /proc/self/fd. O_DIRECT and its
// alignment are asked of the kernel (STATX_DIOALIGN).
//
// reserve() is for files that only this process makes longer, such as scratch:
// on failure it sets the old size again. grow() is for the user's files, and
// must leave them as they were. It works in this order:
//
// 1. It finds the holes in the range (FIEMAP), and counts the bytes that are
//    missing.
// 2. It asks statvfs() for room first, since a fallocate() that fails keeps
//    what it got.
// 3. It allocates with FALLOC_FL_KEEP_SIZE, and sets the size last.
// 4. Where there is no fallocate(), it writes zeros to the holes and beyond the
//    end, and syncs them.
// 5. After a failure it punches the holes again, and cuts what it added beyond
//    the end.

#include "torch_ext/io/file.h"

#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "base/cut_point.h"
#include "file_size_signal.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext {
namespace {

/// Suits every device. It is used where the kernel does not say what this one
/// needs.
constexpr std::size_t kSafeAlignment = 4096;

constexpr std::uint64_t kMaxFileSize = std::numeric_limits<std::int64_t>::max();

[[noreturn]] void fail(std::string op, std::string path, int error,
                       std::string detail = {}) {
  throw IoError({.op = std::move(op),
                 .path = std::move(path),
                 .error = error,
                 .detail = std::move(detail)});
}

/// Repeats a call that a signal interrupts, but not for ever. The call begins
/// anew each time, so a timer that is quicker than the call would never let it
/// end.
template <typename Call>
auto retrying(Call call) {
  constexpr int kMostInterruptions = 100;
  auto result = call();
  for (int i = 0; i < kMostInterruptions && result < 0 && errno == EINTR; ++i) {
    result = call();
  }
  return result;
}

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  return retrying(
      [&] { return ::open(path, flags | O_CLOEXEC | O_NOCTTY, mode); });
}

/// What the user can do about a name that is a link, or whose links lead round
/// in a circle.
std::string link_remedy(const std::string& path) {
  struct stat status;
  const bool circle = ::stat(path.c_str(), &status) != 0 && errno == ELOOP;
  return circle ? "the links lead round in a circle"
                : "it is a link, and links are not followed: pass "
                  "os.path.realpath(path), in C++ realpath()";
}

/// Opens a file, or makes it if it may. `created` tells which. Whether it is a
/// regular file is not checked here.
int open_or_create(const std::string& path, int access, bool may_create,
                   bool& created) {
  // Without O_NONBLOCK, opening a FIFO would wait for its other end.
  const int flags = access | O_NOFOLLOW | O_NONBLOCK;
  // Another process may make or remove the file in between, but hardly every
  // time.
  for (int attempt = 0; attempt < 100; ++attempt) {
    created = false;
    int fd = open_retrying(path.c_str(), flags);
    if (fd >= 0 || errno != ENOENT || !may_create) return fd;
    created = true;
    fd = open_retrying(path.c_str(), flags | O_CREAT | O_EXCL, 0600);
    if (fd >= 0 || errno != EEXIST) return fd;
  }
  return -1;
}

struct stat status_of(int fd, const std::string& path) {
  struct stat status;
  if (fstat(fd, &status) != 0) fail("fstat", path, errno);
  return status;
}

File::Identity identity_of(const struct stat& status) {
  return {status.st_dev, status.st_ino};
}

void check_regular(const struct stat& status, const std::string& path) {
  if (S_ISDIR(status.st_mode)) fail("open", path, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    fail("open", path, EINVAL, "not a regular file");
  }
}

/// The alignment that direct I/O demands. Both are 0 if the file has no direct
/// I/O.
struct DirectAlignment {
  std::size_t memory = kSafeAlignment;
  std::size_t offset = kSafeAlignment;
};

DirectAlignment direct_alignment(int fd) {
  // This is the kernel's structure. A C library's may lack newer fields.
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

/// Opens the file behind `fd` again, through /proc, or else by `name` if that
/// is not empty. Returns -1, with errno, on failure.
int reopen(int fd, int flags, const std::string& name) {
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const int second = open_retrying(link.c_str(), flags);
  if (second >= 0 || errno != ENOENT || name.empty()) return second;
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

/// Whether the file system clearly has no room for `bytes` more bytes.
/// fallocate() would say so too, but would keep all that it could get.
bool has_no_room(int fd, std::uint64_t bytes) {
  struct statvfs space;
  if (fstatvfs(fd, &space) != 0 || space.f_blocks == 0) return false;
  const std::uint64_t free = geteuid() == 0 ? space.f_bfree : space.f_bavail;
  return bytes > free * space.f_frsize;
}

std::uint64_t bytes_allocated(const struct stat& status) {
  return std::uint64_t{512} * static_cast<std::uint64_t>(status.st_blocks);
}

/// Whether the file has holes, as far as the number of blocks tells. Blocks
/// beyond the end may hide a hole.
bool has_holes(const struct stat& status) {
  return bytes_allocated(status) < static_cast<std::uint64_t>(status.st_size);
}

/// A range of a file's bytes.
struct Range {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t size() const { return end - begin; }
};

/// The ranges of a part of a file that have no blocks. Null where the file
/// system does not say.
std::optional<std::vector<Range>> holes_in(int fd, Range part) {
  constexpr std::uint32_t kMost = 64;
  std::vector<Range> holes;
  for (std::uint64_t begin = part.begin; begin < part.end;) {
    // The head of the request, with room for kMost extents behind it.
    alignas(8) std::byte memory[sizeof(struct fiemap) +
                                kMost * sizeof(struct fiemap_extent)] = {};
    auto& map = *reinterpret_cast<struct fiemap*>(memory);
    map.fm_start = begin;
    map.fm_length = part.end - begin;
    map.fm_extent_count = kMost;
    if (ioctl(fd, FS_IOC_FIEMAP, &map) != 0) return std::nullopt;
    for (std::uint32_t i = 0; i < map.fm_mapped_extents; ++i) {
      const struct fiemap_extent& extent = map.fm_extents[i];
      const std::uint64_t first = std::min<std::uint64_t>(
          std::max<std::uint64_t>(extent.fe_logical, begin), part.end);
      if (first > begin) holes.push_back({begin, first});
      begin =
          std::max<std::uint64_t>(begin, extent.fe_logical + extent.fe_length);
    }
    if (map.fm_mapped_extents < kMost) {
      if (begin < part.end) holes.push_back({begin, part.end});
      break;
    }
  }
  return holes;
}

/// The lock of a file's size. Whoever makes the file longer holds it shared.
/// Whoever takes such a growth back holds it alone: the size that one has seen,
/// the other must not change. It does not reach other processes.
std::shared_mutex& growth_of(const File::Identity& file) {
  static std::array<std::shared_mutex, 64> mutexes;
  return mutexes[(file.inode * 31 + file.device) % mutexes.size()];
}

int open_unnamed(const std::string& directory) {
  const int fd = open_retrying(directory.c_str(), O_TMPFILE | O_RDWR, 0600);
  // File systems and kernels without O_TMPFILE answer with one of these.
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

File::File(std::string path, int fd)
    : path_(std::move(path)), buffered_fd_(fd) {}

File File::open(const std::filesystem::path& path, Mode mode) {
  const int access = mode == Mode::kRead    ? O_RDONLY
                     : mode == Mode::kWrite ? O_WRONLY
                                            : O_RDWR;
  const std::string name = absolute_path(path);
  bool created = false;
  const bool may_create = mode == Mode::kWrite || mode == Mode::kReadWrite;
  File file(name, open_or_create(name, access, may_create, created));
  const int fd = file.buffered_fd_;
  if (fd < 0) {
    const int error = errno;
    fail("open", file.path_, error,
         error == ELOOP ? link_remedy(file.path_) : "");
  }
  file.take_regular(access);
  if (created) file.make_private();
  return file;
}

File File::open(int fd) {
  const std::string name = "[descriptor " + std::to_string(fd) + "]";
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) fail("fcntl", name, errno);
  check_regular(status_of(fd, name), name);
  const int access = flags & (O_ACCMODE | O_SYNC | O_DSYNC);
  File file(name, reopen(fd, access, ""));
  if (file.buffered_fd_ < 0) fail("open", name, errno);
  file.take_regular(access);
  return file;
}

File File::scratch(const std::filesystem::path& directory) {
  const std::string parent = absolute_path(directory);
  int fd = open_unnamed(parent);
  if (fd < 0) fd = open_and_unlink(parent);
  File file((std::filesystem::path(parent) / "[scratch]").native(), fd);
  file.make_private();
  file.access_ = O_RDWR;
  file.identity_ = identity_of(status_of(fd, file.path_));
  file.add_direct();
  if (file.allocate(0, 0, 1) == 0) {
    static_cast<void>(ftruncate(fd, 0) == 0);
  }
  return file;
}

bool File::exists(const std::filesystem::path& path) {
  const std::string name = absolute_path(path);
  struct stat status;
  if (lstat(name.c_str(), &status) == 0) return true;
  if (errno != ENOENT && errno != ENOTDIR) fail("lstat", name, errno);
  return false;
}

std::optional<File::Identity> File::identify(const std::filesystem::path& path,
                                             std::uint64_t* size) {
  struct stat status;
  if (lstat(absolute_path(path).c_str(), &status) != 0) return std::nullopt;
  if (size != nullptr) *size = static_cast<std::uint64_t>(status.st_size);
  return identity_of(status);
}

std::optional<File::Identity> File::identify(int fd) noexcept {
  struct stat status;
  if (fstat(fd, &status) != 0) return std::nullopt;
  return identity_of(status);
}

/// Makes the descriptor that was just opened the direct one, if that is
/// possible.
void File::take_regular(int access) {
  const int fd = buffered_fd_;
  const struct stat status = status_of(fd, path_);
  check_regular(status, path_);
  access_ = access;
  identity_ = identity_of(status);
  const DirectAlignment alignment = direct_alignment(fd);
  const bool has_direct = alignment.memory != 0 && alignment.offset != 0;
  if (!has_direct) reason_ = "the file system has no direct I/O for this file";
  // This also ends O_NONBLOCK: only the opening had to be kept from blocking.
  if (has_direct && fcntl(fd, F_SETFL, O_DIRECT) == 0) {
    direct_fd_ = fd;
    buffered_fd_ = -1;
    memory_alignment_ = alignment.memory;
    offset_alignment_ = alignment.offset;
    return;
  }
  if (has_direct) reason_ = refusal(errno);
  if (fcntl(fd, F_SETFL, 0) != 0) fail("fcntl", path_, errno);
}

int File::buffered_fd() const {
  int fd = buffered_fd_;
  if (fd >= 0 || direct_fd_ < 0) return fd;
  fd = reopen(direct_fd_, access_, path_);
  if (fd < 0) fail("open", path_, errno, "again, without O_DIRECT");
  struct stat status;
  if (fstat(fd, &status) != 0 || identity_of(status) != identity_) {
    close(fd);
    fail("open", path_, ESTALE, "another file has taken its name");
  }
  if (fcntl(fd, F_SETFL, 0) != 0) {
    const int error = errno;
    close(fd);
    fail("fcntl", path_, error);
  }
  int none = -1;
  if (buffered_fd_.compare_exchange_strong(none, fd)) return fd;
  close(fd);
  return none;
}

int File::descriptors() const noexcept {
  return (direct_fd_ >= 0 ? 1 : 0) + (buffered_fd_ >= 0 ? 1 : 0);
}

/// Makes the mode exactly 0600. A umask may have taken permissions away.
void File::make_private() const {
  if (fchmod(fd(), 0600) != 0) fail("fchmod", path_, errno);
}

void File::add_direct() {
  const DirectAlignment alignment = direct_alignment(buffered_fd_);
  if (alignment.memory == 0 || alignment.offset == 0) {
    reason_ = "the file system has no direct I/O for this file";
    return;
  }
  direct_fd_ = reopen(buffered_fd_, access_ | O_DIRECT, "");
  if (direct_fd_ < 0) {
    if (is_shortage(errno)) fail("open", path_, errno, "with O_DIRECT");
    reason_ = refusal(errno);
    return;
  }
  memory_alignment_ = alignment.memory;
  offset_alignment_ = alignment.offset;
}

void File::give_name(const std::string& name) {
  const std::filesystem::path parent =
      std::filesystem::path(path_).parent_path();
  auto full = std::make_unique<const std::string>((parent / name).native());
  const std::string link = "/proc/self/fd/" + std::to_string(fd());
  const int error = linkat(AT_FDCWD, link.c_str(), AT_FDCWD, full->c_str(),
                           AT_SYMLINK_FOLLOW) == 0
                        ? 0
                        : errno;
  const bool has_it = error == EEXIST && identify(*full) == identity_;
  if (error != 0 && !has_it) {
    if (error == ENOENT && !exists(parent)) {
      fail("linkat", *full, ENOENT, "its directory is not there any more");
    }
    // A file that was unlinked cannot be linked again.
    const bool unlinked = error == ENOENT;
    fail("linkat", *full, unlinked ? EOPNOTSUPP : error,
         unlinked ? "the file system has no files without a name (O_TMPFILE)"
                  : "");
  }
  if (name_ == nullptr) name_ = full.release();
  cut_point("linked");
  if (retrying([&] { return fsync(fd()); }) != 0) fail("fsync", path(), errno);
  sync_directory(parent);
  cut_point("named");
}

void sync_directory(const std::filesystem::path& directory) {
  const std::string name = absolute_path(directory);
  const int fd = open_retrying(name.c_str(), O_RDONLY | O_DIRECTORY);
  if (fd < 0) fail("open", name, errno);
  const int error = retrying([&] { return fsync(fd); }) == 0 ? 0 : errno;
  close(fd);
  if (error != 0) fail("fsync", name, error);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      name_(other.name_.exchange(nullptr)),
      reason_(std::move(other.reason_)),
      identity_(other.identity_),
      access_(other.access_),
      direct_fd_(std::exchange(other.direct_fd_, -1)),
      buffered_fd_(other.buffered_fd_.exchange(-1)),
      reserves_(other.reserves_.load()),
      memory_alignment_(other.memory_alignment_),
      offset_alignment_(other.offset_alignment_) {}

File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  name_ = other.name_.exchange(name_);
  std::swap(reason_, other.reason_);
  std::swap(identity_, other.identity_);
  std::swap(access_, other.access_);
  std::swap(direct_fd_, other.direct_fd_);
  buffered_fd_ = other.buffered_fd_.exchange(buffered_fd_);
  reserves_ = other.reserves_.exchange(reserves_);
  std::swap(memory_alignment_, other.memory_alignment_);
  std::swap(offset_alignment_, other.offset_alignment_);
  return *this;
}

File::~File() {
  close_if_open(direct_fd_);
  close_if_open(buffered_fd_);
  delete name_.load();
}

std::size_t File::granule() const noexcept {
  return std::max({page_size(), memory_alignment_, offset_alignment_});
}

File::Presence File::presence() const {
  const struct stat status = status_of(fd(), path_);
  return {.links = static_cast<std::uint64_t>(status.st_nlink),
          .size = static_cast<std::uint64_t>(status.st_size)};
}

bool File::in_memory() const noexcept {
  struct statfs system = {};
  return retrying([&] { return ::fstatfs(fd(), &system); }) == 0 &&
         (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

std::uint64_t File::size() const {
  return static_cast<std::uint64_t>(status_of(fd(), path_).st_size);
}

int File::allocate(int mode, std::uint64_t offset, std::uint64_t length) const {
  if (offset > kMaxFileSize || length > kMaxFileSize - offset) return EFBIG;
  const FileSizeSignalBlocked signal_blocked;
  const int failed = retrying([&] {
    return fallocate(fd(), mode, static_cast<off_t>(offset),
                     static_cast<off_t>(length));
  });
  const int error = failed == 0 ? 0 : errno;
  if (error != EOPNOTSUPP && error != ENOSYS) return error;
  reserves_ = false;
  return EOPNOTSUPP;
}

std::string File::unreserved_note() const {
  return path_ +
         ": the file system has no fallocate: space that is new is made sure "
         "of by writing zeros to it, so its first use costs a write more";
}

// Only bytes that were written have blocks for certain. Where a server or a
// daemon gives out the blocks, only bytes that were synced have them.
void File::write_zeros(std::uint64_t offset, std::uint64_t length) const {
  constexpr std::size_t kChunk = std::size_t{1} << 20;
  const std::vector<std::byte> zeros(std::min<std::uint64_t>(kChunk, length));
  for (std::uint64_t done = 0; done < length; done += zeros.size()) {
    const auto left = std::min<std::uint64_t>(zeros.size(), length - done);
    write(offset + done, std::span(zeros).first(left));
  }
  sync();
  drop_cache();  // Others need the memory more.
}

void File::check_room(std::uint64_t bytes) const {
  if (!has_no_room(fd(), bytes)) return;
  throw IoError({.op = "statvfs",
                 .path = path_,
                 .length = bytes,
                 .error = ENOSPC,
                 .detail = "the file system has fewer bytes free"});
}

void File::reserve(std::uint64_t offset, std::uint64_t length) const {
  if (length == 0) return;
  const std::uint64_t old_size = size();
  int error = allocate(0, offset, length);
  if (error == 0) return;
  const std::uint64_t end = offset + length;
  const std::uint64_t beyond = std::max(offset, old_size);
  // This also gives back what was reserved before the failure.
  const auto give_back = [&] {
    if (end <= old_size) return;
    const FileSizeSignalBlocked signal_blocked;
    static_cast<void>(ftruncate(fd(), static_cast<off_t>(old_size)) == 0);
  };
  if (error == EOPNOTSUPP) {
    if (end <= beyond) return;
    error = has_no_room(fd(), end - beyond) ? ENOSPC : 0;
  }
  if (error == 0) {
    try {
      write_zeros(beyond, end - beyond);
      return;
    } catch (...) {
      give_back();
      throw;
    }
  }
  give_back();
  throw IoError({.op = "fallocate",
                 .path = path_,
                 .offset = offset,
                 .length = length,
                 .error = error});
}

void File::shrink(std::uint64_t size) const {
  const FileSizeSignalBlocked signal_blocked;
  if (ftruncate(fd(), static_cast<off_t>(size)) == 0) return;
  throw IoError(
      {.op = "ftruncate", .path = path_, .offset = size, .error = errno});
}

bool File::needs_space(std::uint64_t offset, std::uint64_t length) const {
  const struct stat status = status_of(fd(), path_);
  return offset + length > static_cast<std::uint64_t>(status.st_size) ||
         has_holes(status);
}

void File::grow(std::uint64_t offset, std::uint64_t length) const {
  std::shared_lock growing(growth_of(identity_));
  const struct stat status = status_of(fd(), path_);
  const auto old_size = static_cast<std::uint64_t>(status.st_size);
  const std::uint64_t end = offset + length;
  // Bytes between the old end and the range stay a hole.
  const Range beyond = {std::max(offset, old_size),
                        std::max({end, offset, old_size})};
  const Range inside = {offset, std::min(end, old_size)};
  std::optional<std::vector<Range>> holes = std::vector<Range>();
  if (inside.begin < inside.end && has_holes(status)) {
    holes = holes_in(fd(), inside);
  }
  // Blocks beyond the end may be there already.
  const std::uint64_t allocated = bytes_allocated(status);
  const std::uint64_t ahead = allocated > old_size ? allocated - old_size : 0;
  std::uint64_t missing = beyond.size() - std::min(beyond.size(), ahead);
  if (holes) {
    for (const Range& hole : *holes) missing += hole.size();
    if (beyond.size() == 0 && holes->empty()) return;
  }
  const auto check = [&](int error) {
    if (error == 0) return;
    throw IoError({.op = "fallocate",
                   .path = path_,
                   .offset = offset,
                   .length = length,
                   .error = error});
  };
  if (end > kMaxFileSize) check(EFBIG);
  check(has_no_room(fd(), missing) ? ENOSPC : 0);
  try {
    const std::uint64_t first = holes && holes->empty() ? beyond.begin : offset;
    // The size comes last, so that a failure half way leaves it as it was.
    const int error = allocate(FALLOC_FL_KEEP_SIZE, first, end - first);
    if (error != EOPNOTSUPP) {
      check(error);
      if (beyond.size() > 0) check(allocate(0, beyond.begin, beyond.size()));
      return;
    }
    for (const Range& hole : holes.value_or(std::vector<Range>())) {
      write_zeros(hole.begin, hole.size());
    }
    if (beyond.size() > 0) write_zeros(beyond.begin, beyond.size());
  } catch (...) {
    // Nobody else writes there now, so these bytes are the caller's.
    for (const Range& hole : holes.value_or(std::vector<Range>())) {
      static_cast<void>(fallocate(
          fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
          static_cast<off_t>(hole.begin), static_cast<off_t>(hole.size())));
    }
    growing.unlock();
    if (beyond.size() > 0) give_back(old_size, beyond.begin, end);
    throw;
  }
}

// Setting the size frees blocks beyond the end, even if the size is the same as
// before. If somebody else has made the file longer, they stay. A growth by
// another process between fstat() and ftruncate() would be cut: processes share
// no lock.
void File::give_back(std::uint64_t old_size, std::uint64_t begin,
                     std::uint64_t end) const {
  const std::unique_lock alone(growth_of(identity_), std::try_to_lock);
  struct stat status;
  if (!alone || fstat(fd(), &status) != 0) return;
  const auto size = static_cast<std::uint64_t>(status.st_size);
  const bool grown = size > begin && size <= end;
  if (size != old_size && !grown) return;
  const FileSizeSignalBlocked signal_blocked;
  const auto target = static_cast<off_t>(grown ? begin : old_size);
  static_cast<void>(ftruncate(fd(), target) == 0);
}

void File::sync() const {
  if (retrying([&] { return fdatasync(buffered_fd()); }) == 0) return;
  throw IoError({.op = "fdatasync", .path = path_, .error = errno});
}

bool File::share(const File& from, std::uint64_t from_offset,
                 std::uint64_t offset, std::uint64_t length) const {
  struct file_clone_range range = {};
  range.src_fd = from.fd();
  range.src_offset = from_offset;
  range.src_length = length;
  range.dest_offset = offset;
  if (retrying([&] { return ioctl(fd(), FICLONERANGE, &range); }) == 0) {
    return true;
  }
  switch (errno) {
    case EOPNOTSUPP:
    case ENOTTY:
    case ENOSYS:
    case EXDEV:
    case EINVAL:
      return false;
  }
  throw IoError({.op = "ioctl(FICLONERANGE)",
                 .path = path(),
                 .offset = offset,
                 .length = length,
                 .error = errno});
}

void File::write(std::uint64_t offset, std::span<const std::byte> bytes) const {
  const int fd = buffered_fd();
  const FileSizeSignalBlocked signal_blocked;
  while (!bytes.empty()) {
    const std::size_t length = std::min(bytes.size(), IoRequest::kMaxTransfer);
    const ssize_t moved = retrying([&] {
      return pwrite(fd, bytes.data(), length, static_cast<off_t>(offset));
    });
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

std::size_t File::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::size_t length =
        std::min(bytes.size() - done, IoRequest::kMaxTransfer);
    const ssize_t moved = retrying([&] {
      return pread(fd(), bytes.data() + done, length,
                   static_cast<off_t>(offset + done));
    });
    if (moved < 0) {
      throw IoError({.op = "pread",
                     .path = path_,
                     .offset = offset + done,
                     .length = length,
                     .error = errno});
    }
    if (moved == 0) break;
    done += static_cast<std::size_t>(moved);
    // A direct read ends between two granules only at the end of the file.
    if (direct() && !is_aligned(done, granule())) break;
  }
  return done;
}

void File::drop_cache() const {
  // This only tunes, so a failure does not matter.
  posix_fadvise(buffered_fd(), 0, 0, POSIX_FADV_DONTNEED);
}

}  // namespace torch_ext
