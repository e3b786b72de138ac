#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/device/device.h"
#include "torch_ext/io/ticket.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/store/store.h"

namespace torch_ext {

/// How to make an OptimizerOffload.
struct TileOptions {
  StoreOptions store;
  /// The most bytes that tile buffers and scratch take together.
  std::uint64_t host_memory = std::uint64_t{512} << 20;
  /// How many of these bytes the kernels want for themselves: see scratch().
  std::uint64_t scratch_bytes = 0;
  /// Bytes of a tile, rounded up to what the drive takes. 0: by the rule that
  /// OptimizerOffload states.
  std::uint64_t tile_bytes = 0;
  /// What the files are called from the first commit on.
  StoreName name = {};
};

/// The former name, for one release.
using OptimizerOffloadOptions = TileOptions;

/// Counters since the object was made. Seconds are wall time.
struct OptimizerOffloadStats {
  std::uint64_t steps = 0;
  std::uint64_t bytes_read = 0;  ///< Padded, ended well.
  std::uint64_t bytes_written = 0;
  double read_seconds = 0;     ///< While at least one tile was being read.
  double update_seconds = 0;   ///< In kernels.
  double write_seconds = 0;    ///< While at least one tile was being written.
  double wait_seconds = 0;     ///< step() waited for I/O.
  double elapsed_seconds = 0;  ///< Since the first step began.
  std::uint64_t host_memory = 0;
  std::uint64_t host_bytes_peak = 0;  ///< Buffers and scratch, in use.
  std::uint64_t state_bytes = 0;      ///< In all tiles.
  std::uint64_t resident_bytes = 0;   ///< In tiles that stay in memory.
  std::uint64_t tile_visits = 0;      ///< By steps.
  std::uint64_t tile_hits = 0;        ///< Visits without a transfer.
  std::uint64_t tiles = 0;
  std::uint64_t tile_bytes = 0;  ///< Size of a buffer.
  std::uint64_t buffers = 0;
};

/// What host_memory is used for once parameters have state. In bytes.
struct OptimizerPlan {
  std::uint64_t host_memory = 0;
  std::uint64_t scratch_bytes = 0;
  std::uint64_t state_bytes = 0;
  std::uint64_t tile_bytes = 0;
  std::uint64_t tiles = 0;
  std::uint64_t lane_buffers = 0;  ///< Tiles pass through these.
  std::uint64_t resident_tiles = 0;
  std::uint64_t resident_bytes = 0;
  std::uint64_t step_bytes = 0;  ///< Read and written by a step.
  /// With this host_memory or more, an object would keep all state in memory.
  /// It is at most a tile and 1/1024 above the least that would do.
  std::uint64_t host_memory_for_all = 0;
};

/// What a lane did with a tile, in seconds since the last step() began. Reads
/// that were made ahead of the step start before 0. The step's last writes may
/// end after step() has returned.
struct LaneEvent {
  enum class Lane { kRead, kUpdate, kWrite };
  Lane lane = Lane::kRead;
  std::size_t tile = 0;
  double start = 0;
  double end = 0;
};

/// Something that a commit keeps beside the state, such as a parameter's
/// values: an array of elements.
struct CommittedValue {
  std::uint64_t elements = 0;
  std::uint32_t element_bytes = 0;  ///< From 1 to 64.
  bool operator==(const CommittedValue&) const = default;
};

/// Which commit of a store to go on from.
struct CommitChoice {
  std::uint64_t generation = 0;  ///< 0: the last that counts.
  /// Later generations do not count, since not all processes have them. They
  /// are given up. 0: all count.
  std::uint64_t newest = 0;
};

/// How processes that do something together learn whether all have done it.
/// Called once: with null when this process's part is durable, with its error
/// if it has failed. Returns whether all have called it with null. If it
/// throws, nobody knows, and the store takes no more writes.
using GroupVote = std::function<bool(const std::exception_ptr&)>;

/// What processes that commit together agree on. Each has a store of its own.
struct CommitGroup {
  /// The same in all: the greatest next_generation(). 0: there are no others.
  std::uint64_t generation = 0;
  GroupVote vote = {};
};

/// What a commit did.
struct CommitReport {
  std::uint64_t generation = 0;  ///< Counted from 1.
  std::uint64_t step = 0;        ///< The caller's.
  std::int64_t time = 0;         ///< Seconds since 1970.
  std::uint64_t bytes_written = 0;
  double seconds = 0;
};

/// What processes that make a snapshot together agree on.
struct SnapshotGroup {
  std::string place = {};  ///< The same in all: where each makes its own.
  /// A whole snapshot of this process makes way, since others have none: that
  /// call was killed. Not if somebody uses it or has committed to it.
  bool replace = false;
  GroupVote vote = {};
};

/// What snapshot() did.
struct SnapshotReport {
  std::uint64_t step = 0;  ///< The commit's.
  /// It shares blocks with the original. Else all bytes were copied.
  bool reflink = false;
  std::uint64_t bytes = 0;  ///< What state and values have, padded.
  double seconds = 0;
};

/// A commit that goes on behind the caller. Copies share it. Dropping it
/// cancels nothing. Threads: any. Forked children: StateError.
class CommitTicket {
 public:
  using Timeout = Ticket::Timeout;

