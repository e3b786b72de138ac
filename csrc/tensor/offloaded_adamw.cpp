// How hooks and step() work together.
//
// Backward's hooks and step() share `taken_`: the parameters whose gradients
// the open step has already. With kUpdate, a hook checks a gradient and hands
// it to the engine, which updates the parameter on a thread of its own. The
// hook puts a meta tensor in the gradient's place. step() hands over the rest
// and ends the step. Afterwards it says what the caller has changed meanwhile.
//
// With kPrefetch, a hook only queues a copy to the host. step() uses it if the
// gradient is still the same.
//
// state() shows steps and no tensors. What the caller does to it is found out
// when the next call begins.
#include "torch_ext/tensor/offloaded_adamw.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "adamw_engine.h"
#include "gradient_hook.h"
#include "plain_modes.h"

namespace torch_ext {

class OffloadedAdamW::Impl {
  using ShownStates = std::remove_reference_t<
      decltype(std::declval<torch::optim::Optimizer&>().state())>;

 public:
  Impl(OffloadedAdamW& optimizer, const OffloadOptions& offload)
      : optimizer_(optimizer),
        engine_({.store = {.directory = offload.nvme_path,
                           .aio = offload.aio,
                           .engine = offload.engine,
                           .verify = offload.verify},
                 .host_memory = offload.host_memory},
                offload.state_format, offload.seed, offload.update_on,
                prefetches(offload) ? early_bytes(param_groups()) : 0,
                offload.state_dict_mode),
        max_grad_norm_(offload.max_grad_norm),
        takes_(takes(offload)) {
    if (max_grad_norm_ && !(*max_grad_norm_ > 0)) {
      throw std::invalid_argument("OffloadedAdamW: max_grad_norm is " +
                                  std::to_string(*max_grad_norm_));
    }
    if (takes_ || (prefetches(offload) && early_bytes(param_groups()) > 0)) {
      on_gradient_ = std::make_shared<const GradientHook::Function>(
          [this](const at::Tensor& parameter) { on_gradient(parameter); });
    }
    add_new_parameters();
    for (const auto& group : param_groups()) hyper_of(group);
  }

  at::Tensor step(const LossClosure& closure) {
    at::Tensor loss;
    if (closure != nullptr) {
      const c10::AutoGradMode with_grad(true);
      loss = closure();
    }
    const PlainModes plain;
    add_new_parameters();
    if (taken_.empty()) take_over_state();
    clip();
    std::vector<AdamWEngine::Group> groups;
    for (const auto& group : param_groups()) {
      groups.push_back({hyper_of(group), {}});
      for (const at::Tensor& parameter : group.params()) {
        if (!parameter.grad().defined() || is_taken(parameter)) continue;
        groups.back().trained.push_back(
            {entry_of(parameter), parameter.grad()});
      }
    }
    for (const auto& group : groups) {
      for (const auto& trained : group.trained) {
        naming(trained.parameter.tensor, [&] { engine_.check(trained); });
      }
    }
    if (!takes_) {
      engine_.step(groups);
      for (const auto& group : groups) {
        for (const auto& trained : group.trained) show(trained.parameter);
      }
      return loss;
    }
    for (std::size_t i = 0; i < groups.size(); ++i) {
      for (const auto& trained : groups[i].trained) {
        take(groups[i].hyper, i, trained);
      }
    }
    const std::string complaint = complaint_about(groups);
    const auto taken = std::exchange(taken_, {});
    in_parts_ = false;
    engine_.finish();
    for (const Taken& each : taken) show(each.parameter);
    if (!complaint.empty()) throw StateError(complaint);
    return loss;
  }

  const at::Tensor& grad_norm() const { return grad_norm_; }
  std::size_t& accumulating() { return accumulating_; }

  std::vector<ParameterState> state_dict() {
    if (!taken_.empty()) {
      throw StateError(
          "OffloadedAdamW: state_dict() between backward() and step(), with "
          "kUpdate: call step() first, which ends the step that backward "
          "began");
    }
    add_new_parameters();
    take_over_state();
    const std::vector<AdamWEngine::Parameter> all = entries();
    check_each(with_state(all));
    std::vector<ParameterState> states;
    for (auto& saved : engine_.save(all)) {
      std::size_t i = 0;
      while (all[i].slot != saved.parameter.slot) ++i;
      states.push_back({i, std::move(saved.state)});
    }
    return states;
  }

