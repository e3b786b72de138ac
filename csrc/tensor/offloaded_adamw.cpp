// The hooks of backward, and step(), hand gradients over as BackwardStep says.
// A meta tensor takes the place of a gradient that was taken.
//
// state() shows steps and no tensors. What the caller does to it is found out
// when the next call begins.
//
// A commit's document (AdamWCommit) calls parameters by names of Python's, or
// by "group.index". Both are read by place: the i-th group's j-th parameter is
// the one whose name stands there in the document.
#include "torch_ext/tensor/offloaded_adamw.h"

#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "../base/mutex.h"
#include "adamw_offload.h"
#include "backward_step.h"
#include "gradient_hook.h"
#include "gradient_prefetch.h"
#include "plain_modes.h"
#include "state_checks.h"
#include "torch_ext/io/file.h"
#include "torch_ext/optim/adamw_commit.h"

namespace torch_ext {
namespace {

using torch::optim::OptimizerParamGroup;

AdamWCommit::Numbers numbers_of(const OffloadedAdamWOptions& options) {
  const auto [beta1, beta2] = options.betas();
  return {.lr = options.lr(),
          .beta1 = beta1,
          .beta2 = beta2,
          .eps = options.eps(),
          .weight_decay = options.weight_decay(),
          .maximize = options.maximize()};
}

OffloadedAdamWOptions options_of(const AdamWCommit::Numbers& numbers) {
  return OffloadedAdamWOptions(numbers.lr)
      .betas({numbers.beta1, numbers.beta2})
      .eps(numbers.eps)
      .weight_decay(numbers.weight_decay)
      .maximize(numbers.maximize);
}

/// Sets a group's options. Whoever holds a reference to them sees it.
void set_options(OptimizerParamGroup& group,
                 const AdamWCommit::Numbers& numbers) {
  OffloadedAdamWOptions committed = options_of(numbers);
  if (group.has_options()) {
    if (auto* own = dynamic_cast<OffloadedAdamWOptions*>(&group.options())) {
      *own = committed;
      return;
    }
  }
  group.set_options(
      std::make_unique<OffloadedAdamWOptions>(std::move(committed)));
}

/// The name that Python gives to a parameter without one.
std::string name_of(std::size_t group, std::size_t index) {
  return std::to_string(group) + "." + std::to_string(index);
}

/// As Python calls it.
std::string name_of(c10::ScalarType dtype) {
  if (dtype == at::kFloat) return "float32";
  if (dtype == at::kBFloat16) return "bfloat16";
  if (dtype == at::kHalf) return "float16";
  return c10::toString(dtype);
}

AdamWCommit::Kind kind_of(const at::Tensor& tensor) {
  AdamWCommit::Kind kind{tensor.sizes().vec(), name_of(tensor.scalar_type()),
                         std::vector<std::int64_t>(tensor.sizes().size())};
  std::iota(kind.order.begin(), kind.order.end(), 0);
  std::ranges::stable_sort(kind.order, std::greater(),
                           [&](std::int64_t d) { return tensor.stride(d); });
  std::erase_if(kind.order,
                [&](std::int64_t d) { return tensor.size(d) == 1; });
  return kind;
}

/// Returns in what a parameter differs from the one that was committed.
std::vector<std::string> differences(const AdamWCommit::Kind& there,
                                     const at::Tensor& parameter) {
  if (!parameter.defined() || parameter.is_nested() ||
      parameter.layout() != c10::Layout::Strided) {
    return {"no plain memory"};
  }
  const AdamWCommit::Kind here = kind_of(parameter);
  std::vector<std::string> found;
  const auto compare = [&](const char* what, const auto& a, const auto& b) {
    if (a == b) return;
    std::ostringstream text;
    text << what << " " << a << " there and " << b << " here";
    found.push_back(text.str());
  };
  compare("shape", at::IntArrayRef(there.shape), at::IntArrayRef(here.shape));
  compare("dtype", there.dtype, here.dtype);
  compare("order", at::IntArrayRef(there.order), at::IntArrayRef(here.order));
  return found;
}

/// Takes values that nobody asks for: all elements have the place of one.
at::Tensor sink_for(const CommittedValue& value) {
  for (const c10::ScalarType dtype :
       {at::kByte, at::kShort, at::kInt, at::kLong, at::kComplexDouble}) {
    if (c10::elementSize(dtype) != value.element_bytes) continue;
    return at::empty({1}, host_options(dtype))
        .expand({static_cast<std::int64_t>(value.elements)});
  }
  throw std::invalid_argument("OffloadedAdamW: the commit has a value of " +
                              std::to_string(value.element_bytes) +
                              " bytes for an element");
}

/// Returns the last of these commits, or the newest one of `step`.
const OptimizerOffload::Committed& chosen(
    const std::vector<OptimizerOffload::Committed>& commits,
    std::optional<std::uint64_t> step) {
  if (!step) return commits.back();
  const auto found =
      std::find_if(commits.rbegin(), commits.rend(),
                   [&](const auto& commit) { return commit.step == *step; });
  if (found != commits.rend()) return *found;
  std::string there;
  for (const OptimizerOffload::Committed& commit : commits) {
    there += (there.empty() ? "" : ", ") + std::to_string(commit.step);
  }
  throw std::invalid_argument("OffloadedAdamW: there is no commit of step " +
                              std::to_string(*step) +
                              "; the steps of those kept are " + there);
}

/// The name of the newest store that is there. A new one meets it, and is
/// refused.
StoreName name_in(const StateOptions& offload) {
  const auto& directories = offload.nvme_path.all();
  if (directories.empty()) return {};
  return StoreName().newest_in(directories.front().path);
}

/// The store's first file, for errors.
std::filesystem::path store_of(const StateOptions& offload,
                               const StoreName& name) {
  const auto& directories = offload.nvme_path.all();
  if (directories.empty()) return {};
  return directories.front().path / name.of_file(0);
}

/// A file of a store of several processes that is newer than `name`'s, or may
/// be. Python would go on from that one.
std::optional<IoFailure> other_division(const DirectoryList& directories,
                                        const StoreName& name) {
  for (const auto& directory : directories.all()) {
    for (const StoreName::File& file : name.files_in(directory.path)) {
      const StoreName& other = file.store;
      if (other.world == name.world || other.epoch < name.epoch) continue;
      return IoFailure{
          .path = absolute_path(directory.path / other.of_file(file.directory)),
          .error = EEXIST,
          .detail = "it is of a run of " + std::to_string(other.world) +
                    " processes. Python's resume() goes on from it with any "
                    "number of processes; C++ does not divide state anew. If "
                    "it is not needed, remove it; or give another directory"};
    }
  }
  return {};
}

/// Throws IoError (EEXIST) if other_division() finds one.
void refuse_other_division(const char* op, const DirectoryList& directories,
                           const StoreName& name) {
  auto other = other_division(directories, name);
  if (!other) return;
  other->op = op;
  throw IoError(std::move(*other));
}

}  // namespace

class OffloadedAdamW::Impl {
  using ShownStates = std::remove_reference_t<
      decltype(std::declval<torch::optim::Optimizer&>().state())>;

