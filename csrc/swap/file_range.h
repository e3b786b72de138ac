#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>

#include "file_cache.h"
#include "file_order.h"
#include "file_queues.h"
#include "file_syncs.h"
#include "swap_operation.h"
#include "swap_target.h"
#include "torch_ext/io/file.h"

namespace torch_ext {

/// What the ranges of one FileTransfer share. It outlives them.
struct SharedFiles {
  FileCache& cache;
  FileQueues& queues;
  FileOrder& order;
  FileSyncs& syncs;
};

/// A range of a caller's file. Operations that overlap in a file take effect in
/// the order of the calls, if one of them writes. A write gets its space before
/// its first byte. It ends well only if the file still has its name and length,
/// and if a sync has answered for bytes that went through the page cache.
/// file_range.cpp tells the steps.
class FileRange final : public SwapTarget {
 public:
  /// A path, or a descriptor.
  using Name = std::variant<std::string, int>;

  FileRange(const SharedFiles& files, Name name, std::uint64_t begin,
            std::uint64_t size);

  /// Opens the file, if that can be done at once and no other operation has to
  /// go first. Called before enter(). Errors: what is wrong with the file.
  void look(IoRequest::Op op);

  bool enter(const OperationPtr& operation) override;
  Operations leave(const SwapOperation& operation,
                   std::exception_ptr error) override;
  bool prepare(IoRequest::Op op, bool may_block) override;
  void unprepare() override;
  ChunkShape chunk(const std::byte* data, std::uint64_t offset,
                   std::uint64_t rest, std::size_t buffer_size) const override;
  void start(const SwapOperation& operation, std::uint64_t offset,
             std::span<std::byte> bytes, Done done) override;
  bool settle(const SwapOperation& operation, Done done) override;

 private:
  /// What the path leads to, as it was just seen.
  struct Seen {
    std::optional<File::Identity> file;
    std::uint64_t size = 0;
  };

  bool open(IoRequest::Op op, bool waits, const Seen& seen);
  FileCache::Lease find(bool write, bool waits, const Seen& seen);
  void grow() const;
  void check_holds(const File& file, const Seen& seen) const;
  void check_written() const;
  bool moves_straight(const std::byte* data, std::uint64_t offset,
                      std::uint64_t length) const;
  bool is_direct(std::uint64_t offset, std::span<const std::byte> bytes) const;

  const SharedFiles files_;
  FilePlace place_;
  FileOrder::Entry* order_entry_ = nullptr;
  const Name name_;
  const std::uint64_t begin_;
  const std::uint64_t size_;
  bool grown_ = false;
  /// Set if some of the bytes go through the page cache.
  std::shared_ptr<FileSyncs::Writer> sync_;
  FileCache::Lease file_;
  IoQueue* queue_ = nullptr;
};

}  // namespace torch_ext