  void load_state_dict(const std::vector<ParameterState>& states) {
    add_new_parameters();
    const std::vector<AdamWEngine::Parameter> all = entries();
    std::vector<AdamWEngine::Saved> saved;
    for (const ParameterState& state : states) {
      if (state.parameter >= all.size()) {
        throw std::invalid_argument(
            "OffloadedAdamW: the loaded state has parameter " +
            std::to_string(state.parameter) + " of " +
            std::to_string(all.size()));
      }
      saved.push_back({all[state.parameter], state.state});
      naming(saved.back().parameter.tensor, [&] {
        adamw::check_saved(saved.back().parameter.tensor, state.state);
      });
    }
    try {
      engine_.load(saved);
    } catch (...) {
      if (!engine_.in_step()) taken_.clear();
      throw;
    }
    taken_.clear();
    in_parts_ = false;
    shown_states().clear();
    for (const auto& entry : saved) show(entry.parameter);
  }

  OptimizerOffloadStats stats() { return engine_.offload().stats(); }
  /// What the host memory is used for, also before the first step.
  OptimizerPlan plan() {
    add_new_parameters();
    std::vector<AdamWEngine::Parameter> planned = entries();
    std::erase_if(planned, [&](const AdamWEngine::Parameter& parameter) {
      return !parameter.tensor.requires_grad() &&
             !engine_.has_state(parameter.slot);
    });
    check_each(planned);
    return engine_.plan(planned);
  }
  /// What a log should say, such as why direct I/O is not used.
  const std::vector<std::string>& notes() { return engine_.offload().notes(); }
  /// See OptimizerOffload::close.
  void close() {
    on_gradient_.reset();  // Hooks do nothing from now on.
    engine_.close();
  }

 private:
  std::vector<torch::optim::OptimizerParamGroup>& param_groups() const {
    return optimizer_.param_groups_;
  }
  /// What state() shows, by the address of the parameter's TensorImpl.
  ShownStates& shown_states() const { return optimizer_.state_; }

  struct Place {
    std::size_t slot;
    std::optional<std::size_t> group;  ///< None: it is not trained any more.
    /// While this exists, the address is not another tensor's.
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  };
  struct Taken {
    AdamWEngine::Parameter parameter;
    AdamWHyper hyper;
    std::size_t group;
    std::int64_t version;  ///< The tensor's, at that time.
  };

  static constexpr const char* kChangesLater =
      "OffloadedAdamW: a hook, such as DistributedDataParallel's, changes "
      "gradients after backward has accumulated them, which "
      "OverlapBackward::kUpdate would not see: take kPrefetch or kOff";

  // The base class's add_param_group() is not virtual, so new parameters are
  // found here.
  void add_new_parameters() {
    if (taken_.empty()) let_go();
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      for (const at::Tensor& parameter : param_groups()[i].params()) {
        const void* key = parameter.unsafeGetTensorImpl();
        if (places_.contains(key)) continue;
        places_.emplace(key, Place{added(parameter), i,
                                   c10::weak_intrusive_ptr<c10::TensorImpl>(
                                       parameter.getIntrusivePtr())});
        if (on_gradient_ != nullptr && parameter.is_leaf() &&
            parameter.requires_grad()) {
          GradientHook::add(parameter, on_gradient_);
        }
      }
    }
  }

  std::size_t added(const at::Tensor& parameter) {
    std::size_t slot = 0;
    naming(parameter,
           [&] { slot = engine_.add(parameter, parameter.requires_grad()); });
    return slot;
  }

  std::vector<AdamWEngine::Parameter> with_state(
      const std::vector<AdamWEngine::Parameter>& parameters) const {
    std::vector<AdamWEngine::Parameter> found;
    for (const AdamWEngine::Parameter& parameter : parameters) {
      if (engine_.has_state(parameter.slot)) found.push_back(parameter);
    }
    return found;
  }

  void check_each(const std::vector<AdamWEngine::Parameter>& parameters) const {
    for (const AdamWEngine::Parameter& parameter : parameters) {
      naming(parameter.tensor, [&] { engine_.check(parameter); });
    }
  }

