// The hooks of backward, and step(), hand gradients over as BackwardStep says.
// A meta tensor takes the place of a gradient that was taken.
//
// state() shows steps and no tensors. What the caller does to it is found out
// when the next call begins.
#include "torch_ext/tensor/offloaded_adamw.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "../base/mutex.h"
#include "adamw_offload.h"
#include "backward_step.h"
#include "gradient_hook.h"
#include "gradient_prefetch.h"
#include "plain_modes.h"

namespace torch_ext {

class OffloadedAdamW::Impl {
  using ShownStates = std::remove_reference_t<
      decltype(std::declval<torch::optim::Optimizer&>().state())>;

 public:
  Impl(OffloadedAdamW& optimizer, const StateOptions& offload)
      : optimizer_(optimizer),
        offload_({.store = {.directory = offload.nvme_path,
                            .aio = offload.aio,
                            .engine = offload.engine,
                            .verify = offload.verify},
                  .host_memory = offload.host_memory},
                 offload.state_format, offload.seed, offload.update_on,
                 prefetches(offload) ? early_bytes(param_groups()) : 0,
                 offload.state_dict_mode),
        max_grad_norm_(offload.max_grad_norm),
        takes_(takes(offload)),
        backward_(offload_, takes_) {
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
    if (!backward_.is_open()) take_over_state();
    clip();
    if (takes_) {
      finish();
      return loss;
    }
    std::vector<AdamWOffload::Group> groups;
    for (const auto& group : param_groups()) {
      groups.push_back({hyper_of(group), {}});
      for (const at::Tensor& parameter : group.params()) {
        if (!parameter.grad().defined()) continue;
        groups.back().trained.push_back(checked(parameter));
      }
    }
    offload_.step(groups);
    for (const auto& group : groups) {
      for (const auto& trained : group.trained) show(trained.parameter);
    }
    return loss;
  }

  const at::Tensor& grad_norm() const { return grad_norm_; }
  std::size_t& accumulating() { return accumulating_; }

  std::vector<ParameterState> state_dict() {
    if (backward_.is_open()) {
      throw StateError(
          "OffloadedAdamW: state_dict() between backward() and step(), with "
          "kUpdate: call step() first, which ends the step that backward "
          "began");
    }
    add_new_parameters();
    take_over_state();
    const std::vector<AdamWOffload::Parameter> all = entries();
    check_each(with_state(all));
    std::vector<ParameterState> states;
    for (auto& saved : offload_.save(all)) {
      std::size_t i = 0;
      while (all[i].slot != saved.parameter.slot) ++i;
      saved.tensors.resize(3);
      states.push_back({i,
                        {.step = saved.step,
                         .exp_avg = std::move(saved.tensors[0]),
                         .exp_avg_sq = std::move(saved.tensors[1]),
                         .master = std::move(saved.tensors[2])}});
    }
    return states;
  }

  void load_state_dict(const std::vector<ParameterState>& states) {
    add_new_parameters();
    const std::vector<AdamWOffload::Parameter> all = entries();
    std::vector<AdamWOffload::Saved> saved;
    for (const ParameterState& state : states) {
      if (state.parameter >= all.size()) {
        throw std::invalid_argument(
            "OffloadedAdamW: the loaded state has parameter " +
            std::to_string(state.parameter) + " of " +
            std::to_string(all.size()));
      }
      const auto& [step, exp_avg, exp_avg_sq, master] = state.state;
      saved.push_back(
          {all[state.parameter], step, {exp_avg, exp_avg_sq, master}});
      naming(saved.back().parameter.tensor,
             [&] { offload_.check_loaded(saved.back()); });
    }
    try {
      offload_.load(saved);
    } catch (...) {
      if (!offload_.in_step()) backward_.reset();
      throw;
    }
    backward_.reset();
    shown_states().clear();
    for (const auto& entry : saved) show(entry.parameter);
  }

