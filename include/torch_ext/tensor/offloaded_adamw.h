#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch_ext/base/error.h"
#include "torch_ext/config/aio_config.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/store/directories.h"
#include "torch_ext/tensor/adamw_options.h"

namespace torch_ext {

/// Options of a parameter group, as in torch::optim::AdamWOptions. Including
/// that would cost each consumer 20 s of compilation.
struct OffloadedAdamWOptions
    : torch::optim::OptimizerCloneableOptions<OffloadedAdamWOptions> {
  explicit OffloadedAdamWOptions(double lr = 1e-3) : lr_(lr) {}

  using betas_t = std::tuple<double, double>;
  TORCH_ARG(double, lr);
  TORCH_ARG(betas_t, betas) = std::make_tuple(0.9, 0.999);
  TORCH_ARG(double, eps) = 1e-8;
  TORCH_ARG(double, weight_decay) = 1e-2;
  TORCH_ARG(bool, maximize) = false;

 public:
  double get_lr() const override { return lr(); }
  void set_lr(const double lr) override { this->lr(lr); }
};

/// How much of a step runs during backward; Python's overlap_backward.
enum class OverlapBackward {
  kOff,
  /// Gradients on devices are copied to the host as soon as they may be final.
  /// step() makes the update. Copies take at most a quarter of host_memory, for
  /// the parameters that are on a device when the optimizer is made. step()
  /// copies again if a gradient has changed since, or if there was no room. It
  /// has no effect on the CPU.
  kPrefetch,
  /// Parameters are updated as soon as their gradients are final, and these
  /// gradients are freed: any use of one after backward() is an error. Between
  /// backward() and the end of step(), parameters are being updated. Do not
  /// read or change them meanwhile, nor the groups' options. Zero gradients
  /// with zero_grad() to none, which is its default.
  ///
  /// Put an AccumulateGuard around every backward pass of a step but the last.
  /// Gradients in page-locked memory are left to step(). So are those of a
  /// backward pass that has a function whose name has "Checkpoint": they may
  /// come in parts. Another function whose backward runs a backward pass of its
  /// own, or reads parameters other than those that it saved, is not noticed:
  /// take kPrefetch for that.
  ///
  /// It does not work with hooks that change gradients later, such as
  /// DistributedDataParallel's: backward() throws StateError. Nor does it work
  /// with parameters that are views of one tensor: PyTorch takes the update of
  /// one for a change of all, and throws.
  kUpdate,
};

/// Where and in how much memory the state is kept.
struct StateOptions {
  /// The first of several directories holds a mapped state_dict().
  DirectoryList nvme_path = {};
  std::uint64_t host_memory = std::uint64_t{512} << 20;  ///< Bytes, at most.
  /// What the drive holds of each moment. All but kExact lose precision.
  StateFormat state_format = StateFormat::kExact;
  std::uint64_t seed = 0;  ///< For their rounding.
  OverlapBackward overlap_backward = OverlapBackward::kOff;
  /// step() first clips gradients to this norm, as
  /// torch::nn::utils::clip_grad_norm_ does. kUpdate then behaves as kPrefetch.
  std::optional<double> max_grad_norm = {};
  /// Where parameters on a device are updated. kDevice needs kExact, and no
  /// parameter may be on the CPU.
  UpdateOn update_on = UpdateOn::kCpu;
  /// Where the tensors of a state_dict() are.
  StateDictMode state_dict_mode = StateDictMode::kTensors;
  AioConfig aio = {};
  std::string engine = "auto";  ///< Or one of engine_names().
  bool verify = true;           ///< Checksums are compared on reading.
};

/// The former name, for one release.
using OffloadOptions = StateOptions;

/// What a commit keeps besides the state.
struct CommitOptions {
  /// A 16-bit parameter and what the state has of its master are one number:
  /// without the parameters, resume() must find them as they are now.
  bool include_parameters = true;
  /// Any bytes, such as the state of a scheduler. Python reads them as bytes.
  std::string extra = {};
  std::size_t keep = 1;  ///< So many of the newest commits stay; at least 1.
};

/// What OffloadedAdamW shows in state(): steps, and no tensors. Erasing an
/// entry starts the parameter's state anew. A step that is set counts from the
/// next step on.
struct OffloadedAdamWParamState
    : torch::optim::OptimizerCloneableParamState<OffloadedAdamWParamState> {
  std::uint64_t step = 0;
};

/// AdamW whose state lives in a file on an NVMe drive, for LibTorch. Engine,
/// result and errors are those of Python's torch_ext.OffloadedAdamW. For
/// float32 parameters on the CPU, a step equals at::_fused_adamw_ bit for bit.
/// Parameters that require no gradient may be anything: they are left alone
/// until they have one. Errors about a parameter name its place and group.
///
/// The archive format of torch::optim is not supported: save() and load()
/// throw. state_dict() and load_state_dict() take their place. State belongs to
/// its parameter for as long as that lives, also while the parameter is in no
/// group.
///
/// commit() makes the state durable where it lies, and resume() goes on from it
/// in another process. Python resumes what C++ has committed, and the other way
/// round. In C++ a parameter is known by its place: its group, and its index
/// there. docs/checkpoints.md says what a commit promises.
/// Threads: one call at a time. Forked children: StateError.
class OffloadedAdamW : public torch::optim::Optimizer {
 public:
  using Optimizer = torch::optim::Optimizer;

