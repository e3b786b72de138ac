#pragma once

#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#include "io_operation.h"

namespace torch_ext {

/// One I/O thread with an engine of its own, that it alone submits to and
/// reaps from.
class IoWorker {
 public:
  IoWorker(IoBacklog& backlog, const AioConfig& config,
           std::unique_ptr<IoEngine> engine);

  /// Errors: IoError when the system has no thread left.
  void start();
  /// Waits for the thread, which ends once the backlog is closed and empty.
  void join();
  void wake() noexcept { engine_->wake(); }

 private:
  void run();
  bool take_pieces();
  void submit_ready();
  void reap();
  void complete(const IoCompletion& completion);
  void advance(std::size_t slot, std::size_t bytes);
  void try_again(std::size_t slot, int error, const char* detail);
  void end(std::size_t slot);
  void fail(std::size_t slot, int error, const std::string& detail);
  IoRequest request_of(std::size_t slot);
  bool matches_checksum(const RunningPiece& running) const;
  std::size_t busy() const { return slots_.size() - free_.size(); }

  IoBacklog& backlog_;
  const AioConfig config_;
  std::unique_ptr<IoEngine> engine_;
  std::vector<RunningPiece> slots_;
  std::vector<std::size_t> free_;   ///< Slots without a piece.
  std::vector<std::size_t> ready_;  ///< Slots to submit, oldest first.
  std::size_t in_flight_ = 0;
  int refusals_ = 0;  ///< Submits in a row refused with nothing in flight.
  std::vector<RunningPiece> taken_;
  std::vector<IoRequest> batch_;
  std::vector<IoCompletion> completions_;
  std::thread thread_;
};

}  // namespace torch_ext