  OptimizerOffloadStats stats() { return offload_.offload().stats(); }
  /// What the host memory is used for, also before the first step.
  OptimizerPlan plan() {
    add_new_parameters();
    std::vector<AdamWOffload::Parameter> planned = entries();
    std::erase_if(planned, [&](const AdamWOffload::Parameter& parameter) {
      return !parameter.tensor.requires_grad() &&
             !offload_.has_state(parameter.slot);
    });
    check_each(planned);
    return offload_.plan(planned);
  }
  /// What a log should say, such as why direct I/O is not used.
  const std::vector<std::string>& notes() { return offload_.notes(); }
  /// See OptimizerOffload::close.
  void close() {
    on_gradient_.reset();  // Hooks do nothing from now on.
    offload_.close();
  }

 private:
  std::vector<torch::optim::OptimizerParamGroup>& param_groups() const {
    return optimizer_.param_groups_;
  }
  /// What state() shows, by the address of the parameter's TensorImpl.
  ShownStates& shown_states() const { return optimizer_.state_; }

  struct Place {
    std::size_t slot;
    /// While this exists, the address is not another tensor's.
    c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  };
  // The base class's add_param_group() is not virtual, so new parameters are
  // found here.
  void add_new_parameters() {
    if (!backward_.is_open()) let_go();
    for (const auto& group : param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        const void* key = parameter.unsafeGetTensorImpl();
        if (places_.contains(key)) continue;
        places_.emplace(key, Place{added(parameter),
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
           [&] { slot = offload_.add(parameter, parameter.requires_grad()); });
    return slot;
  }

  std::vector<AdamWOffload::Parameter> with_state(
      const std::vector<AdamWOffload::Parameter>& parameters) const {
    std::vector<AdamWOffload::Parameter> found;
    for (const AdamWOffload::Parameter& parameter : parameters) {
      if (offload_.has_state(parameter.slot)) found.push_back(parameter);
    }
    return found;
  }

  void check_each(
      const std::vector<AdamWOffload::Parameter>& parameters) const {
    for (const AdamWOffload::Parameter& parameter : parameters) {
      naming(parameter.tensor, [&] { offload_.check(parameter); });
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
    return label_of(parameter) + ": " + error.what();
  }

  std::string label_of(const at::Tensor& parameter) const {
    std::ostringstream text;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      const std::vector<at::Tensor>& parameters = param_groups()[i].params();
      for (std::size_t j = 0; j < parameters.size(); ++j) {
        if (!parameters[j].is_same(parameter)) continue;
        text << "parameter " << j << " of group " << i << " (dtype "
             << parameter.scalar_type() << ", sizes " << parameter.sizes()
             << ")";
        return text.str();
      }
    }
    text << "a parameter in no group, of sizes " << parameter.sizes();
    return text.str();
  }

  // Lets go of parameters that do not exist any more.
  void let_go() {
    for (auto it = places_.begin(); it != places_.end();) {
      if (!it->second.tensor.expired()) {
        ++it;
        continue;
      }
      offload_.remove(it->second.slot);
      shown_states().erase(const_cast<void*>(it->first));
      it = places_.erase(it);
    }
  }

  // Takes over what was done to state().
  void take_over_state() {
    std::vector<std::size_t> erased;
    std::vector<AdamWOffload::Saved> changed;
    for (auto& [key, place] : places_) {
      const auto found = shown_states().find(const_cast<void*>(key));
      const bool is_shown =
          found != shown_states().end() && found->second != nullptr;
      const bool has_state = offload_.has_state(place.slot);
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
      if (shown->step != offload_.step_of(place.slot) && tensor) {
        changed.push_back({{place.slot, at::Tensor(tensor)}, shown->step, {}});
      }
    }
    if (!erased.empty()) offload_.forget(erased);
    if (!changed.empty()) offload_.change(changed);
  }

  // PyTorch calls hooks on a thread for each device.
  void on_gradient(const at::Tensor& parameter) {
    const MutexLock one_by_one(gradients_mutex_);
    take_gradient(parameter);
  }

  void take_gradient(const at::Tensor& parameter) REQUIRES(gradients_mutex_) {
    const auto place = places_.find(parameter.unsafeGetTensorImpl());
    if (accumulating_ > 0 || place == places_.end()) return;
    const PlainModes plain;
    const std::size_t slot = place->second.slot;
    const auto is_nested = [] { return false; };  // One cannot tell.
    if (!backward_.wants(slot, parameter, parameter.grad(), is_nested)) return;
    if (!takes_) {
      offload_.prefetch({{slot, parameter}, parameter.grad()});
      return;
    }
    begin_taking();
    if (const auto group = backward_.group_of(slot)) take(*group, parameter);
  }

  static bool takes(const StateOptions& offload) {
    return offload.overlap_backward == OverlapBackward::kUpdate &&
           !offload.max_grad_norm;
  }
  static bool prefetches(const StateOptions& offload) {
    return offload.overlap_backward != OverlapBackward::kOff && !takes(offload);
  }

  static std::uint64_t early_bytes(
      const std::vector<torch::optim::OptimizerParamGroup>& groups) {
    std::uint64_t bytes = 0;
    for (const auto& group : groups) {
      for (const at::Tensor& parameter : group.params()) {
        if (!parameter.defined()) continue;
        bytes += GradientPrefetch::room_for(parameter, parameter);
      }
    }
    return bytes;
  }

  // Begins a step that takes gradients, unless that has been done. step() finds
  // parameters that are not known yet.
  void begin_taking() {
    if (backward_.is_open()) return;
    take_over_state();
    std::vector<AdamWOffload::Parameter> fresh;
    for (const auto& group : param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        const auto place = places_.find(parameter.unsafeGetTensorImpl());
        if (place != places_.end() && parameter.requires_grad() &&
            !offload_.has_state(place->second.slot)) {
          fresh.push_back({place->second.slot, parameter});
        }
      }
    }
    check_each(fresh);
    backward_.begin(slots_of_groups(), fresh);
  }

  // Fixes the options of the parameter's group, which may have another place by
  // now.
  bool fix(std::size_t group, const at::Tensor& parameter) {
    return backward_.fix(group, [&]() -> std::optional<AdamWHyper> {
      for (const auto& each : param_groups()) {
        for (const at::Tensor& one : each.params()) {
          if (one.is_same(parameter)) return hyper_of(each);
        }
      }
      return {};
    });
  }

  void take(std::size_t group, const at::Tensor& parameter) {
    if (!fix(group, parameter)) return;  // It is in no group any more.
    backward_.take(group, checked(parameter), parameter);
    mark_as_taken(parameter);
  }

  // Ends a step that takes gradients.
  void finish() {
    std::vector<std::pair<std::size_t, at::Tensor>> left;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      for (const at::Tensor& parameter : param_groups()[i].params()) {
        if (!parameter.grad().defined()) continue;
        const bool is_mark = is_taken(parameter);
        const std::size_t slot = entry_of(parameter).slot;
        complain({backward_.refusal(slot, is_mark), parameter});
        if (is_mark) continue;
        checked(parameter);
        left.emplace_back(i, parameter);
      }
    }
    if (!left.empty()) begin_taking();
    for (auto& [group, parameter] : left) {
      group = backward_.group_or(entry_of(parameter).slot, group);
      fix(group, parameter);
    }
    for (const auto& [group, parameter] : left) take(group, parameter);
    std::vector<std::optional<AdamWHyper>> options;
    for (const auto& group : param_groups()) {
      options.push_back(hyper_or_none(group));
    }
    const std::vector<at::Tensor> taken = backward_.taken();
    const BackwardStep::Complaint erased = complaint_about_state(taken);
    const auto complaint = backward_.finish(slots_of_groups(), options);
    for (const at::Tensor& parameter : taken) show(entry_of(parameter));
    complain(complaint);
    complain(erased);
  }

