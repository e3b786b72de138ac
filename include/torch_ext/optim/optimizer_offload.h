#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "torch_ext/device/device.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// How to make an OptimizerOffload.
struct OptimizerOffloadOptions {
  StoreOptions store;
  /// Bytes for lane buffers and scratch together: an upper bound.
  std::uint64_t host_memory = std::uint64_t{512} << 20;
  /// Bytes of it that the kernels want for themselves: see scratch().
  std::uint64_t scratch_bytes = 0;
  /// Size of a tile, rounded up to what the drive takes; 0: by a rule.
  std::uint64_t tile_bytes = 0;
};

/// Counters since the object was made; seconds are of wall time.
struct OptimizerOffloadStats {
  std::uint64_t steps = 0;
  std::uint64_t bytes_read = 0;  ///< Padded, of requests that ended well.
  std::uint64_t bytes_written = 0;
  double read_seconds = 0;     ///< While at least one tile was being read.
  double update_seconds = 0;   ///< In kernels.
  double write_seconds = 0;    ///< While at least one tile was being written.
  double wait_seconds = 0;     ///< That step() waited for I/O.
  double elapsed_seconds = 0;  ///< Since the first step began.
  std::uint64_t host_memory = 0;
  std::uint64_t host_bytes_peak = 0;  ///< Of buffers and scratch, in use.
  std::uint64_t state_bytes = 0;      ///< Of all tiles.
  std::uint64_t resident_bytes = 0;   ///< Of those that stay in memory.
  std::uint64_t tile_visits = 0;      ///< By steps.
  std::uint64_t tile_hits = 0;        ///< Of them, those that cost no transfer.
  std::uint64_t tiles = 0;
  std::uint64_t tile_bytes = 0;  ///< Size of a buffer.
  std::uint64_t buffers = 0;
};

/// What host_memory is used for when parameters have got state. Bytes.
struct OptimizerPlan {
  std::uint64_t host_memory = 0;
  std::uint64_t scratch_bytes = 0;
  std::uint64_t state_bytes = 0;
  std::uint64_t tile_bytes = 0;
  std::uint64_t tiles = 0;
  std::uint64_t lane_buffers = 0;  ///< That tiles pass through.
  std::uint64_t resident_tiles = 0;
  std::uint64_t resident_bytes = 0;
  std::uint64_t step_bytes = 0;  ///< That a step reads and writes.
  /// An object made with this or more would keep all of it in memory. At most
  /// a tile and 1/1024 above the least.
  std::uint64_t host_memory_for_all = 0;
};

/// What a lane did with a tile, in seconds since the last step() began:
/// reads made ahead of it start before 0, its last writes end after it.
struct LaneEvent {
  enum class Lane { kRead, kUpdate, kWrite };
  Lane lane = Lane::kRead;
  std::size_t tile = 0;
  double start = 0;
  double end = 0;
};

/// Optimizer state on disk: fields of a parameter, each with something for
/// every element. State is cut in tiles, whose fields lie side by side, so that
/// a tile is one large read and one large write. Three lanes run at once: tiles
/// ahead are read, one is updated by the calling thread, those behind are
/// written. Steps follow each other without a break: when step() returns, its
/// last writes are in flight and the first tiles of the next step are being
/// read into the buffers that become free.
///
/// Memory: a tile is a 256th of host_memory less scratch, but 1 MiB to 16 MiB,
/// or an eighth of it where that is less, and at least 64 KiB; as many buffers
/// as the rest holds, at least 3. Tiles pass through eight of
/// them (or all, if there are fewer); in each of the others a tile stays, and
/// costs no transfer. These are spread evenly over the order of visits: a step
/// visits all tiles once, so any choice saves the same bytes, and an even one
/// keeps the drive busy throughout. If there is a buffer for every tile, all
/// stay. Buffers are used only as far as there are tiles.
///
/// Errors: after a failed write, and a failed read or kernel in the midst of a
/// step, the state may be half updated; the call, or the next one, throws, and
/// all later ones are refused with the same error until write_state() has
/// succeeded, which also gives up a step that has begun. After any other
/// failure, as of read_state() or of a step before it has updated anything, all
/// is as before the call.
/// Threads: any, one call at a time. Forked children: StateError.
class OptimizerOffload {
 public:
  /// Errors: std::invalid_argument (host_memory too small, with what is
  /// needed), those of Store.
  explicit OptimizerOffload(const OptimizerOffloadOptions& options);
  ~OptimizerOffload();  ///< As close(), without its errors.
  OptimizerOffload(const OptimizerOffload&) = delete;
  OptimizerOffload& operator=(const OptimizerOffload&) = delete;

  /// Registers `elements` (>= 0) with such fields, at least one and at most
  /// 64 bytes for an element, and returns their number, from 0. Takes no space
  /// before the parameter's first step.
  std::size_t add_parameter(std::uint64_t elements, const StateFields& fields);