  /// Errors: std::invalid_argument and TypeError for options and parameters,
  /// IoError for the directory.
  OffloadedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                 OffloadedAdamWOptions defaults, const StateOptions& offload);
  OffloadedAdamW(std::vector<at::Tensor> parameters,
                 OffloadedAdamWOptions defaults, const StateOptions& offload);
  ~OffloadedAdamW() override;

  /// Updates the parameters that have a gradient. Returns what the closure, if
  /// given, returned. The last tiles of the state may still be on their way to
  /// the drive.
  /// Errors: IoError, also for an earlier call's writes. TypeError,
  /// std::invalid_argument and StateError come before anything has changed.
  /// With kUpdate, StateError also comes for a gradient that an earlier step
  /// has taken. After the step it comes if options, groups or parameters were
  /// changed since backward took their gradients.
  at::Tensor step(LossClosure closure = nullptr) override;

  /// The norm that the last step() with max_grad_norm has found. Undefined
  /// before.
  const at::Tensor& grad_norm() const;

  /// Leaves gradients where they are, so that the next backward pass adds to
  /// them. With kUpdate, every backward pass of a step but the last needs one
  /// around it. It must not outlive the optimizer.
  class AccumulateGuard {
   public:
    explicit AccumulateGuard(OffloadedAdamW& optimizer);
    ~AccumulateGuard();
    AccumulateGuard(const AccumulateGuard&) = delete;
    AccumulateGuard& operator=(const AccumulateGuard&) = delete;

   private:
    OffloadedAdamW& optimizer_;
  };

  /// The state of one parameter, by its number among all groups' parameters in
  /// their order. Later steps do not change its tensors. StateDictMode says
  /// where these are.
  struct ParameterState {
    std::size_t parameter = 0;
    AdamWState state;
  };

  /// Returns the state of every parameter that has one. Errors: IoError (ENOMEM
  /// where kTensors takes more memory than there is). All is as before then.
  std::vector<ParameterState> state_dict();

  /// Forgets all state and takes this, part after part. It works after an error
  /// too. Errors: std::invalid_argument and TypeError, before anything has
  /// changed; IoError.
  void load_state_dict(const std::vector<ParameterState>& states);

  /// Makes the state durable as it is now, and the parameters with it. A crash
  /// at any time leaves this commit, or a later one, for resume(). The first
  /// commit gives the files in nvme_path names, and takes space for a second
  /// copy of state and parameters. `step` is the caller's number, up to 2^63 -
  /// 1. None: how many steps there were, counted on from the commit that was
  /// resumed or rolled back to.
  /// Errors: IoError: ENOSPC before anything is written, EEXIST if another
  /// run's store is there, of one process or several. std::invalid_argument for
  /// `step`, `keep`, options, and for a parameter that is in the groups twice.
  /// StateError between backward() and step() with kUpdate, after a failed
  /// step, and without `verify`. The commit before is as it was, and steps may
  /// go on, unless the error says otherwise.
  CommitReport commit(std::optional<std::uint64_t> step = {},
                      const CommitOptions& options = {});

