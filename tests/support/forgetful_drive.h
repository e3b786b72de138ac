#pragma once

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torch_ext::test {

/// A drive whose cache forgets, under a real file system. It is a file that a
/// process of its own serves through FUSE; a loop device makes a drive of it.
/// When the power is cut, each block of 4 KiB that was written and not synced
/// is lost with probability 1/2.
///
/// For a process with mounts of its own. Its memory has the drive's bytes.
class ForgetfulDrive {
 public:
  static constexpr std::size_t kBlock = 4096;

  /// Has the bytes of `image`, and appears as a file in the empty directory
  /// `place`. Errors: std::runtime_error.
  ForgetfulDrive(const std::filesystem::path& image,
                 std::filesystem::path place, std::uint64_t seed)
      : place_(std::move(place)),
        seed_(seed),
        size_(std::filesystem::file_size(image)) {
    void* const memory =
        mmap(nullptr, kBlock + size_, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory");
    off_ = new (memory) std::atomic<bool>(false);
    data_ = static_cast<std::byte*>(memory) + kBlock;
    std::ifstream(image, std::ios::binary)
        .read(reinterpret_cast<char*>(data_),
              static_cast<std::streamsize>(size_));
    start();
  }
  ForgetfulDrive(const ForgetfulDrive&) = delete;
  ForgetfulDrive& operator=(const ForgetfulDrive&) = delete;
  ~ForgetfulDrive() {
    stop();
    munmap(off_, kBlock + size_);
  }

  std::filesystem::path file() const { return place_ / "drive"; }

  /// From now on nothing reaches the drive. Any process of this one's family.
  void cut() { *off_ = true; }

  /// The drive as it is after the cut. Nobody uses the file.
  /// Errors: std::runtime_error.
  void restart() {
    *off_ = true;
    stop();
    *off_ = false;
    start();
  }

  /// How many blocks cuts have taken.
  std::uint64_t lost() const { return *lost_counter(); }

 private:
  static constexpr std::uint64_t kFile = 2;  ///< Its node; the root is 1.

  std::uint64_t* lost_counter() const {
    return reinterpret_cast<std::uint64_t*>(data_ - kBlock + 64);
  }

  void start() {
    const int fuse = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fuse < 0) throw std::runtime_error("may not open /dev/fuse");
    const std::string how =
        "fd=" + std::to_string(fuse) + ",rootmode=40000,user_id=0,group_id=0";
    if (mount("drive", place_.c_str(), "fuse", 0, how.c_str()) != 0 ||
        pipe(control_.data()) != 0) {
      close(fuse);
      throw std::runtime_error("may not mount a FUSE file system");
    }
    server_ = fork();
    if (server_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      serve(fuse);
      forget();
      _exit(0);
    }
    close(fuse);
    if (server_ < 0) throw std::runtime_error("fork failed");
  }

  void stop() {
    umount2(place_.c_str(), MNT_DETACH);
    const char end = 0;
    static_cast<void>(write(control_[1], &end, 1) == 1);
    waitpid(server_, nullptr, 0);
    for (const int fd : control_) close(fd);
  }

  // In the process that serves: -----------------------------------------------

  void forget() {
    std::mt19937_64 random(seed_ + *lost_counter());
    for (const auto& [block, before] : unsynced_) {
      if (random() % 2 == 0) continue;
      std::copy(before.begin(), before.end(), data_ + block * kBlock);
      ++*lost_counter();
    }
  }

  void serve(int fuse) {
    std::vector<std::byte> request(std::size_t{1} << 20);
    while (true) {
      std::array<pollfd, 2> ready = {
          {{fuse, POLLIN, 0}, {control_[0], POLLIN, 0}}};
      if (poll(ready.data(), ready.size(), -1) < 0 && errno != EINTR) return;
      if ((ready[1].revents & POLLIN) != 0) return;
      const ssize_t length = read(fuse, request.data(), request.size());
      if (length < 0 && errno == ENODEV) return;  // It is not mounted.
      if (length >= static_cast<ssize_t>(sizeof(fuse_in_header))) {
        answer(fuse, request);
      }
    }
  }

  template <typename T>
  static T part(const std::vector<std::byte>& request, std::size_t at = 0) {
    T value;
    std::memcpy(&value, request.data() + at, sizeof(T));
    return value;
  }

  static void reply(int fuse, std::uint64_t to, int error,
                    const void* content = nullptr, std::size_t bytes = 0) {
    fuse_out_header head = {};
    head.len = static_cast<std::uint32_t>(sizeof(head) + bytes);
    head.error = -error;
    head.unique = to;
    const std::array<iovec, 2> parts = {
        {{&head, sizeof(head)}, {const_cast<void*>(content), bytes}}};
    static_cast<void>(writev(fuse, parts.data(), bytes > 0 ? 2 : 1) > 0);
  }

  fuse_attr attributes(std::uint64_t node) const {
    fuse_attr all = {};
    all.ino = node;
    all.mode = node == kFile ? S_IFREG | 0600 : S_IFDIR | 0700;
    all.nlink = 1;
    all.size = node == kFile ? size_ : 0;
    all.blksize = kBlock;
    return all;
  }

  void answer(int fuse, const std::vector<std::byte>& request) {
    constexpr std::size_t kHead = sizeof(fuse_in_header);
    const auto head = part<fuse_in_header>(request);
    const auto good = [&](const auto& content) {
      reply(fuse, head.unique, 0, &content, sizeof(content));
    };
    switch (head.opcode) {
      case FUSE_INIT: {
        fuse_init_out out = {};
        out.major = FUSE_KERNEL_VERSION;
        out.minor =
            std::min<std::uint32_t>(FUSE_KERNEL_MINOR_VERSION,
                                    part<fuse_init_in>(request, kHead).minor);
        out.flags = FUSE_BIG_WRITES;
        out.max_write = 128 << 10;
        return good(out);
      }
      case FUSE_LOOKUP: {
        const char* const name =
            reinterpret_cast<const char*>(request.data() + kHead);
        if (std::string_view(name) != "drive") {
          return reply(fuse, head.unique, ENOENT);
        }
        fuse_entry_out out = {};
        out.nodeid = kFile;
        out.attr = attributes(kFile);
        return good(out);
      }
      case FUSE_GETATTR:
      case FUSE_SETATTR: {
        fuse_attr_out out = {};
        out.attr = attributes(head.nodeid);
        return good(out);
      }
      case FUSE_OPEN: {
        fuse_open_out out = {};
        out.open_flags = FOPEN_DIRECT_IO;  // Nothing is kept in the kernel.
        return good(out);
      }
      case FUSE_READ: {
        const auto in = part<fuse_read_in>(request, kHead);
        const std::uint64_t from = std::min<std::uint64_t>(in.offset, size_);
        return reply(fuse, head.unique, 0, data_ + from,
                     std::min<std::uint64_t>(in.size, size_ - from));
      }
      case FUSE_WRITE: {
        const auto in = part<fuse_write_in>(request, kHead);
        if (*off_ || in.offset > size_ || in.size > size_ - in.offset) {
          return reply(fuse, head.unique, EIO);
        }
        const std::uint64_t end = in.offset + in.size;
        for (std::uint64_t block = in.offset / kBlock; block * kBlock < end;
             ++block) {
          const std::byte* const before = data_ + block * kBlock;
          unsynced_.try_emplace(block, before, before + kBlock);
        }
        std::memcpy(data_ + in.offset,
                    request.data() + kHead + sizeof(fuse_write_in), in.size);
        fuse_write_out out = {};
        out.size = in.size;
        return good(out);
      }
      case FUSE_FSYNC:
        if (*off_) return reply(fuse, head.unique, EIO);
        unsynced_.clear();
        return reply(fuse, head.unique, 0);
      case FUSE_RELEASE:
        return reply(fuse, head.unique, 0);
      case FUSE_FORGET:
      case FUSE_BATCH_FORGET:
      case FUSE_INTERRUPT:
        return;  // They have no answer.
      default:
        return reply(fuse, head.unique, ENOSYS);
    }
  }

  const std::filesystem::path place_;
  const std::uint64_t seed_;
  const std::uint64_t size_;
  std::atomic<bool>* off_ = nullptr;  ///< Shared, as the bytes are.
  std::byte* data_ = nullptr;
  std::array<int, 2> control_ = {-1, -1};
  pid_t server_ = -1;
  /// What blocks were at the last sync.
  std::map<std::uint64_t, std::vector<std::byte>> unsynced_;
};

}  // namespace torch_ext::test
