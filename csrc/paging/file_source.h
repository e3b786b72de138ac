#pragma once

#include <sys/stat.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "torch_ext/io/io_queue.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/paging/pager.h"

namespace torch_ext {

/// A unit's bytes, as long as they are those of a file. file_source.cpp tells
/// how they are read.
/// Threads: one at a time; `done` is called on an I/O thread.
class FileSource {
 public:
  using Done = std::function<void(std::exception_ptr)>;

  /// Errors: std::invalid_argument if the file ends before the range; IoError.
  FileSource(FileRange range, std::shared_ptr<IoQueue> queue, bool verify);

  /// Bytes of memory that read() fills.
  std::uint64_t room() const { return length_; }
  /// Where the range begins in that memory: a multiple of 64.
  std::uint64_t skew() const { return skew_; }

  /// Reads to memory at a multiple of a page. `done` is called once, unless
  /// this throws. Errors of this call: std::bad_alloc. Through `done`: IoError
  /// (EIO if the file has changed since this was made).
  void read(std::byte* memory, IoPriority priority, std::uint64_t caller,
            Done done);
  /// Gives the read that runs another priority.
  void promote(IoPriority priority);

 private:
  struct Read;
  void end_piece(Read& read, std::size_t i, std::exception_ptr error) noexcept;
  void check_hash(Read& read, std::size_t i);
  void check_unchanged() const;
  std::size_t pieces() const;

  const FileRange range_;
  const std::shared_ptr<IoQueue> queue_;
  const bool verify_;
  std::uint64_t first_ = 0;   ///< Where in the file reading begins.
  std::uint64_t length_ = 0;  ///< Bytes that are read.
  std::uint64_t shift_ = 0;   ///< By so many bytes they are moved down.
  std::uint64_t skew_ = 0;
  struct stat stamp_ = {};
  /// The pieces have these, once a read has ended well.
  std::vector<std::uint64_t> hashes_;
  bool hashed_ = false;
  std::vector<Ticket> tickets_;  ///< While a read runs.
};

}  // namespace torch_ext
