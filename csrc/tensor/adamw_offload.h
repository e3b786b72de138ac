#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "adamw_kernel.h"
#include "gradient_prefetch.h"
#include "plain_modes.h"
#include "state_checks.h"
#include "tensor_offload.h"
#include "torch_ext/base/align.h"
#include "torch_ext/optim/optimizer_offload.h"

namespace torch_ext {

/// AdamW for tensors, with its state in an OptimizerOffload. The Python and the
/// C++ optimizer share it. It keeps no tensor. Errors and threads: as
/// TensorOffload.
class AdamWOffload final : public TensorOffload {
 public:
  struct Trained {
    Parameter parameter;
    at::Tensor gradient;
  };
  struct Group {
    AdamWHyper hyper;
    std::vector<Trained> trained;
  };

  /// `options.scratch_bytes` is chosen here. `seed` is for the rounding of
  /// formats that are not exact. `early_bytes`: the bytes of gradients on
  /// devices that prefetch() shall have room for. At most a quarter of the host
  /// memory is for them, and nothing if that is below 1 MiB. `resume`:
  /// what take_commit() then takes; without a generation, the store is new.
  explicit AdamWOffload(const TileOptions& options,
                        StateFormat format = StateFormat::kExact,
                        std::uint64_t seed = 0,
                        UpdateOn update_on = UpdateOn::kCpu,
                        std::uint64_t early_bytes = 0,
                        StateDictMode mode = StateDictMode::kTensors,
                        const CommitChoice& resume = {})
      : TensorOffload(
            with_scratch(options,
                         scratch_bytes_for(options.host_memory) +
                             early_bytes_for(options.host_memory,
                                             wanted(update_on, early_bytes))),
            "OffloadedAdamW", mode, seed, resume),
        format_(format),
        update_on_(update_on),
        scratch_bytes_(scratch_bytes_for(options.host_memory)),
        early_wanted_(wanted(update_on, early_bytes)),
        early_bytes_(early_bytes_for(options.host_memory, early_wanted_)) {
    if (update_on != UpdateOn::kCpu && format != StateFormat::kExact) {
      fail<std::invalid_argument>(
          name(), "update_on \"cuda\" is for state_format \"exact\"; with \"",
          state_format_name(format), "\" the update is on the CPU");
    }
    for (const c10::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      const MasterFormat master = master_format(dtype);
      layouts_.at(static_cast<std::size_t>(master)) =
          std::make_shared<const StateLayout>(
              StateLayout{{{"exp_avg"}, {"exp_avg_sq"}}, master, format});
    }
  }

  ~AdamWOffload() override {
    if (open_ == nullptr) return;
    try {
      offload().abandon_step();  // Its thread uses the streams.
    } catch (...) {
      // A destructor has nobody to tell.
    }
  }