  /// Returns when all values have been read: others than the optimizer may
  /// change them from then on. Errors: those of wait(), if it has failed before
  /// that.
  void wait_source(Timeout timeout = std::nullopt) const;

  /// Returns when the commit is durable. Errors: those of
  /// OptimizerOffload::commit(), at each call; TimeoutError after `timeout`,
  /// while the commit goes on.
  CommitReport wait(Timeout timeout = std::nullopt) const;

  /// Wait for at most `timeout`. Return whether wait() and wait_source() would
  /// now return or throw.
  bool wait_for(std::chrono::nanoseconds timeout) const;
  bool wait_source_for(std::chrono::nanoseconds timeout) const;
  /// The error that wait() throws after `timeout`, for callers of wait_for().
  static TimeoutError timed_out(std::chrono::nanoseconds timeout);

  /// The number that it has if it ends well.
  std::uint64_t generation() const;
  /// Whether it has ended, well or not. Never blocks.
  bool done() const;
  /// What it did; nothing before it has ended well. Never blocks.
  std::optional<CommitReport> report() const;

 private:
  friend class OptimizerOffload;
  friend struct RunningCommit;
  struct State;
  explicit CommitTicket(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// Optimizer state on disk. A parameter's state is a few fields, each with
/// something for every element. State is cut into tiles. A tile's fields lie
/// side by side, so a tile is one large read and one large write. Three lanes
/// run at once: tiles ahead are read, one is updated by the calling thread, and
/// those behind are written. Steps follow each other without a break. When
/// step() returns, its last writes are in flight, and the first tiles of the
/// next step are being read into buffers that become free.
///
/// Memory: a tile is a 256th of host_memory less scratch, between 1 MiB and 16
/// MiB. It is smaller, down to 64 KiB, where eight tiles would not fit. There
/// are as many buffers as the memory holds, at least 3. Tiles pass through
/// eight of them (or all, if there are fewer). In each of the others a tile
/// stays, and costs no transfer. The tiles that stay are spread evenly over the
/// order of visits. A step visits all tiles once, so any choice saves the same
/// bytes, and an even one keeps the drive busy throughout. If there is a buffer
/// for every tile, all stay. Only as many buffers are used as there are tiles.
///
/// Errors: the state may be half updated after a failed write, and after a read
/// or kernel that failed in the midst of a step. That call, or the next one,
/// throws. All later calls are refused with the same error until write_state()
/// has succeeded, which also gives up a step that has begun. After any other
/// failure, all is as before the call; examples are read_state(), and a step
/// that has updated nothing yet.
/// Threads: any, one call at a time. Forked children: StateError.
class OptimizerOffload {
 public:
  /// Errors: std::invalid_argument (host_memory is too small; the text says
  /// what is needed); those of Store.
  explicit OptimizerOffload(const TileOptions& options);
  ~OptimizerOffload();  ///< As close(), without its errors.
  OptimizerOffload(const OptimizerOffload&) = delete;
  OptimizerOffload& operator=(const OptimizerOffload&) = delete;

  /// Registers a parameter of `elements` (>= 0) elements. Its fields have at
  /// least one byte for each kCut elements, and at most 64 bytes for an
  /// element. Returns the parameter's number, counted from 0. Takes no space
  /// before the parameter's first step. Errors: std::invalid_argument.
  std::size_t add_parameter(std::uint64_t elements, const StateFields& fields);

  /// Gives a parameter other elements and fields. Its state and space are gone,
  /// as after forget_state(). In a step, it must have neither, and no part in
  /// the step. Errors: as add_parameter() and forget_state().
  void redefine_parameter(std::size_t parameter, std::uint64_t elements,
                          const StateFields& fields);

  /// As forget_state(). The number may then be returned by add_parameter().
  void remove_parameter(std::size_t parameter);

  /// Counts a step of each parameter in `active` (no number twice), and runs
  /// the kernel over their state. New state is zeros. Tiles without an active
  /// parameter are neither read nor written.
  /// Errors: IoError, also for an earlier call's writes; whatever the kernel
  /// throws. ENOSPC for new state comes before anything has changed.
  void step(std::span<const std::size_t> active, UpdateKernel& kernel);

  /// Begins a step in which parameters become active one by one. A thread of
  /// this object updates them meanwhile: it calls the kernel until end_step()
  /// has returned. Until then, only release(), end_step(), abandon_step(),
  /// write_state(), close() and the calls that count may be made.
  /// Errors: those of earlier calls' writes, as step(); StateError if a step
  /// has begun.
  void begin_step(UpdateKernel& kernel);

  /// Counts a step of a parameter. A tile is updated once all its parameters
  /// have been released and it is in memory. The next step reads tiles in the
  /// order in which they could be updated in this one. A parameter without
  /// state gets it, and its update, in end_step(); its state lies on the drive
  /// in the order of these calls. Returns at once.
  /// Errors: StateError if no step has begun; std::invalid_argument if there is
  /// no such parameter, or if it has been released in this step. A failure of
  /// the step is thrown by end_step().
  void release(std::size_t parameter);

  /// Updates what is left of the released parameters. Errors: as step(). But if
  /// ENOSPC comes for new state, state that existed before has been updated.
  void end_step();

  /// Gives up the step that has begun, if there is one. Returns when nobody
  /// calls its kernel any more. State may be half updated, as after an error.
  void abandon_step();

  /// Gives parameters without state zeros and no steps. Errors: IoError
  /// (ENOSPC); nothing has changed then.
  void add_state(std::span<const std::size_t> parameters);

  /// Gives parameters space, in which their first step finds zeros. They have
  /// no state before that step. Errors: as add_state().
  void make_room(std::span<const std::size_t> parameters);

  /// Takes state and space from parameters. Their next step begins with zeros,
  /// and counts from 1. This works after an error too. Errors: StateError in a
  /// step.
  void forget_state(std::span<const std::size_t> parameters);

  /// Shows the kernel all state that there is. The kernel must not change it.
  /// Errors: as step(). Failures of its own reads and of the kernel change
  /// nothing.
  void read_state(UpdateKernel& kernel);
  /// The same for these parameters only.
  void read_state(std::span<const std::size_t> parameters,
                  UpdateKernel& kernel);

  /// A parameter and the number of its steps.
  struct ParameterStep {
    std::size_t parameter = 0;
    std::uint64_t step = 0;
  };

  /// Forgets all state, and an earlier error. The kernel then fills the given
  /// parameters' new state, which is zeros. Errors: as step().
  void write_state(std::span<const ParameterStep> parameters,
                   UpdateKernel& kernel);

  /// Lets the kernel change these parameters' state, which is zeros where there
  /// was none, and sets their numbers of steps. Other state stays as it is.
  /// Errors: as step().
  void change_state(std::span<const ParameterStep> parameters,
                    UpdateKernel& kernel);

  /// Makes the state durable, as it is now. After a crash at any time, resume()
  /// finds this commit or a later one. State is not written again, except tiles
  /// that stay in memory. The first commit gives the files names, and takes
  /// space for a second copy of all state and values; each of the newest `keep`
  /// commits may need one more.
  ///
  /// `values` are written too. `reader` fills them in: it is called as in a
  /// step, with the value's index as the parameter, and the value in field 0.
  /// `document` is the caller's, in UTF-8; commits() returns it.
  /// Errors: IoError: ENOSPC before anything is written, EEXIST if another
  /// run's store has the name. StateError in a step, after a failure, and for a
  /// store without checksums. Those of the reader. The commit before is as it
  /// was, and steps may go on, unless the error says otherwise. StateError if
  /// another process of the group could not commit: then none has.
  CommitReport commit(std::uint64_t step, std::string document,
                      std::span<const CommittedValue> values,
                      UpdateKernel& reader, std::size_t keep = 1,
                      const CommitGroup& group = {});
  /// Begins a commit of the state and the values as they are now, and returns
  /// at once. A thread of this object makes it. Its error is thrown by the
  /// ticket, or else by the next commit(), start_commit() or close(), which
  /// then does nothing more than that. Meanwhile:
  /// - The values must not change before wait_source() returns, except by this
  ///   object's steps. `reader` is called on that thread, after enter_thread().
  /// - step(), begin_step() and read_state() wait until the values have been
  ///   read, and the tiles in memory have been written. Then they read and
  ///   update. Their writes wait for the end of the commit where only the
  ///   commit before has the space.
  /// - All other calls wait for its end, but not those that only ask, and not
  ///   add_parameter().
  /// The group's vote is called on that thread, beside other calls; on this one
  /// if this call fails. Errors of this call: those of earlier calls,
  /// StateError and std::invalid_argument as commit(), EEXIST.
  CommitTicket start_commit(std::uint64_t step, std::string document,
                            std::span<const CommittedValue> values,
                            std::unique_ptr<UpdateKernel> reader,
                            std::size_t keep = 1,
                            const CommitGroup& group = {});

  /// The number that the next commit has at least.
  std::uint64_t next_generation() const;

  /// What a commit says of itself.
  struct Committed {
    std::uint64_t generation = 0;
    std::uint64_t step = 0;
    std::int64_t time = 0;  ///< Seconds since 1970.
    std::string document;
  };
  /// The commits that are kept, oldest first. Errors: IoError (EIO) for a
  /// damaged one.
  std::vector<Committed> commits() const;
  /// Makes a commit that is kept the last one to go, as the newest is: what
  /// refers to it from outside is good for `keep` - 1 further commits. Errors:
  /// std::invalid_argument if there is no such generation.
  void renew(std::uint64_t generation);
  /// The commit that is kept and that commit() without values would make again,
  /// bit for bit; 0 if there is none. Errors: those of commit() before it
  /// writes.
  std::uint64_t same_commit(const std::string& document);
  /// Looks at the store that `options` names, and takes nothing. First comes
  /// what its last commit keeps, with itself at the end. Then comes what the
  /// one before it kept, if that can be read: other processes may not have the
  /// last one. Errors: as resume().
  static std::vector<std::vector<Committed>> find_commits(
      const TileOptions& options);

  /// Goes on from a commit of the store that `options` names. Parameters have
  /// the numbers, state and steps that they had then. tile_bytes is the store's
  /// own.
  /// Errors: IoError: ENOENT if nothing was committed there, EAGAIN if another
  /// process uses it, EIO for damage. std::invalid_argument for files that are
  /// no such store, if there is no such generation, or if host_memory is too
  /// small for it.
  static std::unique_ptr<OptimizerOffload> resume(
      const TileOptions& options, const CommitChoice& choice = {});

  /// Goes back to a commit that is kept, also after an error and in a step,
  /// which is given up. Parameters and state are as resume() finds them; those
  /// with later numbers have no state. `reader` is shown the commit's values.
  /// Later commits stay on the drive, and the next one follows them.
  /// Errors: std::invalid_argument if there is no such generation, and IoError
  /// for a damaged document: nothing has changed then. After any other error
  /// later calls are refused until rollback() or write_state() has succeeded.
  void rollback(std::uint64_t generation, UpdateKernel& reader);

  /// What a parameter is in a commit.
  struct CommittedParameter {
    std::uint64_t elements = 0;
    StateFields fields = {};
    std::uint64_t step = 0;
    bool has_state = false;
  };
  struct Contents {
    std::vector<CommittedParameter> parameters;  ///< By number.
    std::vector<CommittedValue> values;
  };
  /// What a commit that is kept has. Errors: as rollback(), before it changes
  /// anything.
  Contents contents(std::uint64_t generation) const;

  /// Shows the kernel the values of the commit that was made, resumed or rolled
  /// back to last, as commit() did. Errors: as read_state(); StateError if
  /// there is no commit.
  void read_values(UpdateKernel& kernel);

  /// Makes the last commit a store of its own in other directories: as many,
  /// of the same weights. resume() takes it, and nothing that happens to one of
  /// the two stores changes the other. Where the file system can, the two share
  /// blocks until one of them writes there; else the bytes are read, checked
  /// and written. A step may be open, and an earlier call may have failed.
  /// Memory: eight blocks of block_size.
  /// Errors: StateError if nothing was committed. std::invalid_argument for
  /// other directories. IoError: EEXIST if a store is there, of any epoch and
  /// world, ENOSPC before a byte is written, also where blocks would be shared,
  /// EIO for damage. Nothing is there then, and this store is as it was.
  /// StateError if another process of the group has failed: then none has a
  /// snapshot.
  SnapshotReport snapshot(const DirectoryList& directory,
                          const SnapshotGroup& group = {});

  /// What may be in snapshot()'s place.
  enum class SnapshotPlace {
    kFree,
    kUnfinished,  ///< Files of a snapshot without the first one: that call was
                  ///< killed, or the first one is elsewhere.
    kSnapshot,    ///< A snapshot of this store.
    kOther,       ///< Another store, or another file of its name.
  };
  /// Errors: as snapshot(), before it writes.
  SnapshotPlace look_at_snapshot(const DirectoryList& directory,
                                 const SnapshotGroup& group = {}) const;
  /// Throws what snapshot() does where look_at_snapshot() finds kOther.
  void refuse_others_at_snapshot(const DirectoryList& directory,
                                 const SnapshotGroup& group = {}) const;

  /// How many numbers add_parameter() has given.
  std::size_t parameters() const;

  bool has_state(std::size_t parameter) const;
  /// How many steps of the parameter have been counted.
  std::uint64_t step_of(std::size_t parameter) const;

  /// Page-aligned memory of options.scratch_bytes bytes for kernels, with
  /// undefined content. The first call makes it; from then on it counts.
  /// close() frees it.
  std::span<std::byte> scratch();

  /// Page-locks scratch(), or the tiles' buffers, for the device and all others
  /// of its type, until close(). If that cannot be, the memory stays as it is,
  /// and notes() says why.
  void pin_scratch(const std::shared_ptr<Device>& device);
  void pin_tiles(const std::shared_ptr<Device>& device);

  /// Gives the scratch_bytes that go with a host_memory.
  using ScratchFor = std::function<std::uint64_t(std::uint64_t host_memory)>;
  /// The plan for these parameters, as if all of them got state at once,
  /// whether they have it yet or not. `scratch_for` serves host_memory_for_all.
  /// If it is empty, scratch_bytes stay the same.
  OptimizerPlan plan(std::span<const std::size_t> parameters,
                     const ScratchFor& scratch_for = {}) const;
  OptimizerOffloadStats stats() const;
  /// The events of the last step, by start. They are complete once its writes
  /// have ended.
  std::vector<LaneEvent> timeline() const;
  /// What a log should say, such as why direct I/O is not used.
  const std::vector<std::string>& notes() const noexcept;
  const std::string& engine() const noexcept;

  /// Waits for writes in flight, then frees memory and disk space. Later calls
  /// throw StateError, except close() and those that only ask for counters.
  /// Errors: an error that no call has thrown yet; everything is closed then.
  void close();

 private:
  friend struct OptimizerOffloadProbe;  // For tests.
  class Impl;
  explicit OptimizerOffload(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
