#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <unordered_set>
#include <utility>
#include <vector>

#include "torch_ext/base/align.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/tensor/adamw_kernel.h"
#include "torch_ext/tensor/adamw_state.h"
#include "torch_ext/tensor/tensor_check.h"

namespace torch_ext {

/// AdamW for tensors, with its state in an OptimizerOffload: what the Python
/// and the C++ optimizer have in common. Keeps no tensor.
///
/// Errors: before anything has changed, TypeError, std::invalid_argument and
/// StateError for tensors that cannot be used; then those of OptimizerOffload.
/// Threads: any, one call at a time.
class AdamWEngine {
 public:
  /// A parameter and its slot, as add() returned it.
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
  /// formats that are not exact.
  explicit AdamWEngine(const OptimizerOffloadOptions& options,
                       StateFormat format = StateFormat::kExact,
                       std::uint64_t seed = 0,
                       UpdateOn update_on = UpdateOn::kCpu)
      : format_(format),
        seed_(seed),
        update_on_(update_on),
        directory_(first_of(options.store.directory)),
        offload_(with_scratch(options)) {
    check_update_on(update_on, format);
  }

  ~AdamWEngine() {
    if (open_ == nullptr) return;
    try {
      offload_.abandon_step();  // Whose thread uses the lanes.
    } catch (...) {
      // A destructor has nobody to tell.
    }
  }
  AdamWEngine(const AdamWEngine&) = delete;
  AdamWEngine& operator=(const AdamWEngine&) = delete;

  /// Checks a parameter and gives it a slot; takes no space yet.
  std::size_t add(const at::Tensor& parameter) {
    check_parameter(parameter);
    check_place(parameter, update_on_);
    slots_.emplace_back();
    return slots_.size() - 1;
  }

