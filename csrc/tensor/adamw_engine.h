#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "adamw_checks.h"
#include "adamw_kernel.h"
#include "adamw_state.h"
#include "early_gradients.h"
#include "plain_modes.h"
#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {

/// AdamW for tensors, with its state in an OptimizerOffload. The Python and the
/// C++ optimizer share it. It keeps no tensor.
///
/// Errors: TypeError, std::invalid_argument and StateError for tensors that
/// cannot be used, before anything has changed; then those of OptimizerOffload.
/// Modes of the calling thread change nothing: see PlainModes.
/// Threads: any, one call at a time.
class AdamWEngine {
 public:
  /// A parameter, and the slot that add() returned for it.
  struct Parameter {
    std::size_t slot = 0;
    at::Tensor tensor;
  };
  struct Trained {
    Parameter parameter;
    at::Tensor gradient;
  };
  struct Group {
    AdamWHyper hyper;
    std::vector<Trained> trained;
  };
  struct Saved {
    Parameter parameter;
    AdamWState state;
  };

  /// `options.scratch_bytes` is chosen here. `seed` is for the rounding of
  /// formats that are not exact. `early_bytes`: the bytes of gradients on
  /// devices that prefetch() shall have room for. At most a quarter of the host
  /// memory is for them, and nothing if that is below 1 MiB.
  explicit AdamWEngine(const OptimizerOffloadOptions& options,
                       StateFormat format = StateFormat::kExact,
                       std::uint64_t seed = 0,
                       UpdateOn update_on = UpdateOn::kCpu,
                       std::uint64_t early_bytes = 0,
                       StateDictMode mode = StateDictMode::kTensors)
      : format_(format),
        seed_(seed),
        update_on_(update_on),
        mode_(mode),
        directory_(first_of(options.store.directory)),
        scratch_bytes_(scratch_bytes_for(options.host_memory)),
        early_wanted_(update_on == UpdateOn::kCpu ? early_bytes : 0),
        early_bytes_(early_bytes_for(options.host_memory, early_wanted_)),
        offload_(with_scratch(options, scratch_bytes_ + early_bytes_)) {
    adamw::check_update_on(update_on, format);
  }

  ~AdamWEngine() {
    if (open_ == nullptr) return;
    try {
      offload_.abandon_step();  // Its thread uses the lanes.
    } catch (...) {
      // A destructor has nobody to tell.
    }
  }
  AdamWEngine(const AdamWEngine&) = delete;
  AdamWEngine& operator=(const AdamWEngine&) = delete;

  /// Gives a parameter a slot. Takes no space yet. The parameter is checked if
  /// it is `trained`, else when it has a gradient: frozen ones may be anything.
  /// `first`: where it begins in the whole of which it is a shard, for
  /// RoundingNoise.
  std::size_t add(const at::Tensor& parameter, bool trained,
                  std::uint64_t first = 0) {
    if (trained) {
      adamw::check_parameter(parameter);
      adamw::check_place(parameter, update_on_);
    }
    slots_[next_slot_].first = first;
    return next_slot_++;
  }

  /// Takes a slot back, with its state. Errors: as forget().
  void remove(std::size_t slot) {
    const auto found = slots_.find(slot);
    if (found == slots_.end()) return;
    if (found->second.number) {
      offload_.remove_parameter(*found->second.number);
    }
    slots_.erase(found);
    if (slot + 1 == next_slot_) next_slot_ = slot;
  }

  /// Takes back this slot and all that were given later.
  void remove_from(std::size_t slot) {
    while (!slots_.empty() && slots_.rbegin()->first >= slot) {
      remove(slots_.rbegin()->first);
    }
  }

  /// Throws what is wrong with a parameter or its gradient. Other calls begin
  /// with this, for each parameter.
  void check(const Trained& trained) const {
    check(trained.parameter);
    adamw::check_place(trained.parameter.tensor, update_on_);
    adamw::check_gradient(trained.gradient, trained.parameter.tensor);
  }
  void check(const Parameter& parameter) const {
    adamw::check_parameter(parameter.tensor);
    if (fits(parameter)) return;
    const Slot& slot = slots_.at(parameter.slot);
    const at::Tensor& tensor = parameter.tensor;
    const at::IntArrayRef sizes = slot.sizes;
    const at::IntArrayRef strides = slot.strides;
    adamw::fail<StateError>(
        "the state was made for a parameter with dtype ", slot.dtype,
        ", sizes ", sizes, " and strides ", strides, "; it has now dtype ",
        tensor.scalar_type(), ", sizes ", tensor.sizes(), " and strides ",
        tensor.strides(),
        ". Load a state to go on, or delete it from the optimizer's state");
  }

