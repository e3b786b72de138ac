// The state of parameters that are tensors, in an OptimizerOffload.
//
// A parameter has one number, its slot: that of add(), of the OptimizerOffload,
// and of the rounding. Before its first state it may be anything. When a call
// needs room or state for it, it is defined: what is kept of it (StateLayout),
// and the dtype, sizes and strides for which that is. From then on, a parameter
// that has changed is refused until its state is loaded anew or forgotten. No
// tensor is kept.
//
// save(), read(), change() and load() move state between tiles and tensors
// (StateSnapshot, StateLoader). What updates state is in the derived classes:
// AdamWOffload, and PieceOffload for any class of Python's.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "dense_tensor.h"
#include "plain_modes.h"
#include "state_checks.h"
#include "state_kernels.h"
#include "state_layout.h"
#include "torch_ext/base/error.h"
#include "torch_ext/optim/optimizer_offload.h"
#include "torch_ext/tensor/adamw_options.h"
#include "value_kernel.h"

namespace torch_ext {

/// Errors: TypeError, std::invalid_argument and StateError for tensors that
/// cannot be used, before anything has changed; then those of OptimizerOffload.
/// Modes of the calling thread change nothing: see PlainModes.
/// Threads: any, one call at a time.
class TensorOffload {
 public:
  /// A parameter, and the slot that add() returned for it.
  struct Parameter {
    std::size_t slot = 0;
    at::Tensor tensor;
  };
  using Layout = std::shared_ptr<const StateLayout>;
  /// A parameter's state. Its tensors are in the order of its layout. Where a
  /// parameter has state, undefined ones leave its own as they are.
  struct Saved {
    Parameter parameter;
    std::uint64_t step = 0;
    std::vector<at::Tensor> tensors;
  };

  TensorOffload(const TensorOffload&) = delete;
  TensorOffload& operator=(const TensorOffload&) = delete;
  virtual ~TensorOffload() = default;

  /// Gives a parameter a slot. Takes no space yet. The parameter is checked if
  /// it is `trained`, else when it has a gradient: frozen ones may be anything.
  /// `first`: where it begins in the whole of which it is a shard, for
  /// RoundingNoise.
  std::size_t add(const at::Tensor& parameter, bool trained,
                  std::uint64_t first = 0) {
    if (trained) check_trainable(parameter);
    if (next_slot_ == registered_) {
      // define() says what it is.
      registered_ = offload_->add_parameter(0, StateFields::floats(1)) + 1;
    }
    slots_[next_slot_].first = first;
    return next_slot_++;
  }

  /// Takes a slot back, with its state. Errors: as forget().
  void remove(std::size_t slot) {
    const auto found = slots_.find(slot);
    if (found == slots_.end()) return;
    if (found->second.layout != nullptr) offload_->forget_state({&slot, 1});
    slots_.erase(found);
    // Only the last number is given again. Rounding shall not depend on which
    // parameters have gone.
    if (slot + 1 == next_slot_) next_slot_ = slot;
  }

  /// Throws what is wrong with a parameter.
  void check(const Parameter& parameter) const {
    check_parameter(name_, parameter.tensor);
    if (fits(parameter)) return;
    const Slot& slot = slots_.at(parameter.slot);
    const at::Tensor& tensor = parameter.tensor;
    fail<StateError>(
        name_, "the state was made for a parameter with dtype ", slot.dtype,
        ", sizes ", at::IntArrayRef(slot.sizes), " and strides ",
        at::IntArrayRef(slot.strides), "; it has now dtype ",
        tensor.scalar_type(), ", sizes ", tensor.sizes(), " and strides ",
        tensor.strides(),
        ". Load a state to go on, or delete it from the optimizer's state");
  }

  /// Throws what is wrong with a parameter of a step, or its gradient.
  void check(const Parameter& parameter, const at::Tensor& gradient) const {
    check(parameter);
    check_trainable(parameter.tensor);
    check_gradient(name_, gradient, parameter.tensor);
    check_kind(gradient, parameter.tensor);
  }

  /// Defines parameters as they are now. State that exists stays. Returns their
  /// slots. Errors: as check(); nothing has changed then.
  std::vector<std::size_t> expect(const std::vector<Parameter>& parameters) {
    for (const Parameter& parameter : parameters) check(parameter);
    std::vector<std::size_t> slots;
    for (const Parameter& parameter : parameters) {
      slots.push_back(number_of(parameter));
    }
    return slots;
  }

  bool has_state(std::size_t slot) const { return offload_->has_state(slot); }
  std::uint64_t step_of(std::size_t slot) const {
    return offload_->step_of(slot);
  }