  /// Makes a step of the parameters in the groups.
  void step(const std::vector<Group>& groups) {
    const PlainModes plain;
    AdamWKernel kernel(
        format_, seed(), [this] { return scratch(); }, streams_, update_on_);
    for (const Group& group : groups) {
      for (const auto& [parameter, gradient] : group.trained) {
        check(parameter, gradient);
      }
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
    streams_.around([&] { offload().step(numbers, kernel); });
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
    CopyStream* const stream = stream_of(parameter);
    if (stream->device()->is_captured()) return;
    early_.bring(early_of(trained), *stream,
                 offload().scratch().subspan(scratch_bytes_, early_bytes_));
  }

  /// Takes a gradient that is final, in a step that ends with finish(). A
  /// thread of the OptimizerOffload updates the state as soon as it is in
  /// memory, and lets go of the gradient. Called once for a parameter in a
  /// step, which BackwardStep sees to. The first call begins the step. Returns
  /// at once. Errors: as step(). A failed update is thrown by finish().
  void take(const AdamWHyper& hyper, const Trained& trained) {
    const PlainModes plain;
    check(trained.parameter, trained.gradient);
    if (open_ != nullptr && !has_state(trained.parameter.slot) &&
        is_defined_otherwise(trained.parameter)) {
      fail<StateError>(name(),
                       "a parameter was given other sizes or another dtype "
                       "between backward() and step(): zero_grad() drops its "
                       "gradient, step() then ends the step");
    }
    stream_of(trained.parameter.tensor);  // For the thread that begins now.
    begin_open_step();
    AdamWKernel::Target target = target_of(trained, open_->kept(hyper));
    if (target.stream != nullptr) {
      target.own_ready = target.stream->now();
      target.ready = target.own_ready.get();
    }
    offload().release(add_target(open_->kernel, trained, std::move(target)));
  }

  /// Updates what is left of the gradients taken, and ends the step.
  void finish() {
    const PlainModes plain;
    begin_open_step();
    const std::unique_ptr<OpenStep> step = std::move(open_);
    step->kernel.use_threads(static_cast<std::size_t>(at::get_num_threads()));
    streams_.around([&] { offload().end_step(); });
  }

  /// Whether take() has begun a step that has not ended.
  bool in_step() const { return open_ != nullptr; }

  /// Gives parameters space for the state that they get in their first step.
  void make_room(const std::vector<Parameter>& parameters) {
    offload().make_room(expect(parameters));
  }

  /// Gives parameters without state zeros and no steps.
  void init(const std::vector<Parameter>& parameters) {
    offload().add_state(expect(parameters));
  }

  OptimizerPlan plan(const std::vector<Parameter>& parameters) override {
    return offload().plan(expect(parameters), [this](std::uint64_t budget) {
      return scratch_bytes_for(budget) + early_bytes_for(budget, early_wanted_);
    });
  }

  /// As OptimizerOffload::close(). It first waits for what is queued on
  /// devices.
  void close() override {
    abandon_step();
    closed_ = true;
    std::exception_ptr error;
    try {
      streams_.settle();
    } catch (...) {
      error = std::current_exception();
    }
    TensorOffload::close();
    if (error != nullptr) std::rethrow_exception(error);
  }

 private:
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
        new OpenStep{.kernel = {format_, seed(), [this] { return scratch(); },
                                streams_, update_on_}});
    // The other threads belong to backward, which goes on meanwhile. More
    // threads than cores wait for one another.
    step->kernel.use_threads(1);
    offload().begin_step(step->kernel);
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
        .first = first_element(trained.parameter.slot),
        .stream = stream_of(tensor)};
    if (target.stream != nullptr) target.ready = &target.stream->ready();
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
           is_supported(gradient.scalar_type()) &&
           gradient.is_non_overlapping_and_dense() &&
           same_order(gradient.sizes(), gradient.strides(), tensor.strides());
  }

  GradientPrefetch::Wanted early_of(const Trained& trained) const {
    return {trained.parameter.slot, trained.gradient};
  }

  /// Returns where the gradients' copies are on the host, or null for each
  /// without one. Empty if none can have one.
  std::vector<std::byte*> claim_early(const std::vector<Group>& groups) {
    std::vector<std::byte*> found;
    if (early_bytes_ == 0) return found;
    std::vector<GradientPrefetch::Wanted> wanted;
    std::vector<std::size_t> places;
    for (const Group& group : groups) {
      for (const Trained& trained : group.trained) {
        // During a capture nothing can be waited for. streams_.around() says
        // so.
        if (!trained.gradient.is_cpu() && may_be_early(trained) &&
            !stream_of(trained.parameter.tensor)->device()->is_captured()) {
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
      fail<StateError>(name(), error.what_without_backtrace());
    }
    for (std::size_t i = 0; i < claimed.size(); ++i) {
      found[places[i]] = claimed[i];
    }
    return found;
  }

  void check_trainable(const at::Tensor& parameter) const override {
    TensorOffload::check_trainable(parameter);
    check_place(parameter);
  }

  void check_place(const at::Tensor& parameter) const {
    if (update_on_ == UpdateOn::kCpu || !parameter.is_cpu()) return;
    fail<std::invalid_argument>(
        name(),
        "a parameter is on the CPU, and update_on is \"cuda\": move the model "
        "to the device first, or take update_on \"cpu\"");
  }

  void check_kind(const at::Tensor& gradient,
                  const at::Tensor& parameter) const override {
    if (!is_supported(gradient.scalar_type())) refuse_dtype(name(), gradient);
    if (gradient.device() == parameter.device()) return;
    fail<std::invalid_argument>(name(), "a gradient is on ", gradient.device(),
                                ", its parameter on ", parameter.device());
  }

  Layout wanted_layout(const Parameter& parameter) const override {
    const MasterFormat master = master_format(parameter.tensor.scalar_type());
    return layouts_.at(static_cast<std::size_t>(master));
  }

  void abandon_step() override {
    TensorOffload::abandon_step();
    open_.reset();
    early_.clear();
  }

  static std::uint64_t wanted(UpdateOn update_on, std::uint64_t early_bytes) {
    return update_on == UpdateOn::kCpu ? early_bytes : 0;
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

  static TileOptions with_scratch(TileOptions options, std::uint64_t bytes) {
    options.scratch_bytes = bytes;
    return options;
  }

  /// The kernels' part of the scratch. What follows it is for early gradients.
  std::span<std::byte> scratch() {
    return offload().scratch().first(scratch_bytes_);
  }

  MakeScratch make_scratch() override {
    return [this] {
      streams_.make_way_for(nullptr);
      return scratch();
    };
  }

  /// The stream of the tensor's device. Null for the CPU.
  CopyStream* stream_of(const at::Tensor& tensor) {
    if (tensor.is_cpu()) return nullptr;
    if (CopyStream* known = streams_.find(tensor)) return known;
    CopyStream* const stream = streams_.add(tensor.device());
    if (update_on_ == UpdateOn::kCpu) {
      offload().pin_scratch(stream->device());
    } else {
      offload().pin_tiles(stream->device());
    }
    return stream;
  }

  const StateFormat format_;
  const UpdateOn update_on_;
  const std::uint64_t scratch_bytes_;
  const std::uint64_t early_wanted_;
  const std::uint64_t early_bytes_;
  std::array<Layout, 3> layouts_;   // By MasterFormat.
  std::unique_ptr<OpenStep> open_;  // The offload's thread uses it.
  GradientPrefetch early_;
  bool closed_ = false;
  CopyStreams streams_;  // After what they copy to and from.
};

}  // namespace torch_ext