  /// Makes a step of the parameters in the groups.
  void step(const std::vector<Group>& groups) {
    const PlainModes plain;
    AdamWKernel kernel(
        format_, seed_, [this] { return scratch(); }, lanes_, update_on_);
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) check(trained);
    }
    const std::vector<std::byte*> on_host = claim_early(groups);
    std::vector<std::size_t> numbers;
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) {
        AdamWKernel::Target target = target_of(trained, group.hyper);
        if (!on_host.empty()) target.on_host = on_host[numbers.size()];
        numbers.push_back(add_target(kernel, trained, std::move(target)));
      }
    }
    lanes_.around([&] { offload_.step(numbers, kernel); });
  }

  /// Takes a gradient on a device that may be final. Queues its copy to the
  /// host behind what the thread has queued there, for a step() that gets the
  /// same gradient unchanged. Returns at once. Does nothing if there is no
  /// room, for tensors that step() would refuse, and during a graph's capture.
  /// Errors: StateError with what the device says.
  void prefetch(const Trained& trained) {
    const PlainModes plain;
    const at::Tensor& parameter = trained.parameter.tensor;
    if (early_bytes_ == 0 || closed_ || parameter.is_cpu() ||
        !may_be_early(trained)) {
      return;
    }
    DeviceLane* const lane = lane_of(parameter);
    if (lane->device()->is_captured()) return;
    early_.bring(early_of(trained), *lane,
                 offload_.scratch().subspan(scratch_bytes_, early_bytes_));
  }

  /// Takes a gradient that is final, in a step that ends with finish(). A
  /// thread of the OptimizerOffload updates the state as soon as it is in
  /// memory, and lets go of the gradient. Called once for a parameter in a
  /// step, which BackwardStep sees to. The first call begins the step. Returns
  /// at once. Errors: as step(). A failed update is thrown by finish().
  void take(const AdamWHyper& hyper, const Trained& trained) {
    const PlainModes plain;
    check(trained);
    lane_of(trained.parameter.tensor);  // For the thread that begins now.
    begin_open_step();
    AdamWKernel::Target target = target_of(trained, open_->kept(hyper));
    if (target.lane != nullptr) {
      target.own_ready = target.lane->now();
      target.ready = target.own_ready.get();
    }
    offload_.release(add_target(open_->kernel, trained, std::move(target)));
  }

  /// Updates what is left of the gradients taken, and ends the step.
  void finish() {
    const PlainModes plain;
    begin_open_step();
    const std::unique_ptr<OpenStep> step = std::move(open_);
    step->kernel.use_threads(static_cast<std::size_t>(at::get_num_threads()));
    lanes_.around([&] { offload_.end_step(); });
  }

  /// Whether take() has begun a step that has not ended.
  bool in_step() const { return open_ != nullptr; }

  /// Gives parameters space for the state that they get in their first step.
  void make_room(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    offload_.make_room(numbers_of(parameters));
  }

  /// Gives parameters without state zeros and no steps.
  void init(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    offload_.add_state(numbers_of(parameters));
  }

  /// Returns the state of those parameters that have one, in tensors that later
  /// steps do not change. StateDictMode says where these are. The file of
  /// kMapped is in the first directory, and gone with the tensors. After an
  /// error all is as before.
  std::vector<Saved> save(const std::vector<Parameter>& parameters) {
    const PlainModes plain;
    AdamWSnapshot snapshot(format_, make_scratch(), mode_, directory_);
    std::vector<Saved> saved;
    std::vector<std::size_t> numbers;
    for (const Parameter& parameter : parameters) {
      if (!has_state(parameter.slot)) continue;
      check(parameter);
      numbers.push_back(number_of(parameter));
      snapshot.add(number_of(parameter), parameter.tensor.detach());
      saved.push_back({parameter, {}});
    }
    snapshot.open();
    offload_.read_state(numbers, snapshot);
    snapshot.finish();
    for (Saved& entry : saved) {
      entry.state = snapshot.state(number_of(entry.parameter));
      entry.state.step = step_of(entry.parameter.slot);
    }
    return saved;
  }

  /// Returns one tensor of a parameter's state, in memory of its own: exp_avg,
  /// exp_avg_sq or a 16-bit parameter's master. See AdamWFields.
  at::Tensor read(const Parameter& parameter, std::size_t field) {
    if (!has_state(parameter.slot)) {
      adamw::fail<StateError>("a parameter has no state to read");
    }
    const Slot& slot = slots_.at(parameter.slot);
    at::Tensor like = parameter.tensor.detach();
    if (!fits(parameter) && field != AdamWFields::kMaster) {
      // Rows are being cut off the parameter first, and then off its state.
      like = at::empty_strided(
          slot.sizes, slot.strides,
          at::TensorOptions().dtype(slot.dtype).device(at::kMeta));
    } else {
      check(parameter);
    }
    const std::vector<std::size_t> numbers{*slot.number};
    AdamWSnapshot snapshot(format_, make_scratch(), mode_, directory_);
    snapshot.add(numbers[0], like);
    at::Tensor tensor = snapshot.open_in_memory(numbers[0], field);
    offload_.read_state(numbers, snapshot);
    return tensor;
  }

  /// Changes the state of these parameters. If a parameter has state, a tensor
  /// that is given as undefined leaves its own as it is. Other state stays.
  void change(const std::vector<Saved>& given) {
    for (const auto& [parameter, state] : given) {
      check(parameter);
      adamw::check_saved(parameter.tensor, state, has_state(parameter.slot));
    }
    AdamWLoader loader(format_, seed_, make_scratch());
    offload_.change_state(fill(loader, given, /*anew=*/false), loader);
  }

  /// Takes state and space from slots. Their next step is the first. Errors:
  /// StateError between take() and finish().
  void forget(const std::vector<std::size_t>& slots) {
    std::vector<std::size_t> numbers;
    for (const std::size_t slot : slots) {
      if (const auto& number = slots_.at(slot).number) {
        numbers.push_back(*number);
      }
    }
    offload_.forget_state(numbers);
  }

  /// Forgets all state and takes this. It works after an error too.
  void load(const std::vector<Saved>& saved) {
    const PlainModes plain;
    for (const auto& [parameter, state] : saved) {
      adamw::check_saved(parameter.tensor, state);
    }
    offload_.abandon_step();
    open_.reset();  // Even if what follows fails.
    AdamWLoader loader(format_, seed_, make_scratch());
    offload_.write_state(fill(loader, saved, /*anew=*/true), loader);
    early_.clear();
  }

  /// Returns how these parameters' state will be kept.
  OptimizerPlan plan(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    return offload_.plan(numbers_of(parameters), [this](std::uint64_t budget) {
      return scratch_bytes_for(budget) + early_bytes_for(budget, early_wanted_);
    });
  }

  bool has_state(std::size_t slot) const {
    const auto& number = slots_.at(slot).number;
    return number && offload_.has_state(*number);
  }

  /// Whether a parameter's state, if it has one, fits the parameter as it is
  /// now.
  bool fits(const Parameter& parameter) const {
    if (!has_state(parameter.slot)) return true;
    const Slot& slot = slots_.at(parameter.slot);
    const at::Tensor& tensor = parameter.tensor;
    return tensor.scalar_type() == slot.dtype &&
           tensor.sizes() == at::IntArrayRef(slot.sizes) &&
           same_order(tensor.sizes(), tensor.strides(), slot.strides);
  }

  std::uint64_t step_of(std::size_t slot) const {
    const auto& number = slots_.at(slot).number;
    return number ? offload_.step_of(*number) : 0;
  }

  OptimizerOffload& offload() { return offload_; }

  /// What a log should say. The list grows.
  const std::vector<std::string>& notes() {
    for (const std::string& each : offload_.notes()) note(each);
    return notes_;
  }
  /// Adds to it, once.
  void note(const std::string& text) {
    if (std::ranges::count(notes_, text) == 0) notes_.push_back(text);
  }

  /// As OptimizerOffload::close(). It first waits for what is queued on
  /// devices.
  void close() {
    offload_.abandon_step();
    open_.reset();
    closed_ = true;
    early_.clear();
    std::exception_ptr error;
    try {
      lanes_.settle();
    } catch (...) {
      error = std::current_exception();
    }
    offload_.close();
    if (error != nullptr) std::rethrow_exception(error);
  }

 private:
  /// A parameter's number, and what its state was made for.
  struct Slot {
    std::optional<std::size_t> number;  ///< In the OptimizerOffload.
    std::vector<std::int64_t> sizes;
    std::vector<std::int64_t> strides;
    c10::ScalarType dtype = at::kFloat;
    std::uint64_t first = 0;  ///< A shard's place in the whole.
  };

  /// A step whose gradients come one by one.
  struct OpenStep {
    AdamWKernel kernel;
    std::deque<AdamWHyper> hypers = {};

    /// Returns a copy at an address that stays.
    const AdamWHyper& kept(const AdamWHyper& hyper) {
      for (const AdamWHyper& known : hypers) {
        if (known == hyper) return known;
      }
      return hypers.emplace_back(hyper);
    }
  };

  void begin_open_step() {
    if (open_ != nullptr) return;
    std::unique_ptr<OpenStep> step(
        new OpenStep{.kernel = {format_, seed_, [this] { return scratch(); },
                                lanes_, update_on_}});
    // The other threads belong to backward, which goes on meanwhile. More
    // threads than cores wait for one another.
    step->kernel.use_threads(1);
    offload_.begin_step(step->kernel);
    open_ = std::move(step);
  }

  /// Makes a target that comes after what the thread's stream has queued so
  /// far.
  AdamWKernel::Target target_of(const Trained& trained,
                                const AdamWHyper& hyper) {
    const at::Tensor& tensor = trained.parameter.tensor;
    AdamWKernel::Target target{
        .parameter = tensor.detach(),
        .gradient = OrderedReader(trained.gradient, tensor.strides()),
        .hyper = &hyper,
        .ordinal = ordinal_of(trained.parameter),
        .first = slots_.at(trained.parameter.slot).first,
        .lane = lane_of(tensor)};
    if (target.lane != nullptr) target.ready = &target.lane->ready();
    return target;
  }

  std::size_t add_target(AdamWKernel& kernel, const Trained& trained,
                         AdamWKernel::Target target) {
    const at::Tensor& tensor = trained.parameter.tensor;
    const std::size_t number = number_of(trained.parameter);
    kernel.add(number, std::move(target));
    // Autograd must see that a tensor that it saved has changed.
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    return number;
  }

  static bool may_be_early(const Trained& trained) {
    const auto& [parameter, gradient] = trained;
    const at::Tensor& tensor = parameter.tensor;
    return gradient.defined() && gradient.layout() == c10::Layout::Strided &&
           gradient.device() == tensor.device() &&
           gradient.sizes() == tensor.sizes() && gradient.has_storage() &&
           gradient.const_data_ptr() != nullptr &&
           adamw::is_supported(gradient.scalar_type()) &&
           gradient.is_non_overlapping_and_dense() &&
           same_order(gradient.sizes(), gradient.strides(), tensor.strides());
  }

  EarlyGradients::Wanted early_of(const Trained& trained) const {
    return {trained.parameter.slot, trained.gradient};
  }

  /// Returns where the gradients' copies are on the host, or null for each
  /// without one. Empty if none can have one.
  std::vector<std::byte*> claim_early(const std::vector<Group>& groups) {
    std::vector<std::byte*> found;
    if (early_bytes_ == 0) return found;
    std::vector<EarlyGradients::Wanted> wanted;
    std::vector<std::size_t> places;
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) {
        // During a capture nothing can be waited for. lanes_.around() says so.
        if (!trained.gradient.is_cpu() && may_be_early(trained) &&
            !lane_of(trained.parameter.tensor)->device()->is_captured()) {
          wanted.push_back(early_of(trained));
          places.push_back(found.size());
        }
        found.push_back(nullptr);
      }
    }
    std::vector<std::byte*> claimed;
    try {
      claimed = early_.claim(wanted);
    } catch (const c10::Error& error) {
      adamw::fail<StateError>(error.what_without_backtrace());
    }
    for (std::size_t i = 0; i < claimed.size(); ++i) {
      found[places[i]] = claimed[i];
    }
    return found;
  }

  /// Returns the first directory, made absolute. The store, which is made next,
  /// refuses an empty path, and an empty list.
  static std::filesystem::path first_of(const DirectoryList& directories) {
    if (directories.all().empty()) return {};
    const std::filesystem::path& path = directories.all().front().path;
    if (path.empty()) return path;
    std::error_code error;
    std::filesystem::path result = std::filesystem::absolute(path, error);
    if (error) {
      throw IoError({.op = "getcwd",
                     .path = path.string(),
                     .error = error.value(),
                     .detail = "the current directory cannot be found"});
    }
    return result;
  }

  static std::uint64_t scratch_bytes_for(std::uint64_t host_memory) {
    // The most is for the gradients of a tile of 16-bit parameters in one go.
    constexpr std::uint64_t kLeast = std::uint64_t{48} << 10;
    constexpr std::uint64_t kMost = std::uint64_t{12} << 20;
    return std::clamp(align_down(host_memory / 16, page_size()), kLeast, kMost);
  }

  static std::uint64_t early_bytes_for(std::uint64_t host_memory,
                                       std::uint64_t wanted) {
    constexpr std::uint64_t kLeast = std::uint64_t{1} << 20;
    if (host_memory < kLeast) return 0;
    const std::uint64_t most = align_down(host_memory / 4, page_size());
    return wanted > most ? most : align_up(wanted, page_size());
  }

  static OptimizerOffloadOptions with_scratch(OptimizerOffloadOptions options,
                                              std::uint64_t bytes) {
    options.scratch_bytes = bytes;
    return options;
  }

  /// The kernels' part of the scratch. What follows it is for early gradients.
  std::span<std::byte> scratch() {
    return offload_.scratch().first(scratch_bytes_);
  }

  StateFields fields_of(const at::Tensor& parameter) const {
    return adamw_fields(format_, master_format(parameter.scalar_type()));
  }

  /// The parameter's place among all that were ever added. Rounding shall not
  /// depend on which of them have been trained.
  static std::uint32_t ordinal_of(const Parameter& parameter) {
    return static_cast<std::uint32_t>(parameter.slot);
  }

  AdamWKernel::MakeScratch make_scratch() {
    return [this] {
      lanes_.make_way_for(nullptr);
      return scratch();
    };
  }

  /// The lane of the tensor's device. Null for the CPU.
  DeviceLane* lane_of(const at::Tensor& tensor) {
    if (tensor.is_cpu()) return nullptr;
    if (DeviceLane* known = lanes_.find(tensor)) return known;
    DeviceLane* const lane = lanes_.add(tensor.device());
    if (update_on_ == UpdateOn::kCpu) {
      offload_.pin_scratch(lane->device());
    } else {
      offload_.pin_tiles(lane->device());
    }
    return lane;
  }

  // Registers the parameter as it is now, unless it has state that stays.
  std::size_t number_of(const Parameter& parameter, bool anew = false) {
    Slot& slot = slots_.at(parameter.slot);
    if (!anew && has_state(parameter.slot)) return *slot.number;
    const at::Tensor& tensor = parameter.tensor;
    const bool same = slot.number && slot.dtype == tensor.scalar_type() &&
                      tensor.sizes() == at::IntArrayRef(slot.sizes);
    if (!same) {
      if (const auto old = std::exchange(slot.number, {})) {
        offload_.remove_parameter(*old);
      }
      slot.number = offload_.add_parameter(
          static_cast<std::uint64_t>(tensor.numel()), fields_of(tensor));
    }
    slot.sizes = tensor.sizes().vec();
    slot.strides = tensor.strides().vec();
    slot.dtype = tensor.scalar_type();
    return *slot.number;
  }

  // Prepares a loader. Returns the parameters and steps that it is for.
  std::vector<OptimizerOffload::ParameterStep> fill(
      AdamWLoader& loader, const std::vector<Saved>& given, bool anew) {
    std::vector<OptimizerOffload::ParameterStep> steps;
    for (const auto& [parameter, state] : given) {
      const bool fresh = anew || !has_state(parameter.slot);
      const std::size_t number = number_of(parameter, anew);
      loader.add(number, parameter.tensor, ordinal_of(parameter),
                 slots_.at(parameter.slot).first, state, fresh);
      steps.push_back({number, state.step});
    }
    return steps;
  }

  std::vector<std::size_t> numbers_of(
      const std::vector<Parameter>& parameters) {
    std::vector<std::size_t> numbers;
    for (const Parameter& parameter : parameters) {
      numbers.push_back(number_of(parameter));
    }
    return numbers;
  }

  const StateFormat format_;
  const std::uint64_t seed_;
  const UpdateOn update_on_;
  const StateDictMode mode_;
  const std::filesystem::path directory_;
  const std::uint64_t scratch_bytes_;
  const std::uint64_t early_wanted_;
  const std::uint64_t early_bytes_;
  std::vector<std::string> notes_;
  std::unique_ptr<OpenStep> open_;  // Outlives offload_, whose thread uses it.
  OptimizerOffload offload_;
  EarlyGradients early_;
  bool closed_ = false;
  DeviceLanes lanes_;  // After what they copy to and from.
  std::map<std::size_t, Slot> slots_;
  std::size_t next_slot_ = 0;
};

}  // namespace torch_ext