  /// Whether a parameter's state, if it has one, fits it as it is now.
  bool fits(const Parameter& parameter) const {
    if (!has_state(parameter.slot)) return true;
    const Slot& slot = slots_.at(parameter.slot);
    const at::Tensor& tensor = parameter.tensor;
    return tensor.scalar_type() == slot.dtype &&
           tensor.sizes() == at::IntArrayRef(slot.sizes) &&
           same_order(tensor.sizes(), tensor.strides(), slot.strides);
  }

  /// Makes the first state of a parameter's elements, from `values` on the CPU:
  /// a contiguous tensor for each of its layout, but not for a master.
  using FirstState = std::function<std::vector<at::Tensor>(
      const Parameter& parameter, const at::Tensor& values)>;

  /// Returns the state of those parameters that have one, in tensors that later
  /// steps do not change. StateDictMode says where these are. The file of
  /// kMapped is in the first directory, and gone with the tensors. With
  /// `first_state` the other parameters get the state that it makes. After an
  /// error all is as before.
  std::vector<Saved> save(const std::vector<Parameter>& parameters,
                          const FirstState& first_state = {}) {
    const PlainModes plain;
    const MakeScratch scratch = make_scratch();
    StateSnapshot snapshot(scratch, mode_, directory_);
    std::vector<Saved> saved;
    std::vector<std::size_t> with_state;
    std::vector<Parameter> without;
    for (const Parameter& parameter : parameters) {
      const bool exists = has_state(parameter.slot);
      if (!exists && !first_state) continue;
      check(parameter);
      if (exists) {
        with_state.push_back(parameter.slot);
      } else {
        without.push_back(parameter);
      }
      const std::size_t number = number_of(parameter);
      snapshot.add(number, parameter.tensor.detach(), layout_of(number));
      saved.push_back({parameter, step_of(parameter.slot), {}});
    }
    snapshot.open();
    offload_->read_state(with_state, snapshot);
    for (const Parameter& parameter : without) {
      write_first(snapshot, parameter, first_state, scratch);
    }
    snapshot.finish();
    for (Saved& entry : saved) {
      entry.tensors = snapshot.state(entry.parameter.slot);
    }
    return saved;
  }

  /// Returns one tensor of a parameter's state, in memory of its own. `tensor`
  /// counts as its layout does.
  at::Tensor read(const Parameter& parameter, std::size_t tensor) {
    const PlainModes plain;
    if (!has_state(parameter.slot)) {
      fail<StateError>(name_, "a parameter has no state to read");
    }
    const Slot& slot = slots_.at(parameter.slot);
    at::Tensor like = parameter.tensor.detach();
    if (!fits(parameter) && !slot.layout->is_master(tensor)) {
      // Rows are being cut off the parameter first, and then off its state.
      like = at::empty_strided(
          slot.sizes, slot.strides,
          at::TensorOptions().dtype(slot.dtype).device(at::kMeta));
    } else {
      check(parameter);
    }
    StateSnapshot snapshot(make_scratch(), mode_, directory_);
    const at::Tensor result =
        snapshot.open_in_memory(parameter.slot, like, *slot.layout, tensor);
    offload_->read_state({&parameter.slot, 1}, snapshot);
    return result;
  }

  /// Changes the state of these parameters. Other state stays.
  void change(const std::vector<Saved>& given) {
    const PlainModes plain;
    for (const Saved& each : given) {
      check(each.parameter);
      check_given(each, has_state(each.parameter.slot));
    }
    StateLoader loader(make_scratch(), seed_);
    std::vector<OptimizerOffload::ParameterStep> steps;
    for (const Saved& each : given) {
      const bool fresh = !has_state(each.parameter.slot);
      if (fresh) define(each.parameter);
      add_to(loader, steps, each, fresh);
    }
    offload_->change_state(steps, loader);
  }

  /// Throws what is wrong with a state that load() shall take.
  void check_loaded(const Saved& given) const {
    check_parameter(name_, given.parameter.tensor);
    check_given(given, /*partly=*/false);
  }

  /// Forgets all state and takes this. It works after an error too, and gives
  /// up a step that has begun.
  void load(const std::vector<Saved>& given) {
    const PlainModes plain;
    for (const Saved& each : given) check_loaded(each);
    abandon_step();
    StateLoader loader(make_scratch(), seed_);
    std::vector<OptimizerOffload::ParameterStep> steps;
    for (const Saved& each : given) {
      define(each.parameter);
      add_to(loader, steps, each, /*fresh=*/true);
    }
    offload_->write_state(steps, loader);
  }

