// A file that replaces another one whole.
//
// 1. The file is made without a name, in the directory where it shall be.
//    Where the file system cannot do that, it gets a name beside.
// 2. It is locked (flock), which tells others that its maker lives.
// 3. Space is reserved. So a full drive is an error before any byte.
// 4. publish(): fsync of the file. Only now may a name lead to it.
// 5. linkat() to the name beside, since linkat() replaces nothing.
// 6. rename() to the name, which replaces what has it in one step.
// 7. fsync of the directory.
//
// Before step 6 the old file has the name, and after it the new one. Both are
// whole on the drive at that time, so a power cut finds one of them.

#include "torch_ext/io/new_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "file_lock.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

constexpr std::string_view kSuffix = ".torch_ext-new";
/// The longest name that Linux file systems have, in bytes.
constexpr std::size_t kLongestName = 255;
constexpr std::size_t kHexDigits = 16;

/// A name beside is ".NAME.HEX.torch_ext-new". A long NAME is cut.
std::string prefix_of(const std::string& name) {
  constexpr std::size_t kRest = 2 + kHexDigits + kSuffix.size();
  return "." + name.substr(0, kLongestName - kRest) + ".";
}

std::string hex_digits() {
  std::uint64_t word = 0;
  if (getrandom(&word, sizeof(word), 0) != sizeof(word)) {
    throw IoError({.op = "getrandom", .error = errno});
  }
  char digits[kHexDigits + 1];
  std::snprintf(digits, sizeof(digits), "%016llx",
                static_cast<unsigned long long>(word));
  return digits;
}

template <typename Call>
auto retrying(Call call) {
  constexpr int kMostInterruptions = 100;
  auto result = call();
  for (int i = 0; i < kMostInterruptions && result < 0 && errno == EINTR; ++i) {
    result = call();
  }
  return result;
}

/// A descriptor that is closed at its end.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

Descriptor open_at(const std::string& path, int flags) {
  return Descriptor(retrying([&] {
    return ::open(path.c_str(), flags | O_CLOEXEC | O_NOCTTY, 0666);
  }));
}

}  // namespace

class NewFile::Impl {
 public:
  explicit Impl(const std::string& path)
      : path_(path),
        parent_(std::filesystem::path(path).parent_path().native()),
        name_(std::filesystem::path(path).filename().native()) {
    const std::optional<mode_t> mode = mode_of_old();
    remove_left_behind();
    try {
      // Somebody who cleans up may take a file for left behind that has a name
      // and no lock yet. That is seldom, but hardly ever twice.
      constexpr int kMostAttempts = 100;
      int attempt = 0;
      do {
        const Descriptor made = make();
        if (mode && fchmod(made.get(), *mode) != 0) fail("fchmod", errno);
        file_.emplace(File::open(made.get()));
      } while (!lock() && ++attempt < kMostAttempts);
    } catch (...) {
      drop_name();
      throw;
    }
  }

  ~Impl() { drop_name(); }

  const File& file() const { return *file_; }

  void reserve(std::uint64_t bytes) const {
    file_->check_room(bytes);
    file_->reserve(0, bytes);
  }

  void publish() {
    if (retrying([&] { return fsync(file_->buffered_fd()); }) != 0) {
      fail("fsync", errno);
    }
    if (beside_.empty()) give_name_beside();
    if (rename(beside_.c_str(), path_.c_str()) != 0) fail("rename", errno);
    beside_.clear();
    try {
      sync_directory(parent_);
    } catch (const IoError& error) {
      fail(error.failure().op, error.error(),
           "of the directory: the new file is in place, but may not survive a "
           "power cut");
    }
  }

 private:
  [[noreturn]] void fail(std::string op, int error,
                         std::string detail = {}) const {
    throw IoError({.op = std::move(op),
                   .path = path_,
                   .error = error,
                   .detail = std::move(detail)});
  }

  /// Locks the file. Returns false, and forgets the file, if somebody else has
  /// removed it.
  bool lock() {
    try {
      lock_ = FileLock(*file_);
    } catch (const IoError& error) {
      // Without locks nobody removes it either.
      if (error.error() != EAGAIN) return true;
    }
    if (beside_.empty() || file_->presence().links > 0) return true;
    lock_ = FileLock();
    beside_.clear();
    return false;
  }