  /// Says whose entry in state() is gone, though its state has been used.
  BackwardStep::Complaint complaint_about_state(
      const std::vector<at::Tensor>& taken) const {
    for (const at::Tensor& parameter : taken) {
      const auto shown = shown_states().find(parameter.unsafeGetTensorImpl());
      if (offload_.step_of(entry_of(parameter).slot) > 1 &&
          (shown == shown_states().end() || shown->second == nullptr)) {
        return {
            "had its entry in state() erased between backward() and "
            "step(). The step has used the state: erase it after step()",
            parameter};
      }
    }
    return {};
  }

  void complain(const BackwardStep::Complaint& complaint) const {
    const auto& [text, about] = complaint;
    if (text.empty()) return;
    throw StateError("OffloadedAdamW: " +
                     (about.defined() ? label_of(about) + " " : "") + text);
  }

  std::vector<std::vector<std::size_t>> slots_of_groups() const {
    std::vector<std::vector<std::size_t>> slots;
    for (const auto& group : param_groups()) {
      slots.emplace_back();
      for (const at::Tensor& parameter : group.params()) {
        const auto place = places_.find(parameter.unsafeGetTensorImpl());
        if (place != places_.end()) slots.back().push_back(place->second.slot);
      }
    }
    return slots;
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

  /// Returns a parameter and its gradient, which can be used.
  AdamWOffload::Trained checked(const at::Tensor& parameter) const {
    AdamWOffload::Trained trained{entry_of(parameter), parameter.grad()};
    naming(parameter,
           [&] { offload_.check(trained.parameter, trained.gradient); });
    return trained;
  }

  AdamWOffload::Parameter entry_of(const at::Tensor& parameter) const {
    return {places_.at(parameter.unsafeGetTensorImpl()).slot, parameter};
  }

  std::vector<AdamWOffload::Parameter> entries() const {
    std::vector<AdamWOffload::Parameter> all;
    for (const auto& group : param_groups()) {
      for (const at::Tensor& parameter : group.params()) {
        all.push_back(entry_of(parameter));
      }
    }
    return all;
  }

  void show(const AdamWOffload::Parameter& parameter) {
    auto shown = std::make_unique<OffloadedAdamWParamState>();
    shown->step = offload_.step_of(parameter.slot);
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

  static std::optional<AdamWHyper> hyper_or_none(
      const torch::optim::OptimizerParamGroup& group) {
    try {
      return hyper_of(group);
    } catch (const std::exception&) {
      return {};
    }
  }

  OffloadedAdamW& optimizer_;
  AdamWOffload offload_;
  std::unordered_map<const void*, Place> places_;
  const std::optional<double> max_grad_norm_;
  const bool takes_;  // Takes gradients during backward: kUpdate.
  BackwardStep backward_;
  std::shared_ptr<const GradientHook::Function>
      on_gradient_;        // Set if hooks have work.
  Mutex gradients_mutex_;  // For the hooks.
  at::Tensor grad_norm_;
  std::size_t accumulating_ = 0;
};

namespace {

constexpr const char* kNoArchive =
    "OffloadedAdamW has no archive format: save the tensors of state_dict()";

}  // namespace

OffloadedAdamW::OffloadedAdamW(
    const std::vector<torch::optim::OptimizerParamGroup>& groups,
    OffloadedAdamWOptions defaults, const StateOptions& offload)
    : Optimizer(groups,
                std::make_unique<OffloadedAdamWOptions>(std::move(defaults))),
      impl_(std::make_unique<Impl>(*this, offload)) {}

OffloadedAdamW::OffloadedAdamW(std::vector<at::Tensor> parameters,
                               OffloadedAdamWOptions defaults,
                               const StateOptions& offload)
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