  /// Takes state and space from slots. Their next step is the first. Errors:
  /// StateError in a step.
  void forget(const std::vector<std::size_t>& slots) {
    offload_->forget_state(slots);
  }

  /// Makes the state durable, and these tensors with it: any that have memory.
  /// See OptimizerOffload::commit().
  CommitReport commit(std::uint64_t step, const std::string& document,
                      const std::vector<at::Tensor>& tensors, std::size_t keep,
                      const CommitGroup& group = {}) {
    const PlainModes plain;
    ValueKernel kernel(tensors, ValueKernel::Direction::kToCommit);
    return offload_->commit(step, document, ValueKernel::values_of(tensors),
                            kernel, keep, group);
  }

  /// Begins the same, and returns at once: see
  /// OptimizerOffload::start_commit(). On a device, the tensors are read after
  /// what the calling thread has queued there so far.
  CommitTicket start_commit(std::uint64_t step, const std::string& document,
                            const std::vector<at::Tensor>& tensors,
                            std::size_t keep, const CommitGroup& group = {}) {
    const PlainModes plain;
    auto kernel = std::make_unique<ValueKernel>(
        tensors, ValueKernel::Direction::kToCommit);
    kernel->read_later();
    return offload_->start_commit(step, document,
                                  ValueKernel::values_of(tensors),
                                  std::move(kernel), keep, group);
  }

  /// A parameter of a commit, with the slot that it had then, and where it
  /// begins in the whole of which it is a shard.
  struct Committed {
    Parameter parameter;
    std::uint64_t first = 0;
  };

  /// Goes back to a commit that is kept; after a resume, to the one that was
  /// resumed. All slots but those of `parameters` are gone, with their state.
  /// Fills `tensors` with the commit's: as many, with as many elements of as
  /// many bytes. `next`: the next_slot() of that time.
  /// Errors: std::invalid_argument if they are not those of the commit, before
  /// anything has changed; those of OptimizerOffload::rollback(), with some
  /// tensors filled.
  void take_commit(std::uint64_t generation,
                   const std::vector<Committed>& parameters,
                   const std::vector<at::Tensor>& tensors, std::size_t next) {
    const PlainModes plain;
    const OptimizerOffload::Contents contents = offload_->contents(generation);
    const std::vector<CommittedValue> values = ValueKernel::values_of(tensors);
    if (values != contents.values) {
      fail<std::invalid_argument>(name_, "the commit has ",
                                  contents.values.size(),
                                  " values of other numbers or sizes than the ",
                                  values.size(), " that are asked for");
    }
    std::map<std::size_t, Slot> slots;
    for (const Committed& each : parameters) {
      if (each.parameter.slot >= std::min(next, contents.parameters.size()) ||
          !slots.emplace(each.parameter.slot, committed_slot(each, contents))
               .second) {
        fail<std::invalid_argument>(name_, "the commit has no slot ",
                                    each.parameter.slot, " for a parameter");
      }
    }
    if (next > contents.parameters.size()) {
      fail<std::invalid_argument>(name_, "the commit has no slot ", next - 1);
    }
    std::vector<std::size_t> left_out;
    for (std::size_t i = 0; i < contents.parameters.size(); ++i) {
      const bool has_state = contents.parameters[i].has_state;
      if (has_state && !slots.contains(i)) left_out.push_back(i);
    }
    ValueKernel kernel(tensors, ValueKernel::Direction::kFromCommit);
    abandon_step();
    if (std::exchange(resumed_, false)) {
      offload_->read_values(kernel);
    } else {
      offload_->rollback(generation, kernel);
    }
    offload_->forget_state(left_out);
    slots_ = std::move(slots);
    next_slot_ = next;
    registered_ = offload_->parameters();
  }

  /// A parameter of commits that were divided in another way.
  struct Divided {
    Committed committed;
    std::uint64_t step = 0;
    bool has_state = false;
    /// What its state is made of, as they lie in memory: see StateLoader.
    std::vector<ReadElements> tensors = {};
  };