  /// Calls `call`. What it throws about the parameter begins with the
  /// parameter's place.
  template <typename Call>
  void naming(const at::Tensor& parameter, const Call& call) const {
    try {
      call();
    } catch (const TypeError& error) {
      throw TypeError(named(parameter, error));
    } catch (const StateError& error) {
      throw StateError(named(parameter, error));
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(named(parameter, error));
    }
  }

  std::string named(const at::Tensor& parameter,
                    const std::exception& error) const {
    std::ostringstream text;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      const std::vector<at::Tensor>& parameters = param_groups()[i].params();
      for (std::size_t j = 0; j < parameters.size(); ++j) {
        if (!parameters[j].is_same(parameter)) continue;
        text << "parameter " << j << " of group " << i;
        text << " (dtype " << parameter.scalar_type() << ", sizes "
             << parameter.sizes() << "): " << error.what();
        return text.str();
      }
    }
    return error.what();
  }

  // Lets go of parameters that do not exist any more.
  void let_go() {
    for (auto it = places_.begin(); it != places_.end();) {
      if (!it->second.tensor.expired()) {
        ++it;
        continue;
      }
      engine_.remove(it->second.slot);
      shown_states().erase(const_cast<void*>(it->first));
      it = places_.erase(it);
    }
  }

  // Takes over what was done to state().
  void take_over_state() {
    std::vector<std::size_t> erased;
    std::vector<AdamWEngine::Saved> changed;
    for (auto& [key, place] : places_) {
      const auto found = shown_states().find(const_cast<void*>(key));
      const bool is_shown =
          found != shown_states().end() && found->second != nullptr;
      const bool has_state = engine_.has_state(place.slot);
      if (has_state && !is_shown) erased.push_back(place.slot);
      if (!is_shown) continue;
      const auto* shown =
          dynamic_cast<const OffloadedAdamWParamState*>(found->second.get());
      if (shown == nullptr || !has_state) {
        throw TypeError(
            "OffloadedAdamW: an entry was put into state(), which only shows "
            "what there is: load_state_dict() gives a parameter state");
      }
      const auto tensor = place.tensor.lock();
      if (shown->step != engine_.step_of(place.slot) && tensor) {
        changed.push_back({{place.slot, at::Tensor(tensor)},
                           {.step = shown->step,
                            .exp_avg = {},
                            .exp_avg_sq = {},
                            .master = {}}});
      }
    }
    if (!erased.empty()) engine_.forget(erased);
    if (!changed.empty()) engine_.change(changed);
  }

  // PyTorch calls hooks on a thread for each device.
  void on_gradient(const at::Tensor& parameter) {
    const std::lock_guard lock(gradients_mutex_);
    if (accumulating_ > 0) return;
    const PlainModes plain;
    const bool changes = may_change_later(parameter);
    if (!takes_ && changes) return;
    if (changes) throw StateError(kChangesLater);
    if (takes_ && is_left_to_step(parameter)) return;
    if (takes_ && taken_.empty()) begin_taking();
    const auto place = places_.find(parameter.unsafeGetTensorImpl());
    if (place == places_.end() || !place->second.group) return;
    const AdamWEngine::Trained trained{entry_of(parameter), parameter.grad()};
    if (takes_) {
      naming(parameter, [&] { engine_.check(trained); });
      const std::size_t group = *place->second.group;
      take(hyper_of(param_groups()[group]), group, trained);
    } else {
      engine_.prefetch(trained);
    }
  }

  /// Whether a gradient may be incomplete until backward ends.
  bool is_left_to_step(const at::Tensor& parameter) {
    const int pass = torch::autograd::get_current_graph_task_id();
    if (std::exchange(pass_, pass) != pass && has_reentrant_checkpoint()) {
      in_parts_ = true;
    }
    // A copy from a device to page-locked memory may still be on its way.
    return in_parts_ || (parameter.is_cpu() && parameter.grad().is_pinned());
  }

  static bool takes(const OffloadOptions& offload) {
    return offload.overlap_backward == OverlapBackward::kUpdate &&
           !offload.max_grad_norm;
  }
  static bool prefetches(const OffloadOptions& offload) {
    return offload.overlap_backward != OverlapBackward::kOff && !takes(offload);
  }

  static std::uint64_t early_bytes(
      const std::vector<torch::optim::OptimizerParamGroup>& groups) {
    std::uint64_t bytes = 0;
    for (const auto& group : groups) {
      for (const at::Tensor& parameter : group.params()) {
        if (parameter.defined() && parameter.requires_grad() &&
            !parameter.is_cpu() && parameter.is_leaf()) {
          const c10::ScalarType dtype =
              parameter.grad_dtype().value_or(at::kFloat);
          bytes += EarlyGradients::room_for(
              static_cast<std::uint64_t>(parameter.numel()) *
              c10::elementSize(dtype));
        }
      }
    }
    return bytes;
  }

  // Begins a step during backward. Parameters may have moved to another group,
  // or may not be trained any more. Room for state is made before the first
  // gradient comes, so that the first step need not keep all gradients either.
  // The order is reversed, since backward mostly goes the other way round.
  void begin_taking() {
    take_over_state();
    for (auto& [key, place] : places_) place.group.reset();
    std::vector<AdamWEngine::Parameter> without_state;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      for (const at::Tensor& parameter : param_groups()[i].params()) {
        const auto place = places_.find(parameter.unsafeGetTensorImpl());
        if (place == places_.end()) continue;  // step() will find it.
        place->second.group = i;
        if (parameter.requires_grad() &&
            !engine_.has_state(place->second.slot)) {
          without_state.push_back({place->second.slot, parameter});
        }
      }
    }
    check_each(without_state);
    std::reverse(without_state.begin(), without_state.end());
    if (!without_state.empty()) engine_.make_room(without_state);
  }

  void take(const AdamWHyper& hyper, std::size_t group,
            const AdamWEngine::Trained& trained) {
    engine_.take(hyper, trained);
    taken_.push_back({trained.parameter, hyper, group,
                      version_of(trained.parameter.tensor)});
    mark_as_taken(trained.parameter.tensor);
  }

  static std::int64_t version_of(const at::Tensor& tensor) {
    // Updates on a device count as writes too.
    return tensor.is_cpu() && !tensor.is_inference() ? tensor._version() : 0;
  }

  /// Says what the caller has changed of what was taken. `groups` are as they
  /// are now.
  std::string complaint_about(
      const std::vector<AdamWEngine::Group>& groups) const {
    for (const auto& [parameter, hyper, group, version] : taken_) {
      const char* what = nullptr;
      if (group >= groups.size() || !(hyper == groups[group].hyper)) {
        what = "options";
      }
      if (version != version_of(parameter.tensor)) what = "a parameter";
      const auto shown =
          shown_states().find(parameter.tensor.unsafeGetTensorImpl());
      if (engine_.step_of(parameter.slot) > 1 &&
          (shown == shown_states().end() || shown->second == nullptr)) {
        what = "the state of a parameter";
      }
      if (what == nullptr) continue;
      return std::string("OffloadedAdamW: ") + what + " of group " +
             std::to_string(group) +
             " changed between backward() and step(). With kUpdate the update "
             "is made in between: change it after step()";
    }
    return {};
  }

  // Does what torch::nn::utils::clip_grad_norm_ does, whose header includes all
  // of ATen.
  void clip() {
    if (!max_grad_norm_) return;
    std::vector<at::Tensor> gradients, norms;
    for (const auto& entry : entries()) {
      if (!entry.tensor.grad().defined()) continue;
      gradients.push_back(entry.tensor.grad().detach());
      norms.push_back(at::linalg_vector_norm(gradients.back(), 2));
      norms.back() = norms.back().to(norms.front().device());
    }
    if (gradients.empty()) return;
    grad_norm_ = at::linalg_vector_norm(at::stack(norms), 2);
    const at::Tensor factor =
        at::scalar_tensor(*max_grad_norm_, grad_norm_.options())
            .div(grad_norm_.add(1e-6))
            .clamp_max(1);
    for (const at::Tensor& gradient : gradients) {
      gradient.mul_(factor.to(gradient.device()));
    }
  }

  AdamWEngine::Parameter entry_of(const at::Tensor& parameter) const {
    return {places_.at(parameter.unsafeGetTensorImpl()).slot, parameter};
  }

  std::vector<AdamWEngine::Parameter> entries() const {
    std::vector<AdamWEngine::Parameter> all;
    for (const auto& group : param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        all.push_back(entry_of(parameter));
      }
    }
    return all;
  }

  void show(const AdamWEngine::Parameter& parameter) {
    auto shown = std::make_unique<OffloadedAdamWParamState>();
    shown->step = engine_.step_of(parameter.slot);
    shown_states()[parameter.tensor.unsafeGetTensorImpl()] = std::move(shown);
  }

  static AdamWHyper hyper_of(const torch::optim::OptimizerParamGroup& group) {
    // Other options, such as torch's own, have another layout.
    const auto* given =
        dynamic_cast<const OffloadedAdamWOptions*>(&group.options());
    if (given == nullptr) {
      throw TypeError(
          "OffloadedAdamW: a parameter group's options are not "
          "OffloadedAdamWOptions");
    }
    const OffloadedAdamWOptions& options = *given;
    const auto [beta1, beta2] = options.betas();
    const auto check = [](bool good, const char* name, double value) {
      if (good) return;
      throw std::invalid_argument(std::string("OffloadedAdamW: ") + name +
                                  " is " + std::to_string(value));
    };
    check(options.lr() >= 0, "lr", options.lr());
    check(options.eps() >= 0, "eps", options.eps());
    check(options.weight_decay() >= 0, "weight_decay", options.weight_decay());
    check(beta1 >= 0 && beta1 < 1, "beta1", beta1);
    check(beta2 >= 0 && beta2 < 1, "beta2", beta2);
    return {.lr = options.lr(),
            .beta1 = beta1,
            .beta2 = beta2,
            .eps = options.eps(),
            .weight_decay = options.weight_decay(),
            .maximize = options.maximize()};
  }

  OffloadedAdamW& optimizer_;
  AdamWEngine engine_;
  std::unordered_map<const void*, Place> places_;
  const std::optional<double> max_grad_norm_;
  const bool takes_;  // Takes gradients during backward: kUpdate.
  std::shared_ptr<const GradientHook::Function>
      on_gradient_;  // Set if hooks have work.
  std::mutex gradients_mutex_;
  std::vector<Taken> taken_;
  at::Tensor grad_norm_;
  std::size_t accumulating_ = 0;
  int pass_ = -1;          // In which the last gradient came.
  bool in_parts_ = false;  // Whether this step's gradients may be.
};

