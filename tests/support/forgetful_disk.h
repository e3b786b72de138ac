#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {

/// A disk in memory whose cache forgets. It keeps every write and sync in a
/// log. So a test can look at each content that a power cut may leave. That is
/// any subset of what was written since the file's last sync, and any part of
/// it.
///
/// A sync covers the writes that had been carried out when it was submitted,
/// and no others. Files are told apart by inode; their names and sizes are the
/// real ones. Bytes that were never written are zeros. Threads: any.
class ForgetfulDisk {
 public:
  static constexpr std::size_t kBlock = 4096;

  ForgetfulDisk() = default;

  /// Engines of this disk. It must outlive them.
  IoEngineFactory factory() {
    return [this](int depth) -> std::unique_ptr<IoEngine> {
      return std::make_unique<Engine>(*this, static_cast<std::size_t>(depth));
    };
  }

  /// How many writes and syncs have been carried out.
  std::size_t events() const {
    const std::lock_guard lock(mutex_);
    return log_.size();
  }

  /// A write that a power cut may undo.
  struct Unsynced {
    std::size_t event = 0;
    std::uint64_t offset = 0;
    std::size_t blocks = 0;
  };
  /// Those after the first `events` events, in the order of the events.
  std::vector<Unsynced> unsynced(std::size_t events) const {
    const std::lock_guard lock(mutex_);
    std::vector<Unsynced> all;
    for (std::size_t i = 0; i < events; ++i) {
      if (is_unsynced(i, events)) {
        all.push_back({i, log_[i].offset, log_[i].blocks.size()});
      }
    }
    return all;
  }

  /// What of a block has reached the drive. Torn: the first half.
  enum class Kept { kNothing, kAll, kTorn };
  /// Tells it of block number `block` of a write.
  using Survives =
      std::function<Kept(const Unsynced& write, std::size_t block)>;
  /// What survives cut number `i` at the same event: nothing, all, and then a
  /// part that is drawn. `random` outlives the result.
  template <typename Random>
  static Survives any(std::size_t i, Random& random) {
    return [i, &random](const Unsynced&, std::size_t) {
      if (i == 0) return Kept::kNothing;
      if (i == 1) return Kept::kAll;
      const auto drawn = random() % 8;
      return drawn == 0 ? Kept::kTorn : drawn % 2 ? Kept::kAll : Kept::kNothing;
    };
  }

  /// The disk as a power cut after the first `events` events leaves it.
  std::unique_ptr<ForgetfulDisk> after_cut(std::size_t events,
                                           const Survives& survives) const {
    const std::lock_guard lock(mutex_);
    auto left = std::make_unique<ForgetfulDisk>();
    left->blocks_ = first_;
    for (std::size_t i = 0; i < events; ++i) {
      const Event& event = log_[i];
      const bool synced = !is_unsynced(i, events);
      const Unsynced write{i, event.offset, event.blocks.size()};
      for (std::size_t b = 0; b < event.blocks.size(); ++b) {
        const Kept kept = synced ? Kept::kAll : survives(write, b);
        if (kept == Kept::kNothing) continue;
        auto& block = left->blocks_[{event.file, event.offset / kBlock + b}];
        block = kept == Kept::kAll ? event.blocks[b]
                                   : torn(block.get(), *event.blocks[b]);
      }
    }
    left->first_ = left->blocks_;
    return left;
  }

 private:
  using Block = std::array<std::byte, kBlock>;
  using FileId = std::pair<dev_t, ino_t>;
  /// By file and number. They are shared with the log and never change.
  using Blocks =
      std::map<std::pair<FileId, std::uint64_t>, std::shared_ptr<const Block>>;

  struct Event {
    FileId file;
    std::uint64_t offset = 0;
    std::vector<std::shared_ptr<const Block>> blocks =
        {};  ///< A sync has none.
    /// A sync covers the file's writes among so many first events.
    std::size_t covers = 0;
  };

  struct Waiting {
    IoRequest request;
    std::size_t events_before;
  };