  /// Becomes what other commits have of these parameters. There is no state
  /// yet. All slots but those of `parameters` are gone. `next`: the next_slot()
  /// of that time. Errors: std::invalid_argument, before anything has changed;
  /// those of load() and of the readers.
  void take_divided(const std::vector<Divided>& parameters, std::size_t next) {
    const PlainModes plain;
    std::map<std::size_t, Slot> slots;
    for (const Divided& each : parameters) {
      const auto& [slot, tensor] = each.committed.parameter;
      if (each.has_state) check_parameter(name_, tensor);
      if (slot >= next || !slots.emplace(slot, Slot{}).second) {
        fail<std::invalid_argument>(name_, "the commit has no slot ", slot,
                                    " for a parameter");
      }
      slots[slot].first = each.committed.first;
    }
    while (registered_ < next) {
      registered_ = offload_->add_parameter(0, StateFields::floats(1)) + 1;
    }
    slots_ = std::move(slots);
    next_slot_ = next;
    StateLoader loader(make_scratch(), seed_);
    std::vector<OptimizerOffload::ParameterStep> steps;
    for (const Divided& each : parameters) {
      if (!each.has_state) continue;
      const Parameter& parameter = each.committed.parameter;
      define(parameter);
      loader.add(parameter.slot, layout_of(parameter.slot),
                 each.committed.first, each.tensors);
      steps.push_back({parameter.slot, each.step});
    }
    offload_->write_state(steps, loader);
  }

  /// The slot that add() gives next.
  std::size_t next_slot() const { return next_slot_; }

  /// Returns how these parameters' state will be kept.
  virtual OptimizerPlan plan(const std::vector<Parameter>& parameters) {
    return offload_->plan(expect(parameters));
  }

  /// The optimizer's, for messages.
  const std::string& name() const { return name_; }

  /// What a log should say. The list grows.
  const std::vector<std::string>& notes() {
    for (const std::string& each : offload_->notes()) note(each);
    return notes_;
  }
  /// Adds to it, once.
  void note(const std::string& text) {
    if (std::ranges::count(notes_, text) == 0) notes_.push_back(text);
  }

  OptimizerOffload& offload() { return *offload_; }
  const OptimizerOffload& offload() const { return *offload_; }
  virtual OptimizerOffloadStats stats() const { return offload_->stats(); }
  virtual void close() { offload_->close(); }

 protected:
  /// `name` is the optimizer's, for messages. `seed` is for the rounding of
  /// formats that are not exact. `resume`: what take_commit() will take;
  /// without a generation, the store is new.
  TensorOffload(const TileOptions& options, std::string name,
                StateDictMode mode, std::uint64_t seed = 0,
                const CommitChoice& resume = {})
      : name_(std::move(name)),
        seed_(seed),
        mode_(mode),
        directory_(first_of(options.store.directory)),
        resumed_(resume.generation != 0),
        offload_(resumed_ ? OptimizerOffload::resume(options, resume)
                          : std::make_unique<OptimizerOffload>(options)),
        registered_(offload_->parameters()),
        next_slot_(registered_) {}

  /// Throws what is wrong with a parameter that shall be trained.
  virtual void check_trainable(const at::Tensor& parameter) const {
    check_parameter(name_, parameter);
  }

  /// Throws if a gradient has the wrong dtype or device.
  virtual void check_kind(const at::Tensor& gradient,
                          const at::Tensor& parameter) const = 0;

  /// Returns what is kept of a parameter that has no state yet.
  virtual Layout wanted_layout(const Parameter& parameter) const = 0;

  /// Gives up a step that has begun.
  virtual void abandon_step() { offload_->abandon_step(); }

  /// Gives the scratch of a call that saves or loads.
  virtual MakeScratch make_scratch() = 0;

  /// Whether a parameter has been defined for other dtype, sizes or fields.
  bool is_defined_otherwise(const Parameter& parameter) const {
    const Slot& slot = slots_.at(parameter.slot);
    return slot.layout != nullptr &&
           !is_defined_as(slot, parameter, *wanted_layout(parameter));
  }

  /// As expect(), for a parameter that has been checked.
  std::size_t number_of(const Parameter& parameter) {
    if (!has_state(parameter.slot)) define(parameter);
    return parameter.slot;
  }

  const StateLayout& layout_of(std::size_t slot) const {
    return *slots_.at(slot).layout;
  }
  /// Where a shard begins in the whole.
  std::uint64_t first_element(std::size_t slot) const {
    return slots_.at(slot).first;
  }

  std::uint64_t seed() const { return seed_; }

 private:
  /// What a parameter's state is made for. Null: for nothing yet.
  struct Slot {
    Layout layout;
    std::vector<std::int64_t> sizes;
    std::vector<std::int64_t> strides;
    c10::ScalarType dtype = at::kFloat;
    std::uint64_t first = 0;
  };

