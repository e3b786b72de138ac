#pragma once

#include <chrono>
#include <cstddef>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "io_backlog.h"

namespace torch_ext {

/// One I/O thread with an engine of its own. Only this thread submits to the
/// engine and reaps from it. Its rounds are described in io_worker.cpp.
class IoWorker final : public Wakeable {
 public:
  /// How long a piece is tried again while the kernel says "not now".
  static constexpr std::chrono::nanoseconds kPatience = std::chrono::seconds(6);

  IoWorker(IoBacklog& backlog, const AioConfig& config,
           std::unique_ptr<IoEngine> engine,
           std::chrono::nanoseconds patience = kPatience);

  /// Errors: IoError when the system has no thread left.
  void start();
  /// Waits for the thread. It ends once the backlog is closed and empty.
  void join();
  void wake() noexcept override;

  /// Threads: any.
  const IoCounters& counters() const { return counters_; }

 private:
  void run();
  bool take_pieces();
  void drop_failed(std::vector<std::size_t>& slots);
  void take_due();
  void submit_ready();
  void end_arrived();
  void reap();
  std::size_t poll(std::size_t at_least, std::chrono::nanoseconds patience);
  std::size_t reap_together() const;
  void give_up_engine(std::exception_ptr error);
  void refuse_pieces();
  void complete(const IoCompletion& completion);
  void advance(std::size_t slot, std::size_t bytes);
  void try_again(std::size_t slot, int error, const char* detail);
  std::chrono::nanoseconds until_due() const;
  void end(std::size_t slot);
  void fail(std::size_t slot, int error, const std::string& detail);
  IoRequest request_of(std::size_t slot);
  bool matches_checksum(const RunningPiece& running) const;
  std::size_t busy() const { return slots_.size() - free_.size(); }
  /// How many pieces the engine could take, beside those that it has or will
  /// get.
  std::size_t room() const { return depth_ + arrived_.size() - busy(); }

  IoCounters counters_;
  IoBacklog& backlog_;
  const AioConfig config_;
  const std::chrono::nanoseconds patience_;
  std::unique_ptr<IoEngine> engine_;  ///< Null once it is given up.
  Mutex wake_mutex_;                  ///< wake() or the engine's end.
  IoEngine* to_wake_ GUARDED_BY(wake_mutex_);
  std::exception_ptr engine_error_;  ///< Why it was.
  const std::size_t depth_;          ///< The engine's.
  std::vector<RunningPiece> slots_;
  std::vector<std::size_t> free_;     ///< Slots without a piece.
  std::vector<std::size_t> ready_;    ///< Slots to submit, oldest first.
  std::vector<std::size_t> later_;    ///< Slots to submit again in a while.
  std::vector<std::size_t> arrived_;  ///< Slots whose bytes have all moved.
  std::size_t in_flight_ = 0;
  std::uint64_t bytes_in_flight_ = 0;
  int failed_polls_ = 0;  ///< In a row.
  std::vector<RunningPiece> taken_;
  std::vector<IoRequest> batch_;
  std::vector<IoCompletion> completions_;
  std::thread thread_;
};

}  // namespace torch_ext