  /// Begins a commit of what there is now, and returns at once. It goes on
  /// behind the next forward and backward pass. Its error is thrown by the
  /// ticket, or else by the next commit(), start_commit() or close(). Only this
  /// optimizer may change the parameters before the ticket's wait_source() has
  /// returned. step() waits until they have been copied; so does the first
  /// gradient with kUpdate. Errors of this call: as commit(), but those of the
  /// drive come later.
  CommitTicket start_commit(std::optional<std::uint64_t> step = {},
                            const CommitOptions& options = {});

  /// Makes the optimizer that was committed in nvme_path, as it was then.
  /// `groups` have the parameters in the places that they had. Their values are
  /// written in place, and the options of the groups are the commit's. So are
  /// state_format and seed, which `offload` leaves at their defaults. `step`
  /// takes the newest commit of that number; none takes the last commit. What
  /// Python has committed and C++ cannot keep is said in notes().
  /// Errors: IoError: ENOENT if nothing was committed there, EEXIST if the
  /// newest store is of several processes, which Python resumes, EAGAIN if
  /// another process uses the store, EIO for damage. std::invalid_argument if
  /// the parameters are others, of which ten are listed, or if there is no
  /// commit of `step`. Those of the constructors. Some parameters may be the
  /// commit's after an IoError.
  static std::unique_ptr<OffloadedAdamW> resume(
      std::vector<torch::optim::OptimizerParamGroup> groups,
      const StateOptions& offload, std::optional<std::uint64_t> step = {});
  static std::unique_ptr<OffloadedAdamW> resume(
      std::vector<at::Tensor> parameters, const StateOptions& offload,
      std::optional<std::uint64_t> step = {});

  /// Goes back to a commit that is kept: state, parameters, and the groups'
  /// options. `step` is as for resume(). It works after a failed step too, and
  /// between backward() and step(). Gradients stay: call zero_grad(). Later
  /// commits stay on the drive, until newer ones take their places.
  /// Errors: StateError if nothing was committed. std::invalid_argument if
  /// there is no commit of `step`, if it has no parameters, or if the groups
  /// have others than it. Nothing has changed then. After an IoError parameters
  /// may be half read, and each later call throws it until rollback() or
  /// load_state_dict() has succeeded.
  void rollback(std::optional<std::uint64_t> step = {});

  /// Makes the last commit a store of its own in another directory, or in
  /// others, one for each of nvme_path with the same weights. It is durable
  /// when this returns, and resume() takes it. See OptimizerOffload::snapshot()
  /// for how, and for the errors.
  SnapshotReport snapshot(const DirectoryList& directory);

  /// A commit that is kept on the drive.
  struct Committed {
    std::uint64_t generation = 0;  ///< Counted from 1.
    std::uint64_t step = 0;        ///< The caller's.
    std::int64_t time = 0;         ///< Seconds since 1970.
  };
  /// All of them, oldest first. Errors: IoError (EIO) for a damaged one.
  std::vector<Committed> commits();

  /// The number of the commit that was made, resumed or rolled back to last.
  std::optional<std::uint64_t> committed_step() const;
  /// What was kept with it: CommitOptions::extra, or Python's bytes or str.
  const std::string& committed_extra() const;

  /// Always throw StateError: there is no archive format.
  void save(torch::serialize::OutputArchive&) const override;
  void load(torch::serialize::InputArchive&) override;

  OptimizerOffloadStats stats();
  /// What the host memory is used for, also before the first step.
  OptimizerPlan plan();
  /// What a log should say, such as why direct I/O is not used.
  const std::vector<std::string>& notes();
  /// See OptimizerOffload::close.
  void close();

 private:
  class Impl;
  /// The commit that the store goes on from. No generation: the store is new.
  struct Resumed {
    StoreName name = {};
    std::uint64_t generation = 0;
  };
  OffloadedAdamW(const std::vector<torch::optim::OptimizerParamGroup>& groups,
                 OffloadedAdamWOptions defaults, const StateOptions& offload,
                 const Resumed& resume);
  std::unique_ptr<Impl> impl_;
};

}  // namespace torch_ext