  /// As forget_state(); then the number is free for add_parameter().
  void remove_parameter(std::size_t parameter);

  /// Counts a step of each parameter in `active` (no number twice) and runs
  /// the kernel over their state. New state is zeros. Tiles without an active
  /// parameter are neither read nor written.
  /// Errors: IoError, also of an earlier call's writes; ENOSPC for new state
  /// comes before anything has changed. Whatever the kernel throws.
  void step(std::span<const std::size_t> active, UpdateKernel& kernel);

  /// Begins a step in which parameters become active one by one. What is
  /// updated meanwhile is so by a thread of this object, which calls the
  /// kernel until end_step() has returned. Until then only release(),
  /// end_step(), abandon_step(), write_state(), close() and what counts may be
  /// called.
  /// Errors: those of earlier calls' writes, as step(); StateError if a step
  /// has begun.
  void begin_step(UpdateKernel& kernel);

  /// Counts a step of a parameter, whose state is updated when that of all
  /// others in its tile may be and when it is there. The order in which tiles
  /// could be updated is the one in which the next step has them read. State of
  /// a parameter that has none yet is made and updated by end_step(), and lies
  /// on the drive in the order of these calls. Returns at once. Errors:
  /// StateError if no step has begun; std::invalid_argument if there is no such
  /// parameter or it has been released in this step. A failure of the step is
  /// end_step()'s to throw.
  void release(std::size_t parameter);

  /// Updates what is left of the released parameters. Errors: as step(), but
  /// when ENOSPC for new state comes, state that there was has been updated.
  void end_step();

  /// Gives up a step that has begun, if one has, and returns when nobody calls
  /// its kernel any more. State may be half updated, as after an error.
  void abandon_step();

  /// Gives parameters without state zeros and no steps.
  /// Errors: IoError (ENOSPC), before anything has changed.
  void add_state(std::span<const std::size_t> parameters);

  /// Gives them space in which their first step finds zeros. They have no
  /// state before it. Errors: as add_state().
  void make_room(std::span<const std::size_t> parameters);

  /// Takes state and space from them: the next step begins with zeros and
  /// counts from 1. Also after an error. Errors: StateError in a step.
  void forget_state(std::span<const std::size_t> parameters);

  /// Shows the kernel all state there is, which it must not change.
  /// Errors: as step(); its own reads and kernel change nothing.
  void read_state(UpdateKernel& kernel);
  /// The same of those parameters' tiles only.
  void read_state(std::span<const std::size_t> parameters,
                  UpdateKernel& kernel);

  /// A parameter and the number of its steps.
  struct ParameterStep {
    std::size_t parameter = 0;
    std::uint64_t step = 0;
  };

  /// Forgets all state, and an earlier error, and has the kernel fill the
  /// given parameters' new state, which is zeros. Errors: as step().
  void write_state(std::span<const ParameterStep> parameters,
                   UpdateKernel& kernel);

  /// Has the kernel change these parameters' state, which is zeros where there
  /// was none, and sets their numbers of steps. Other state stays as it is.
  /// Errors: as step().
  void change_state(std::span<const ParameterStep> parameters,
                    UpdateKernel& kernel);

  bool has_state(std::size_t parameter) const;
  /// Steps counted so far.
  std::uint64_t step_of(std::size_t parameter) const;

  /// Page-aligned memory of options.scratch_bytes for kernels, made and
  /// counted at its first use; undefined content. Freed by close().
  std::span<std::byte> scratch();

  /// Page-locks scratch(), or the memory that tiles come to, for the device
  /// and all others of its type, until close(). If that cannot be, the memory
  /// stays as it is and notes() say why.
  void pin_scratch(const std::shared_ptr<Device>& device);
  void pin_tiles(const std::shared_ptr<Device>& device);

  /// The scratch_bytes that go with a host_memory.
  using ScratchFor = std::function<std::uint64_t(std::uint64_t host_memory)>;
  /// Of these parameters, whether they have state yet or not, as if all got it
  /// at once. `scratch_for` is for host_memory_for_all; empty: the same always.
  OptimizerPlan plan(std::span<const std::size_t> parameters,
                     const ScratchFor& scratch_for = {}) const;
  OptimizerOffloadStats stats() const;
  /// Of the last step, by start; complete once its writes have ended.
  std::vector<LaneEvent> timeline() const;
  /// What a log should hold, e.g. why direct I/O is not used.
  const std::vector<std::string>& notes() const noexcept;
  const std::string& engine() const noexcept;

  /// Waits for writes in flight and frees memory and disk space; later calls
  /// but those of counters and close() throw StateError. Idempotent.
  /// Errors: one that no call has thrown yet, after all is closed.
  void close();

 private:
  friend struct OptimizerOffloadProbe;  // Of tests.
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