  /// A step of the parameters in the groups.
  void step(const std::vector<Group>& groups) {
    AdamWKernel kernel(
        format_, seed_, [this] { return offload_.scratch(); }, lanes_,
        update_on_);
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) {
        check(trained.parameter);
        check_place(trained.parameter.tensor, update_on_);
        check_gradient(trained.gradient, trained.parameter.tensor);
      }
    }
    std::vector<std::size_t> numbers;
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) {
        numbers.push_back(add_target(kernel, trained, group.hyper));
      }
    }
    lanes_.around([&] { offload_.step(numbers, kernel); });
  }

  /// A gradient that is final, of a step that ends with finish(): state is
  /// updated by a thread of the OptimizerOffload as soon as it is there, and
  /// the gradient let go of. Once for a parameter in a step, with `hyper` of
  /// that moment; the first begins the step. Returns at once.
  /// Errors: as step(); a failed update is finish()'s to throw.
  void take(const AdamWHyper& hyper, const Trained& trained) {
    check(trained.parameter);
    check_place(trained.parameter.tensor, update_on_);
    check_gradient(trained.gradient, trained.parameter.tensor);
    lane_of(trained.parameter.tensor);  // For the thread that now begins.
    begin_open_step();
    if (!open_->taken.insert(trained.parameter.slot).second) {
      fail<StateError>("a gradient of a parameter is taken twice in a step");
    }
    const std::size_t number = add_target(
        open_->kernel, trained, open_->kept(hyper), /*of_its_own=*/true);
    offload_.release(number);
  }

  /// Updates what is left of what was taken, and ends the step.
  void finish() {
    begin_open_step();
    const std::unique_ptr<OpenStep> step = std::move(open_);
    lanes_.around([&] { offload_.end_step(); });
  }

  /// Gives zero state without a step to parameters that have none.
  void init(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    offload_.add_state(numbers_of(parameters));
  }

  /// The state of those parameters that have one, in memory that is private
  /// to the process, over a file in the directory which is gone with the
  /// tensors. Later steps do not change it.
  std::vector<Saved> save(const std::vector<Parameter>& parameters) {
    AdamWSnapshot snapshot(format_, make_scratch());
    std::vector<Saved> saved;
    for (const Parameter& parameter : parameters) {
      if (!has_state(parameter.slot)) continue;
      check(parameter);
      snapshot.add(number_of(parameter), parameter.tensor.detach());
      saved.push_back({parameter, {}});
    }
    snapshot.open(directory_);
    offload_.read_state(snapshot);
    for (Saved& entry : saved) {
      entry.state = snapshot.state(number_of(entry.parameter));
      entry.state.step = step_of(entry.parameter.slot);
    }
    return saved;
  }

  /// Forgets all state and takes this. Also after an error.
  void load(const std::vector<Saved>& saved) {
    for (const Saved& entry : saved) check_saved(entry);
    offload_.abandon_step();
    AdamWLoader loader(format_, seed_, make_scratch());
    std::vector<OptimizerOffload::ParameterStep> steps;
    for (const auto& [parameter, state] : saved) {
      const std::size_t number = number_of(parameter, /*anew=*/true);
      loader.add(number, parameter.tensor, ordinal_of(parameter), state);
      steps.push_back({number, state.step});
    }
    offload_.write_state(steps, loader);
    open_.reset();
  }

  /// How these parameters' state is going to be kept.
  OptimizerPlan plan(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    return offload_.plan(numbers_of(parameters));
  }

  bool has_state(std::size_t slot) const {
    const auto& number = slots_.at(slot).number;
    return number && offload_.has_state(*number);
  }

  std::uint64_t step_of(std::size_t slot) const {
    const auto& number = slots_.at(slot).number;
    return number ? offload_.step_of(*number) : 0;
  }

  OptimizerOffload& offload() { return offload_; }

  /// As OptimizerOffload::close(), after what is queued on devices.
  void close() {
    offload_.abandon_step();
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
  /// What the state of a parameter was made for.
  struct Slot {
    std::optional<std::size_t> number;  ///< In the OptimizerOffload.
    std::vector<std::int64_t> sizes;
    std::vector<std::int64_t> strides;
    c10::ScalarType dtype = at::kFloat;
  };

  /// A step whose gradients come one by one.
  struct OpenStep {
    AdamWKernel kernel;
    std::deque<AdamWHyper> hypers = {};
    std::unordered_set<std::size_t> taken = {};  ///< Slots.

    /// At an address that stays.
    const AdamWHyper& kept(const AdamWHyper& hyper) {
      for (const AdamWHyper& known : hypers) {
        if (known == hyper) return known;
      }
      return hypers.emplace_back(hyper);
    }
  };

  void begin_open_step() {
    if (open_ != nullptr) return;
    std::unique_ptr<OpenStep> step(new OpenStep{
        .kernel = {format_, seed_, [this] { return offload_.scratch(); },
                   lanes_, update_on_}});
    offload_.begin_step(step->kernel);
    open_ = std::move(step);
  }

  /// With `of_its_own` the gradient is what the thread's stream makes of it so
  /// far, else what it does until the step.
  std::size_t add_target(AdamWKernel& kernel, const Trained& trained,
                         const AdamWHyper& hyper, bool of_its_own = false) {
    const auto& [parameter, gradient] = trained;
    const at::Tensor& tensor = parameter.tensor;
    const std::size_t number = number_of(parameter);
    AdamWKernel::Target target{tensor.detach(),
                               OrderedReader(gradient, tensor.strides()),
                               &hyper, ordinal_of(parameter)};
    if (DeviceLane* const lane = lane_of(tensor)) {
      target.lane = lane;
      target.ready = &lane->ready();
      if (of_its_own) {
        target.own_ready = lane->now();
        target.ready = target.own_ready.get();
      }
    }
    kernel.add(number, std::move(target));
    // Autograd must see that what it saved has changed.
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    return number;
  }

  /// Made absolute. The store, which is made next, refuses an empty path, and
  /// where there is none at all.
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

  static OptimizerOffloadOptions with_scratch(OptimizerOffloadOptions options) {
    // At the most, the gradients of a tile of 16-bit parameters in one go.
    constexpr std::uint64_t kLeast = std::uint64_t{48} << 10;
    constexpr std::uint64_t kMost = std::uint64_t{12} << 20;
    options.scratch_bytes =
        std::clamp(align_down(options.host_memory / 16, 4096), kLeast, kMost);
    return options;
  }

  StateFields fields_of(const at::Tensor& parameter) const {
    return adamw_fields(format_, master_format(parameter.scalar_type()));
  }

  /// The place among the parameters ever added: rounding shall not depend on
  /// which of them have been trained.
  static std::uint32_t ordinal_of(const Parameter& parameter) {
    return static_cast<std::uint32_t>(parameter.slot);
  }

  AdamWKernel::MakeScratch make_scratch() {
    return [this] {
      lanes_.make_way_for(nullptr);
      return offload_.scratch();
    };
  }

  /// Of the tensor's device; null for the CPU.
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

  template <typename Error, typename... Parts>
  [[noreturn]] static void fail(const Parts&... parts) {
    std::ostringstream text;
    text << "OffloadedAdamW: ";
    (text << ... << parts);
    throw Error(text.str());
  }

  static void check_parameter(const at::Tensor& tensor) {
    check_has_plain_memory(tensor, "OffloadedAdamW");
    const c10::ScalarType dtype = tensor.scalar_type();
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
      fail<TypeError>("a parameter of dtype ", dtype,
                      " is not supported, only float32, bfloat16 and float16");
    }
    if (tensor.is_neg() || !tensor.is_non_overlapping_and_dense()) {
      fail<std::invalid_argument>(
          "a parameter with sizes ", tensor.sizes(), " and strides ",
          tensor.strides(), " is not dense: its elements overlap or have gaps");
    }
  }

  static void check_update_on(UpdateOn update_on, StateFormat format) {
    if (update_on == UpdateOn::kCpu || format == StateFormat::kExact) return;
    fail<std::invalid_argument>(
        "update_on \"cuda\" is for state_format \"exact\"; with \"",
        state_format_name(format), "\" the update is on the CPU");
  }

  static void check_place(const at::Tensor& parameter, UpdateOn update_on) {
    if (update_on == UpdateOn::kCpu || !parameter.is_cpu()) return;
    fail<std::invalid_argument>(
        "a parameter is on the CPU, and update_on is \"cuda\": move the model "
        "to the device first, or take update_on \"cpu\"");
  }

  void check(const Parameter& parameter) {
    check_parameter(parameter.tensor);
    if (!has_state(parameter.slot)) return;
    const Slot& slot = slots_[parameter.slot];
    const at::Tensor& tensor = parameter.tensor;
    const at::IntArrayRef sizes = slot.sizes;
    const at::IntArrayRef strides = slot.strides;
    if (tensor.scalar_type() == slot.dtype && tensor.sizes() == sizes &&
        same_order(sizes, tensor.strides(), strides)) {
      return;
    }
    fail<StateError>("the state was made for a parameter with dtype ",
                     slot.dtype, ", sizes ", sizes, " and strides ", strides,
                     "; it has now dtype ", tensor.scalar_type(), ", sizes ",
                     tensor.sizes(), " and strides ", tensor.strides(),
                     ". Load a state to go on");
  }

  static void check_gradient(const at::Tensor& gradient,
                             const at::Tensor& parameter) {
    if (gradient.defined() && gradient.layout() != c10::Layout::Strided) {
      fail<StateError>("sparse gradients are not supported");
    }
    check_has_plain_memory(gradient, "OffloadedAdamW: gradient");
    const c10::ScalarType dtype = gradient.scalar_type();
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
      fail<TypeError>("a gradient of dtype ", dtype, " is not supported");
    }
    if (gradient.device() != parameter.device()) {
      fail<std::invalid_argument>("a gradient is on ", gradient.device(),
                                  ", its parameter on ", parameter.device());
    }
    check_sizes("gradient", gradient, parameter);
  }

  static void check_sizes(const char* what, const at::Tensor& tensor,
                          const at::Tensor& parameter) {
    if (tensor.sizes() == parameter.sizes()) return;
    fail<std::invalid_argument>(what, " has sizes ", tensor.sizes(),
                                ", its parameter ", parameter.sizes());
  }

  static void check_saved(const Saved& saved) {
    const at::Tensor& parameter = saved.parameter.tensor;
    check_parameter(parameter);
    const auto check_one = [&](const char* name, const at::Tensor& tensor) {
      check_has_plain_memory(tensor, std::string("OffloadedAdamW: ") + name);
      check_sizes(name, tensor, parameter);
      if (!c10::isFloatingType(tensor.scalar_type()) ||
          tensor.element_size() > 8) {
        fail<TypeError>(name, " has dtype ", tensor.scalar_type());
      }
    };
    check_one("exp_avg", saved.state.exp_avg);
    check_one("exp_avg_sq", saved.state.exp_avg_sq);
    if (saved.state.master.defined()) {
      check_one("master_param", saved.state.master);
    }
  }

  // Registers the parameter as it is now, unless it has state that stays.
  std::size_t number_of(const Parameter& parameter, bool anew = false) {
    Slot& slot = slots_.at(parameter.slot);
    if (!anew && has_state(parameter.slot)) return *slot.number;
    const at::Tensor& tensor = parameter.tensor;
    const bool same = slot.number && slot.dtype == tensor.scalar_type() &&
                      tensor.sizes() == at::IntArrayRef(slot.sizes);
    if (!same) {
      slot.number = offload_.add_parameter(
          static_cast<std::uint64_t>(tensor.numel()), fields_of(tensor));
    }
    slot.sizes = tensor.sizes().vec();
    slot.strides = tensor.strides().vec();
    slot.dtype = tensor.scalar_type();
    return *slot.number;
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
  const std::filesystem::path directory_;
  std::unique_ptr<OpenStep> open_;  // Outlives offload_, whose thread uses it.
  OptimizerOffload offload_;
  DeviceLanes lanes_;  // After what they copy to and from.
  std::vector<Slot> slots_;
};

}  // namespace torch_ext