  /// The permissions of the file that has the name.
  std::optional<mode_t> mode_of_old() const {
    if (name_.empty() || name_ == "." || name_ == "..") fail("open", EISDIR);
    struct stat status;
    if (lstat(path_.c_str(), &status) != 0) {
      if (errno != ENOENT) fail("lstat", errno);
      return std::nullopt;
    }
    if (S_ISDIR(status.st_mode)) fail("open", EISDIR);
    if (S_ISLNK(status.st_mode)) {
      fail("open", ELOOP,
           "it is a link, and links are not followed: pass "
           "os.path.realpath(path), in C++ realpath()");
    }
    if (!S_ISREG(status.st_mode)) fail("open", EINVAL, "not a regular file");
    // rename() would replace a file that is protected from writing, too.
    if (faccessat(AT_FDCWD, path_.c_str(), W_OK, AT_EACCESS) != 0) {
      fail("access", errno);
    }
    return status.st_mode & 0777;
  }

  Descriptor make() {
    Descriptor unnamed = open_at(parent_, O_TMPFILE | O_RDWR);
    if (unnamed.get() >= 0) return unnamed;
    // File systems and kernels without O_TMPFILE answer with one of these.
    const bool unsupported = errno == EOPNOTSUPP || errno == EISDIR ||
                             errno == EINVAL || errno == ENOENT;
    if (!unsupported) fail("open", errno);
    beside_ = new_name_beside();
    Descriptor named = open_at(beside_, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW);
    if (named.get() < 0) {
      beside_.clear();
      fail("open", errno);
    }
    return named;
  }

  std::string new_name_beside() const {
    return parent_ + "/" + prefix_of(name_) + hex_digits() +
           std::string(kSuffix);
  }

  void give_name_beside() {
    const std::string link = "/proc/self/fd/" + std::to_string(file_->fd());
    const std::string name = new_name_beside();
    if (linkat(AT_FDCWD, link.c_str(), AT_FDCWD, name.c_str(),
               AT_SYMLINK_FOLLOW) != 0) {
      fail("linkat", errno);
    }
    beside_ = name;
  }

  void drop_name() noexcept {
    if (!beside_.empty()) unlink(beside_.c_str());
    beside_.clear();
  }

  /// Removes what savers of this name that were killed have left. Failures do
  /// not matter here.
  void remove_left_behind() const {
    const std::string prefix = prefix_of(name_);
    std::vector<std::string> names;
    if (DIR* const directory = opendir(parent_.c_str())) {
      while (const dirent* const entry = readdir(directory)) {
        const std::string_view name = entry->d_name;
        if (name.size() == prefix.size() + kHexDigits + kSuffix.size() &&
            name.starts_with(prefix) && name.ends_with(kSuffix)) {
          names.emplace_back(name);
        }
      }
      closedir(directory);
    }
    for (const std::string& name : names) {
      const std::string path = parent_ + "/" + name;
      try {
        const File old = File::open(path, File::Mode::kExisting);
        const FileLock lock(old);  // Fails while its maker lives.
        if (File::identify(path) == old.identity()) unlink(path.c_str());
      } catch (const IoError&) {
      }
    }
  }

  const std::string path_;
  const std::string parent_;
  const std::string name_;
  std::string beside_;  ///< The file's name now; empty if it has none.
  std::optional<File> file_;
  FileLock lock_;
};

NewFile::NewFile(const std::filesystem::path& path, std::uint64_t bytes)
    : path_(absolute_path(path)) {
  try {
    impl_ = std::make_unique<Impl>(path_);
    if (bytes > 0) impl_->reserve(bytes);
  } catch (const IoError& error) {
    IoFailure failure = error.failure();
    failure.path = path_;
    throw IoError(std::move(failure));
  }
}

NewFile::~NewFile() = default;

const File& NewFile::file() const noexcept { return impl_->file(); }

void NewFile::publish() { impl_->publish(); }

}  // namespace torch_ext