  /// What a parameter's slot was. Throws if its state does not fit.
  Slot committed_slot(const Committed& committed,
                      const OptimizerOffload::Contents& contents) const {
    const auto& [slot, tensor] = committed.parameter;
    Slot result;
    result.first = committed.first;
    if (slot >= contents.parameters.size()) return result;
    const auto& [elements, fields, step, has_state] = contents.parameters[slot];
    if (!has_state) return result;
    check_parameter(name_, tensor);
    result.layout = wanted_layout(committed.parameter);
    result.sizes = tensor.sizes().vec();
    result.strides = tensor.strides().vec();
    result.dtype = tensor.scalar_type();
    if (static_cast<std::uint64_t>(tensor.numel()) != elements ||
        result.layout->in_tiles() != fields) {
      fail<std::invalid_argument>(name_, "the committed state is for ",
                                  elements, " elements in another format");
    }
    return result;
  }

  static bool is_defined_as(const Slot& slot, const Parameter& parameter,
                            const StateLayout& layout) {
    const at::Tensor& tensor = parameter.tensor;
    return *slot.layout == layout && slot.dtype == tensor.scalar_type() &&
           tensor.sizes() == at::IntArrayRef(slot.sizes);
  }

  void define(const Parameter& parameter) {
    Layout layout = wanted_layout(parameter);
    Slot& slot = slots_.at(parameter.slot);
    const at::Tensor& tensor = parameter.tensor;
    if (slot.layout == nullptr || !is_defined_as(slot, parameter, *layout)) {
      offload_->redefine_parameter(parameter.slot,
                                   static_cast<std::uint64_t>(tensor.numel()),
                                   layout->in_tiles());
    }
    slot.layout = std::move(layout);
    slot.sizes = tensor.sizes().vec();
    slot.strides = tensor.strides().vec();
    slot.dtype = tensor.scalar_type();
  }

  /// `partly`: tensors may be undefined.
  void check_given(const Saved& given, bool partly) const {
    const Layout of_slot = slots_.at(given.parameter.slot).layout;
    const Layout layout = partly ? of_slot : wanted_layout(given.parameter);
    layout->in_tiles();  // Throws before anything has changed.
    for (std::size_t i = 0; i < layout->tensors(); ++i) {
      const bool there = i < given.tensors.size() && given.tensors[i].defined();
      if (!there && (partly || layout->is_master(i))) continue;
      check_saved(name_, layout->name(i),
                  there ? given.tensors[i] : at::Tensor(),
                  given.parameter.tensor);
    }
  }

  void add_to(StateLoader& loader,
              std::vector<OptimizerOffload::ParameterStep>& steps,
              const Saved& given, bool fresh) const {
    const auto& [slot, tensor] = given.parameter;
    loader.add(slot, tensor, layout_of(slot), first_element(slot),
               given.tensors, fresh);
    steps.push_back({slot, given.step});
  }

  void write_first(StateSnapshot& snapshot, const Parameter& parameter,
                   const FirstState& first_state, const MakeScratch& scratch) {
    const auto& [slot, tensor] = parameter;
    const StateLayout& layout = layout_of(slot);
    const OrderedReader reader(tensor, tensor.strides());
    const AdamWScratch memory(scratch());
    const auto total = static_cast<std::uint64_t>(tensor.numel());
    std::uint64_t first = 0;
    do {
      const std::uint64_t count = std::min(memory.chunk(), total - first);
      // Whoever is called may keep it.
      const at::Tensor values = at::empty({static_cast<std::int64_t>(count)},
                                          host_options(at::kFloat));
      reader.copy_as_float(values.mutable_data_ptr<float>(), memory.staging(),
                           first, count);
      std::vector<at::Tensor> made = first_state(parameter, values);
      if (layout.has_master()) made.push_back(values);
      for (std::size_t i = 0; i < layout.tensors(); ++i) {
        const at::Tensor& part = made.at(i);
        if (part.scalar_type() != layout.dtype(i) ||
            part.numel() != values.numel()) {
          fail<StateError>(name_, "the first state ", layout.name(i), " has ",
                           part.numel(), " elements of dtype ",
                           part.scalar_type(), " for ", count,
                           " of the parameter, unlike in the trial");
        }
        snapshot.write(slot, i, first,
                       {static_cast<const std::byte*>(part.const_data_ptr()),
                        part.nbytes()});
      }
      first += count;
    } while (first < total);
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

  const std::string name_;
  const std::uint64_t seed_;
  const StateDictMode mode_;
  const std::filesystem::path directory_;
  std::vector<std::string> notes_;
  bool resumed_;  // take_commit() comes next.
  std::unique_ptr<OptimizerOffload> offload_;
  std::map<std::size_t, Slot> slots_;
  std::size_t registered_;  // Numbers that the offload has given.
  std::size_t next_slot_;
};

}  // namespace torch_ext