 public:
  Impl(OffloadedAdamW& optimizer, const StateOptions& offload,
       const Resumed& resume)
      : optimizer_(optimizer),
        directories_(offload.nvme_path),
        name_(resume.name),
        store_(store_of(offload, resume.name)),
        state_format_(offload.state_format),
        seed_(offload.seed),
        offload_({.store = {.directory = offload.nvme_path,
                            .aio = offload.aio,
                            .engine = offload.engine,
                            .verify = offload.verify},
                  .host_memory = offload.host_memory,
                  .name = resume.name},
                 offload.state_format, offload.seed, offload.update_on,
                 prefetches(offload) ? early_bytes(param_groups()) : 0,
                 offload.state_dict_mode,
                 CommitChoice{.generation = resume.generation}),
        max_grad_norm_(offload.max_grad_norm),
        takes_(takes(offload)),
        backward_(offload_, takes_) {
    if (max_grad_norm_ && !(*max_grad_norm_ > 0)) {
      throw std::invalid_argument("OffloadedAdamW: max_grad_norm is " +
                                  std::to_string(*max_grad_norm_));
    }
    if (takes_ || (prefetches(offload) && early_bytes(param_groups()) > 0)) {
      on_gradient_ = make_hook();
    }
    add_new_parameters();
    for (const auto& group : param_groups()) hyper_of(group);
    if (resume.generation == 0) warn_of_a_store();
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

  CommitReport commit(std::optional<std::uint64_t> step,
                      const CommitOptions& options) {
    const ToCommit what = to_commit(step, options);
    const CommitReport report =
        offload_.commit(what.step, what.document, what.values, options.keep);
    note_commit();  // The one before: it has ended.
    committed_step_ = what.step;
    committed_extra_ = options.extra;
    return report;
  }

  CommitTicket start_commit(std::optional<std::uint64_t> step,
                            const CommitOptions& options) {
    const ToCommit what = to_commit(step, options);
    CommitTicket ticket = offload_.start_commit(what.step, what.document,
                                                what.values, options.keep);
    note_commit();
    started_ = Started{ticket, options.extra};
    return ticket;
  }

  /// What start_commit() has begun counts once it has ended well.
  void note_commit() const {
    if (!started_ || !started_->ticket.done()) return;
    if (const auto report = started_->ticket.report()) {
      committed_step_ = report->step;
      committed_extra_ = started_->extra;
    }
    started_.reset();
  }

  struct ToCommit {
    std::uint64_t step = 0;
    std::string document;
    std::vector<at::Tensor> values;
  };
  ToCommit to_commit(std::optional<std::uint64_t> step,
                     const CommitOptions& options) {
    constexpr auto kMost =
        static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (backward_.is_open()) {
      throw StateError(
          "OffloadedAdamW: commit() between backward() and step(), with "
          "kUpdate: call step() first, which ends the step that backward "
          "began");
    }
    const std::uint64_t number = step.value_or(steps());
    if (number > kMost) {
      throw std::invalid_argument(
          "OffloadedAdamW: step must be from 0 to 2**63 - 1, got " +
          std::to_string(number));
    }
    if (options.keep < 1) {
      throw std::invalid_argument("OffloadedAdamW: keep must be from 1, got 0");
    }
    if (offload_.offload().next_generation() == 1) {
      refuse_other_division("commit", directories_, name_);
    }
    add_new_parameters();
    take_over_state();
    note_state_without_group();
    ToCommit what{.step = number, .document = {}, .values = {}};
    what.document = adamw_commit_text(described(options, what.values));
    return what;
  }

  SnapshotReport snapshot(const DirectoryList& directory) {
    return offload_.offload().snapshot(directory);
  }

  std::vector<Committed> commits() {
    std::vector<Committed> all;
    for (const auto& commit : offload_.offload().commits()) {
      all.push_back({commit.generation, commit.step, commit.time});
    }
    return all;
  }

  void rollback(std::optional<std::uint64_t> step) {
    const auto commits = offload_.offload().commits();
    if (commits.empty()) {
      throw StateError("OffloadedAdamW: rollback(): nothing was committed yet");
    }
    const OptimizerOffload::Committed& commit = chosen(commits, step);
    const AdamWCommit document =
        parse_adamw_commit(commit.document, store_.string());
    for (const auto& [name, entry] : document.parameters) {
      if (!entry.kind || entry.value) continue;
      throw std::invalid_argument(
          "OffloadedAdamW: the commit of step " + std::to_string(commit.step) +
          " has no parameters (include_parameters=false), so its state would "
          "meet other ones: load the parameters that belong to it, and "
          "resume()");
    }
    take_commit(commit, document);
  }

  /// Becomes what was committed. Nothing changes before everything has been
  /// checked.
  void take_commit(const OptimizerOffload::Committed& commit,
                   const AdamWCommit& document) {
    check_parameters(document);
    const OptimizerOffload::Contents contents =
        offload_.offload().contents(commit.generation);
    std::vector<at::Tensor> values(contents.values.size());
    std::vector<AdamWOffload::Committed> parameters;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      check(hyper_of(document.groups[i].options));
      for (std::size_t j = 0; j < param_groups()[i].params().size(); ++j) {
        const at::Tensor& parameter = param_groups()[i].params()[j];
        const auto& entry =
            document.parameters.at(document.groups[i].parameters[j]);
        parameters.push_back({{entry.slot, parameter}, entry.first});
        if (!entry.value) continue;
        naming(parameter, [&] {
          torch_ext::check_parameter("OffloadedAdamW", parameter);
        });
        if (*entry.value >= values.size()) {
          damaged("it has more values than the commit");
        }
        values[*entry.value] = parameter;
      }
    }
    const std::vector<at::Tensor> written = values;
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (!values[i].defined()) values[i] = sink_for(contents.values[i]);
    }
    try {
      offload_.take_commit(commit.generation, parameters, values,
                           document.next_slot);
    } catch (...) {
      if (!offload_.in_step()) backward_.reset();
      show_all();
      throw;
    }
    backward_.reset();
    for (const at::Tensor& parameter : written) {
      if (!parameter.defined() || parameter.is_inference()) continue;
      parameter.unsafeGetTensorImpl()->bump_version();
    }
    give_places(parameters);
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      set_options(param_groups()[i], document.groups[i].options);
    }
    static_cast<OffloadedAdamWOptions&>(optimizer_.defaults()) =
        options_of(document.defaults);
    for (const std::string& note : document.notes) offload_.note(note);
    steps_before_ = commit.step - stats().steps;
    started_.reset();
    committed_step_ = commit.step;
    committed_extra_ = document.extra;
  }

  std::optional<std::uint64_t> committed_step() const {
    note_commit();
    return committed_step_;
  }
  const std::string& committed_extra() const {
    note_commit();
    return committed_extra_;
  }
  void note(const std::string& text) { offload_.note(text); }

  OptimizerOffloadStats stats() const { return offload_.offload().stats(); }
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
        watch(parameter);
      }
    }
  }

  std::shared_ptr<const GradientHook::Function> make_hook() {
    return std::make_shared<const GradientHook::Function>(
        [this](const at::Tensor& parameter) { on_gradient(parameter); });
  }

  void watch(const at::Tensor& parameter) const {
    if (on_gradient_ != nullptr && parameter.is_leaf() &&
        parameter.requires_grad()) {
      GradientHook::add(parameter, on_gradient_);
    }
  }

  // Commits --------------------------------------------------------------

  /// How many steps there have been, in this process and before.
  std::uint64_t steps() const { return steps_before_ + stats().steps; }

  void warn_of_a_store() {
    if (const auto other = other_division(directories_, name_)) {
      offload_.note(other->path + ": " + other->detail +
                    ". This optimizer cannot commit as long as it is there");
    }
    // libtorch.so has functions of std::filesystem of its own, not all good.
    if (!File::identify(store_)) return;
    offload_.note(store_.string() +
                  " was committed by another run. resume() goes on from it; "
                  "this optimizer cannot commit as long as it is there");
  }

  void note_state_without_group() {
    std::unordered_set<std::size_t> in_groups;
    for (const auto& entry : entries()) in_groups.insert(entry.slot);
    const bool any = std::ranges::any_of(places_, [&](const auto& known) {
      const std::size_t slot = known.second.slot;
      return offload_.has_state(slot) && !in_groups.contains(slot);
    });
    if (!any) return;
    offload_.note(
        "commit() leaves out the state of parameters that are in no group: "
        "nothing could load it. Erase it from state() if they are gone");
  }

  /// Returns what a commit says besides the state. Adds the parameters that it
  /// keeps to `values`.
  AdamWCommit described(const CommitOptions& options,
                        std::vector<at::Tensor>& values) const {
    AdamWCommit said{
        .state_format = state_format_,
        .seed = seed_,
        .next_slot = offload_.next_slot(),
        .defaults = numbers_of(
            static_cast<const OffloadedAdamWOptions&>(optimizer_.defaults())),
        .extra = options.extra};
    std::unordered_set<std::size_t> slots;
    for (std::size_t i = 0; i < param_groups().size(); ++i) {
      hyper_of(param_groups()[i]);  // What resume() would refuse is no commit.
      AdamWCommit::Group& group = said.groups.emplace_back();
      group.options = numbers_of(static_cast<const OffloadedAdamWOptions&>(
          param_groups()[i].options()));
      for (const at::Tensor& parameter : param_groups()[i].params()) {
        const AdamWOffload::Parameter entry = entry_of(parameter);
        if (!slots.insert(entry.slot).second) {
          throw std::invalid_argument(
              label_of(parameter) +
              " is in the groups twice: a commit has each parameter once");
        }
        group.parameters.push_back(name_of(i, group.parameters.size()));
        AdamWCommit::Parameter& kept = said.parameters[group.parameters.back()];
        kept.slot = entry.slot;
        if (!is_kept(entry)) continue;  // Frozen ones are the caller's.
        naming(parameter, [&] { offload_.check(entry); });
        kept.kind = kind_of(parameter);
        if (!options.include_parameters) continue;
        kept.value = values.size();
        values.push_back(parameter);
      }
    }
    return said;
  }

  bool is_kept(const AdamWOffload::Parameter& parameter) const {
    return parameter.tensor.requires_grad() ||
           offload_.has_state(parameter.slot);
  }

  /// Throws the first ten parameters that differ from the commit's.
  void check_parameters(const AdamWCommit& document) const {
    std::vector<std::string> wrong;
    std::unordered_set<const void*> seen;
    const std::vector<OptimizerParamGroup>& here = param_groups();
    for (std::size_t i = 0; i < std::max(here.size(), document.groups.size());
         ++i) {
      const std::size_t there =
          i < document.groups.size() ? document.groups[i].parameters.size() : 0;
      const std::size_t given = i < here.size() ? here[i].params().size() : 0;
      for (std::size_t j = 0; j < std::max(there, given); ++j) {
        std::string label =
            "parameter " + std::to_string(j) + " of group " + std::to_string(i);
        if (j >= there) {
          wrong.push_back(label + " is not in the commit");
          continue;
        }
        const std::string& name = document.groups[i].parameters[j];
        if (name != name_of(i, j)) label += " ('" + name + "')";
        if (j >= given) {
          wrong.push_back(label + " is missing");
          continue;
        }
        const at::Tensor& parameter = here[i].params()[j];
        const AdamWCommit::Parameter& entry = document.parameters.at(name);
        if (!seen.insert(parameter.unsafeGetTensorImpl()).second) {
          wrong.push_back(label + " is in the groups twice");
        }
        if (entry.first != 0) {
          wrong.push_back(label + " is a part of one in the commit");
        }
        if (!entry.kind) continue;  // A frozen one may differ.
        for (const std::string& what : differences(*entry.kind, parameter)) {
          wrong.push_back(label + " has " + what);
        }
      }
    }
    if (wrong.empty() && here.size() != document.groups.size()) {
      wrong.push_back("there are " + std::to_string(here.size()) +
                      " groups, and the commit has " +
                      std::to_string(document.groups.size()));
    }
    if (wrong.empty()) return;
    std::string text =
        "OffloadedAdamW: the parameters are not those of the commit: ";
    for (std::size_t i = 0; i < std::min<std::size_t>(wrong.size(), 10); ++i) {
      text += (i == 0 ? "" : "; ") + wrong[i];
    }
    if (wrong.size() > 10) {
      text += ", and " + std::to_string(wrong.size() - 10) + " more";
    }
    throw std::invalid_argument(text);
  }

  [[noreturn]] void damaged(const std::string& what) const {
    throw IoError({.op = "read commit",
                   .path = store_.string(),
                   .error = EIO,
                   .detail = "the commit's document is damaged: " + what});
  }

  /// Gives these parameters, and no others, the slots that they have now.
  void give_places(const std::vector<AdamWOffload::Committed>& parameters) {
    auto before = std::exchange(places_, {});
    std::vector<at::Tensor> joined;
    for (const auto& [parameter, first] : parameters) {
      const at::Tensor& tensor = parameter.tensor;
      const void* key = tensor.unsafeGetTensorImpl();
      if (before.erase(key) == 0) joined.push_back(tensor);
      places_.emplace(
          key, Place{parameter.slot, c10::weak_intrusive_ptr<c10::TensorImpl>(
                                         tensor.getIntrusivePtr())});
    }
    if (!before.empty() && on_gradient_ != nullptr) {
      // One that has gone may come back, and must not have two hooks then.
      on_gradient_ = make_hook();
      joined.clear();
      for (const auto& each : parameters) {
        joined.push_back(each.parameter.tensor);
      }
    }
    for (const at::Tensor& parameter : joined) watch(parameter);
    show_all();
  }

  void show_all() {
    shown_states().clear();
    for (const auto& [key, place] : places_) {
      const auto tensor = place.tensor.lock();
      if (tensor && offload_.has_state(place.slot)) {
        show({place.slot, at::Tensor(tensor)});
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
    AdamWHyper hyper = hyper_of(numbers_of(*given));
    check(hyper);
    return hyper;
  }

  static AdamWHyper hyper_of(const AdamWCommit::Numbers& numbers) {
    return {.lr = numbers.lr,
            .beta1 = numbers.beta1,
            .beta2 = numbers.beta2,
            .eps = numbers.eps,
            .weight_decay = numbers.weight_decay,
            .maximize = numbers.maximize};
  }

  static void check(const AdamWHyper& hyper) {
    const auto check_one = [](bool good, const char* name, double value) {
      if (good) return;
      throw std::invalid_argument(std::string("OffloadedAdamW: ") + name +
                                  " is " + std::to_string(value));
    };
    const auto& [lr, beta1, beta2, eps, weight_decay, maximize] = hyper;
    check_one(lr >= 0, "lr", lr);
    check_one(eps >= 0, "eps", eps);
    check_one(weight_decay >= 0, "weight_decay", weight_decay);
    check_one(beta1 >= 0 && beta1 < 1, "beta1", beta1);
    check_one(beta2 >= 0 && beta2 < 1, "beta2", beta2);
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
  const DirectoryList directories_;
  const StoreName name_;
  const std::filesystem::path store_;  // Its first file, if it has a name.
  const StateFormat state_format_;
  const std::uint64_t seed_;
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
  // Steps before the first of this object; below 0 after a rollback.
  std::uint64_t steps_before_ = 0;
  struct Started {
    CommitTicket ticket;
    std::string extra;
  };
  mutable std::optional<Started> started_;
  mutable std::optional<std::uint64_t> committed_step_;
  mutable std::string committed_extra_;
};

namespace {

constexpr const char* kNoArchive =
    "OffloadedAdamW has no archive format: save the tensors of state_dict()";

}  // namespace

OffloadedAdamW::OffloadedAdamW(const std::vector<OptimizerParamGroup>& groups,
                               OffloadedAdamWOptions defaults,
                               const StateOptions& offload,
                               const Resumed& resume)
    : Optimizer(groups,
                std::make_unique<OffloadedAdamWOptions>(std::move(defaults))),
      impl_(std::make_unique<Impl>(*this, offload, resume)) {}

OffloadedAdamW::OffloadedAdamW(const std::vector<OptimizerParamGroup>& groups,
                               OffloadedAdamWOptions defaults,
                               const StateOptions& offload)
    : OffloadedAdamW(groups, std::move(defaults), offload,
                     Resumed{.name = name_in(offload)}) {}

OffloadedAdamW::OffloadedAdamW(std::vector<at::Tensor> parameters,
                               OffloadedAdamWOptions defaults,
                               const StateOptions& offload)
    : OffloadedAdamW({OptimizerParamGroup(std::move(parameters))},
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

CommitTicket OffloadedAdamW::start_commit(std::optional<std::uint64_t> step,
                                          const CommitOptions& options) {
  return impl_->start_commit(step, options);
}

CommitReport OffloadedAdamW::commit(std::optional<std::uint64_t> step,
                                    const CommitOptions& options) {
  return impl_->commit(step, options);
}

std::unique_ptr<OffloadedAdamW> OffloadedAdamW::resume(
    std::vector<OptimizerParamGroup> groups, const StateOptions& offload,
    std::optional<std::uint64_t> step) {
  const StateOptions defaults;
  const auto refuse = [](bool given, const char* name) {
    if (!given) return;
    throw std::invalid_argument(std::string("OffloadedAdamW: resume() takes no "
                                            "StateOptions::") +
                                name + ": the commit has it");
  };
  refuse(offload.state_format != defaults.state_format, "state_format");
  refuse(offload.seed != defaults.seed, "seed");
  // Python gives the store another name when it divides the state anew.
  const StoreName name = name_in(offload);
  refuse_other_division("resume", offload.nvme_path, name);
  const std::vector<OptimizerOffload::Committed> commits =
      OptimizerOffload::find_commits({.store = {.directory = offload.nvme_path,
                                                .aio = offload.aio,
                                                .engine = offload.engine},
                                      .name = name})
          .front();
  const OptimizerOffload::Committed& commit = chosen(commits, step);
  const AdamWCommit document =
      parse_adamw_commit(commit.document, store_of(offload, name).string());
  StateOptions with = offload;
  with.state_format = document.state_format;
  with.seed = document.seed;
  bool others = false;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const bool there = i < document.groups.size();
    const AdamWCommit::Numbers& numbers =
        there ? document.groups[i].options : document.defaults;
    if (groups[i].has_options()) {
      const auto* given =
          dynamic_cast<const OffloadedAdamWOptions*>(&groups[i].options());
      others = others || given == nullptr || numbers_of(*given) != numbers;
    }
    set_options(groups[i], numbers);
  }
  std::unique_ptr<OffloadedAdamW> optimizer(new OffloadedAdamW(
      groups, options_of(document.defaults), with,
      Resumed{.name = name, .generation = commit.generation}));
  optimizer->impl_->take_commit(commit, document);
  if (others) {
    optimizer->impl_->note(
        "the options of the groups are the commit's, not those that resume() "
        "was given");
  }
  return optimizer;
}

std::unique_ptr<OffloadedAdamW> OffloadedAdamW::resume(
    std::vector<at::Tensor> parameters, const StateOptions& offload,
    std::optional<std::uint64_t> step) {
  return resume(std::vector{OptimizerParamGroup(std::move(parameters))},
                offload, step);
}

void OffloadedAdamW::rollback(std::optional<std::uint64_t> step) {
  impl_->rollback(step);
}

SnapshotReport OffloadedAdamW::snapshot(const DirectoryList& directory) {
  return impl_->snapshot(directory);
}

std::vector<OffloadedAdamW::Committed> OffloadedAdamW::commits() {
  return impl_->commits();
}

std::optional<std::uint64_t> OffloadedAdamW::committed_step() const {
  return impl_->committed_step();
}

const std::string& OffloadedAdamW::committed_extra() const {
  return impl_->committed_extra();
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