namespace {

constexpr const char* kNoArchive =
    "OffloadedAdamW has no archive format: save the tensors of state_dict()";

}  // namespace

OffloadedAdamW::OffloadedAdamW(
    const std::vector<torch::optim::OptimizerParamGroup>& groups,
    OffloadedAdamWOptions defaults, const OffloadOptions& offload)
    : Optimizer(groups,
                std::make_unique<OffloadedAdamWOptions>(std::move(defaults))),
      impl_(std::make_unique<Impl>(*this, offload)) {}

OffloadedAdamW::OffloadedAdamW(std::vector<at::Tensor> parameters,
                               OffloadedAdamWOptions defaults,
                               const OffloadOptions& offload)
    : OffloadedAdamW({torch::optim::OptimizerParamGroup(std::move(parameters))},
                     std::move(defaults), offload) {}

OffloadedAdamW::~OffloadedAdamW() = default;

at::Tensor OffloadedAdamW::step(LossClosure closure) {
  return impl_->step(closure);
}

const at::Tensor& OffloadedAdamW::grad_norm() const {
  return impl_->grad_norm();
}

OffloadedAdamW::AccumulateGuard::AccumulateGuard(OffloadedAdamW& optimizer)
    : optimizer_(optimizer) {
  ++optimizer_.impl_->accumulating();
}

OffloadedAdamW::AccumulateGuard::~AccumulateGuard() {
  --optimizer_.impl_->accumulating();
}

std::vector<OffloadedAdamW::ParameterState> OffloadedAdamW::state_dict() {
  return impl_->state_dict();
}

void OffloadedAdamW::load_state_dict(
    const std::vector<ParameterState>& states) {
  impl_->load_state_dict(states);
}

void OffloadedAdamW::save(torch::serialize::OutputArchive&) const {
  throw StateError(kNoArchive);
}

void OffloadedAdamW::load(torch::serialize::InputArchive&) {
  throw StateError(kNoArchive);
}

OptimizerOffloadStats OffloadedAdamW::stats() { return impl_->stats(); }

OptimizerPlan OffloadedAdamW::plan() { return impl_->plan(); }

const std::vector<std::string>& OffloadedAdamW::notes() {
  return impl_->notes();
}

void OffloadedAdamW::close() { impl_->close(); }

}  // namespace torch_ext