  class Engine final : public IoEngine {
   public:
    Engine(ForgetfulDisk& disk, std::size_t depth)
        : disk_(disk), depth_(depth) {}
    ~Engine() override {
      for (const Waiting& waiting : waiting_) disk_.carry_out(waiting);
    }

    std::string_view name() const noexcept override { return "memory"; }
    std::size_t depth() const noexcept override { return depth_; }
    std::size_t submit(std::span<const IoRequest> batch) override {
      batch = batch.first(std::min(batch.size(), depth_ - waiting_.size()));
      for (const IoRequest& request : batch) {
        waiting_.push_back({request, disk_.events()});
      }
      return batch.size();
    }
    std::size_t poll(std::span<IoCompletion> out, std::size_t,
                     std::chrono::nanoseconds) override {
      const std::size_t count = std::min(out.size(), waiting_.size());
      for (std::size_t i = 0; i < count; ++i) {
        out[i] = {waiting_[i].request.cookie, disk_.carry_out(waiting_[i])};
      }
      waiting_.erase(waiting_.begin(),
                     waiting_.begin() + static_cast<std::ptrdiff_t>(count));
      return count;
    }
    void wake() noexcept override {}

   private:
    ForgetfulDisk& disk_;
    const std::size_t depth_;
    std::vector<Waiting> waiting_;
  };

  static std::shared_ptr<const Block> torn(const Block* before,
                                           const Block& after) {
    auto block = before == nullptr ? std::make_shared<Block>()
                                   : std::make_shared<Block>(*before);
    std::copy_n(after.begin(), kBlock / 2, block->begin());
    return block;
  }

  bool is_unsynced(std::size_t write, std::size_t events) const {
    if (log_[write].blocks.empty()) return false;
    for (std::size_t i = write + 1; i < events; ++i) {
      const Event& later = log_[i];
      if (later.blocks.empty() && later.file == log_[write].file &&
          write < later.covers) {
        return false;
      }
    }
    return true;
  }

  std::int64_t carry_out(const Waiting& waiting) {
    const IoRequest& request = waiting.request;
    struct stat status;
    if (fstat(request.fd, &status) != 0) return -errno;
    const FileId file{status.st_dev, status.st_ino};
    const std::lock_guard lock(mutex_);
    if (request.op == IoRequest::Op::kSync) {
      log_.push_back({.file = file, .covers = waiting.events_before});
      return 0;
    }
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (request.op == IoRequest::Op::kRead) {
      if (request.offset >= size) return 0;
      const auto length =
          std::min<std::uint64_t>(request.length, size - request.offset);
      return read(file, request, length);
    }
    return write(file, request);
  }

  std::int64_t read(const FileId& file, const IoRequest& request,
                    std::size_t length) const {
    for (std::size_t done = 0; done < length;) {
      const std::uint64_t at = request.offset + done;
      const std::size_t count =
          std::min<std::uint64_t>(kBlock - at % kBlock, length - done);
      const auto block = blocks_.find({file, at / kBlock});
      if (block == blocks_.end()) {
        std::memset(request.data + done, 0, count);
      } else {
        std::memcpy(request.data + done, block->second->data() + at % kBlock,
                    count);
      }
      done += count;
    }
    return static_cast<std::int64_t>(length);
  }

  /// Only whole blocks: it stands for direct I/O.
  std::int64_t write(const FileId& file, const IoRequest& request) {
    if (request.offset % kBlock != 0 || request.length % kBlock != 0) {
      return -EINVAL;
    }
    Event event{.file = file, .offset = request.offset};
    for (std::size_t at = 0; at < request.length; at += kBlock) {
      auto block = std::make_shared<Block>();
      std::memcpy(block->data(), request.data + at, kBlock);
      blocks_[{file, (request.offset + at) / kBlock}] = block;
      event.blocks.push_back(std::move(block));
    }
    log_.push_back(std::move(event));
    return static_cast<std::int64_t>(request.length);
  }

  mutable std::mutex mutex_;
  Blocks first_;   ///< Before the first event.
  Blocks blocks_;  ///< Now.
  std::vector<Event> log_;
};

}  // namespace torch_ext::test
