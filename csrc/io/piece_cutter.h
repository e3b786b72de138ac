#pragma once

#include <algorithm>
#include <cstdint>

#include "torch_ext/base/align.h"
#include "torch_ext/io/io_queue.h"

namespace torch_ext {

/// A part of an operation that one request can move.
struct Piece {
  int fd = -1;
  std::uint64_t offset = 0;  ///< In the file.
  std::byte* data = nullptr;
  std::size_t length = 0;
  std::size_t unit = 1;   ///< A transfer goes on at a multiple of it.
  std::size_t block = 0;  ///< Index of its checksum.
};

/// Cuts an operation into pieces of at most block_size bytes. What direct I/O
/// can take goes to the direct descriptor. The edges, and whatever lies at a
/// misaligned address, go to the buffered one. The two meet only at multiples
/// of the file's granule, so that no page is written both ways.
class PieceCutter {
 public:
  /// Errors: IoError if the buffered descriptor is needed and cannot be had.
  PieceCutter(const IoOperation& operation, std::uint64_t block_size)
      : file_(*operation.file),
        begin_(operation.offset),
        end_(operation.offset + operation.bytes.size()),
        data_(operation.bytes.data()),
        next_(operation.offset),
        direct_begin_(end_),
        direct_end_(end_),
        buffered_block_(block_size),
        direct_block_(block_size) {
    const std::uint64_t granule = file_.granule();
    const std::uint64_t first = align_up(begin_, granule);
    const std::uint64_t last = align_down(end_, granule);
    if (file_.direct() && first < last &&
        is_aligned(data_ + (first - begin_), file_.memory_alignment())) {
      direct_begin_ = first;
      direct_end_ = last;
      direct_block_ = std::max(align_down(block_size, granule), granule);
    }
    // Opened now, while an error still has a caller to go to.
    if (!uniform()) buffered_fd_ = file_.buffered_fd();
  }

  /// True if no byte needs the second descriptor.
  bool uniform() const {
    return !file_.direct() || begin_ == end_ ||
           (direct_begin_ == begin_ && direct_end_ == end_);
  }

  std::size_t count() const {
    const auto pieces = [](std::uint64_t bytes, std::uint64_t block) {
      return (bytes + block - 1) / block;
    };
    return pieces(direct_begin_ - begin_, buffered_block_) +
           pieces(direct_end_ - direct_begin_, direct_block_) +
           pieces(end_ - direct_end_, buffered_block_);
  }

  bool empty() const { return next_ == end_; }

  Piece next() {
    const bool direct = next_ >= direct_begin_ && next_ < direct_end_;
    const std::uint64_t zone_end = next_ < direct_begin_ ? direct_begin_
                                   : direct              ? direct_end_
                                                         : end_;
    const std::uint64_t block = direct ? direct_block_ : buffered_block_;
    Piece piece;
    piece.fd = direct || !file_.direct() ? file_.fd() : buffered_fd_;
    piece.offset = next_;
    piece.data = data_ + (next_ - begin_);
    piece.length = std::min(block, zone_end - next_);
    piece.unit =
        direct ? std::max(file_.offset_alignment(), file_.memory_alignment())
               : 1;
    piece.block = (next_ - begin_) / block;
    next_ += piece.length;
    return piece;
  }

 private:
  const File& file_;
  int buffered_fd_ = -1;
  std::uint64_t begin_;
  std::uint64_t end_;
  std::byte* data_;
  std::uint64_t next_;
  std::uint64_t direct_begin_;
  std::uint64_t direct_end_;
  std::uint64_t buffered_block_;
  std::uint64_t direct_block_;
};

}  // namespace torch_ext
