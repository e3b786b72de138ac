#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/adamw_options.h"
#include "torch_ext/tensor/adamw_parts.h"
#include "torch_ext/tensor/adamw_scratch.h"
#include "torch_ext/tensor/dense_tensor.h"
#include "torch_ext/tensor/device_lane.h"
#include "torch_ext/tensor/fused_on_device.h"

/// Of the OpenMP that PyTorch brings, if it does: for the calling thread only.
extern "C" void omp_set_num_threads(int) noexcept __attribute__((weak));

namespace torch_ext {

/// AdamW. State that is float (StateFormat::kExact) is updated by PyTorch's own
/// fused CPU kernel, other state by update_adamw().
///
/// float parameters on the CPU are updated in place, with kExact bit for bit as
/// torch.optim.AdamW(fused=True) does. What is in the way goes through scratch
/// memory, chunk by chunk: other dtypes, masters, and parameters on a device
/// with their gradients, which are copied to the host and back, the next chunk
/// while one is updated. Or, with UpdateOn::kDevice, these are updated there.
///
/// update() does not look at the thread's current streams: what it queues on a
/// device comes after Target::ready and before the lane's leave().
class AdamWKernel final : public UpdateKernel {
 public:
  /// A parameter that the step updates. Dense, of float, bfloat16 or float16.
  struct Target {
    at::Tensor parameter;
    OrderedReader gradient;
    const AdamWHyper* hyper = nullptr;
    std::uint32_t ordinal = 0;  ///< For RoundingNoise.
    /// Of the device that both are on; null for the CPU.
    DeviceLane* lane = nullptr;
    /// After it the gradient and the parameter are what they shall be; lives
    /// as long as the target does.
    const c10::Event* ready = nullptr;
    std::shared_ptr<const c10::Event> own_ready;  ///< `ready`, if not a lane's.
    std::uint64_t left = 0;  ///< Elements that are not updated yet.
    /// Where the gradient is on the host, as dtype_on_host(), once the lane has
    /// done what it was queued before; null if it has not been copied yet.
    std::byte* on_host = nullptr;
  };
  using MakeScratch = std::function<std::span<std::byte>()>;

  /// Scratch, which is also that of the lanes, is asked for when it is first
  /// needed. UpdateOn::kDevice goes with kExact only.
  AdamWKernel(StateFormat format, std::uint64_t seed, MakeScratch make_scratch,
              DeviceLanes& lanes, UpdateOn update_on = UpdateOn::kCpu)
      : format_(format),
        seed_(seed),
        make_scratch_(std::move(make_scratch)),
        lanes_(lanes),
        update_on_(update_on) {}

  /// From any thread, also while others are updated. The kernel lets go of the
  /// gradient when all elements are updated.
  void add(std::size_t parameter, Target target) {
    target.left = static_cast<std::uint64_t>(target.parameter.numel());
    const std::lock_guard lock(targets_mutex_);
    targets_.insert_or_assign(parameter, std::move(target));
  }

  /// PyTorch's worker threads are those of backward, which goes on meanwhile:
  /// more threads than cores wait for one another.
  void enter_thread() override {
    lanes_.enter_thread();
    at::get_num_threads();  // PyTorch sets its number at its first use.
    if (omp_set_num_threads != nullptr) omp_set_num_threads(1);
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    on_device_.clear();
    for (const StateSegment& segment : segments) {
      const Target& target = target_of(segment);
      if (target.lane != nullptr) {
        on_device_.push_back({&segment, &target});
        continue;
      }
      if (batch_hyper_ != target.hyper) flush();
      batch_hyper_ = target.hyper;
      if (in_place(target)) {
        // The fused kernel takes many tensors in one call.
        push(segment, 0, segment.count, parameter_at(target, segment.first),
             static_cast<float*>(target.gradient.pointer(segment.first)));
      } else {
        update_by_chunks(segment, target);
      }
    }
    flush();
    update_those_on_devices();
    for (const StateSegment& segment : segments) let_go_of_updated(segment);
  }

 private:
  // Others may be added meanwhile; this one stays where it is.
  const Target& target_of(const StateSegment& segment) {
    const std::lock_guard lock(targets_mutex_);
    return targets_.at(segment.parameter);
  }

  void let_go_of_updated(const StateSegment& segment) {
    decltype(targets_)::node_type updated;
    const std::lock_guard lock(targets_mutex_);
    const auto found = targets_.find(segment.parameter);
    found->second.left -= segment.count;
    if (found->second.left == 0) updated = targets_.extract(found);
  }

  /// Elements: enough for fast copies, and a tile has several such chunks.
  static constexpr std::uint64_t kMostOnTheWay = 65536;

  struct OnDevice {
    const StateSegment* segment;
    const Target* target;
  };
  /// Elements of it that are on the host at one time.
  struct Chunk {
    const StateSegment& segment;
    const Target& target;
    std::uint64_t done;  ///< Elements of the segment before these.
    std::uint64_t count;

    std::uint64_t first() const { return segment.first + done; }
    at::Tensor of(const at::Tensor& tensor) const {
      return storage_view(tensor, first(), count);
    }
  };

  bool in_place(const Target& target) const {
    return format_ == StateFormat::kExact &&
           target.parameter.scalar_type() == at::kFloat &&
           has_direct_gradient(target, at::kFloat);
  }

  static bool has_direct_gradient(const Target& target, c10::ScalarType dtype) {
    return target.gradient.direct() &&
           target.gradient.source().scalar_type() == dtype;
  }

  static float* parameter_at(const Target& target, std::uint64_t first) {
    return target.parameter.mutable_data_ptr<float>() + first;
  }

  void update_by_chunks(const StateSegment& segment, const Target& target) {
    flush();
    batch_hyper_ = target.hyper;
    lanes_.make_way_for(nullptr);
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk =
        needs_scratch(target) ? scratch.chunk() : segment.count;
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      const std::uint64_t first = segment.first + done;
      AdamWRun run;
      run.first = first;
      run.count = count;
      find_gradient(target, scratch, run);
      const at::Tensor here = storage_view(target.parameter, first, count);
      update_chunk(segment, done, run, here, target, scratch);
    }
  }

  /// Else all is where update_adamw() takes it.
  bool needs_scratch(const Target& target) const {
    return format_ == StateFormat::kExact ||
           target.parameter.scalar_type() == at::kHalf ||
           !(has_direct_gradient(target, at::kFloat) ||
             has_direct_gradient(target, at::kBFloat16));
  }

  void update_chunk(const StateSegment& segment, std::uint64_t done,
                    const AdamWRun& run, const at::Tensor& here,
                    const Target& target, const AdamWScratch& scratch) {
    if (format_ == StateFormat::kExact) {
      update_exact(segment, done, run, here, scratch);
    } else {
      update_packed(segment, done, run, here, target, scratch);
    }
  }

  void update_those_on_devices() {
    std::span<const OnDevice> rest = on_device_;
    while (!rest.empty()) {
      DeviceLane& lane = *rest[0].target->lane;
      std::size_t same = 0;
      while (same < rest.size() && rest[same].target->lane == &lane) {
        lane.after(*rest[same++].target->ready);
      }
      lanes_.make_way_for(&lane);
      if (update_on_ == UpdateOn::kCpu) {
        update_here(lane, rest.first(same));
      } else {
        update_there(lane, rest.first(same));
      }
      rest = rest.subspan(same);
    }
  }

  void update_here(DeviceLane& lane, std::span<const OnDevice> parameters) {
    const AdamWScratch scratch(make_scratch_(), DeviceLane::kSlots);
    const std::uint64_t most = std::min(scratch.chunk(), kMostOnTheWay);
    std::vector<Chunk> chunks;
    for (const auto& [segment, target] : parameters) {
      for (std::uint64_t done = 0; done < segment->count; done += most) {
        chunks.push_back(
            {*segment, *target, done, std::min(most, segment->count - done)});
      }
    }
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      if (i == 0) bring(lane, chunks[0], scratch, 0);
      // Its copies are made while this one is updated.
      if (i + 1 < chunks.size()) {
        bring(lane, chunks[i + 1], scratch, (i + 1) % DeviceLane::kSlots);
      }
      update_brought(lane, chunks[i], scratch, i % DeviceLane::kSlots);
    }
  }

  /// Queues the copies of a chunk to the host. Those to and from a slot are
  /// made in the order in which they are queued.
  void bring(DeviceLane& lane, const Chunk& chunk, const AdamWScratch& scratch,
             std::size_t slot) const {
    const at::Tensor& parameter = chunk.target.parameter;
    lane.queue([&] {
      if (chunk.target.on_host == nullptr) {
        const at::Tensor gradient = chunk.of(chunk.target.gradient.source());
        const c10::ScalarType dtype = dtype_on_host(chunk.target);
        host_view(scratch.gradient(slot), chunk.count, dtype)
            .copy_(gradient.to(dtype), /*non_blocking=*/true);
      }
      host_view(scratch.staging(slot).data(), chunk.count,
                parameter.scalar_type())
          .copy_(chunk.of(parameter), /*non_blocking=*/true);
    });
    lane.mark(slot);
  }

  void update_brought(DeviceLane& lane, const Chunk& chunk,
                      const AdamWScratch& scratch, std::size_t slot) {
    const Target& target = chunk.target;
    batch_hyper_ = target.hyper;
    AdamWRun run;
    run.first = chunk.first();
    run.count = chunk.count;
    const c10::ScalarType dtype = dtype_on_host(target);
    void* const gradient =
        target.on_host == nullptr
            ? static_cast<void*>(scratch.gradient(slot))
            : target.on_host + run.first * c10::elementSize(dtype);
    if (dtype == at::kFloat) {
      run.gradient = static_cast<float*>(gradient);
    } else {
      run.gradient_bf16 = static_cast<std::uint16_t*>(gradient);
    }
    const at::Tensor here = host_view(scratch.staging(slot).data(), run.count,
                                      target.parameter.scalar_type());
    lane.await(slot);
    update_chunk(chunk.segment, chunk.done, run, here, target, scratch);
    lane.queue(
        [&] { chunk.of(target.parameter).copy_(here, /*non_blocking=*/true); });
  }

  c10::ScalarType dtype_on_host(const Target& target) const {
    return torch_ext::dtype_on_host(target.gradient.source().scalar_type(),
                                    format_);
  }

  void update_there(DeviceLane& lane, std::span<const OnDevice> parameters) {
    try {
      lane.queue([&] {
        FusedOnDevice fused;
        for (const auto& [segment, target] : parameters) {
          fused.add(
              *segment, *target->hyper,
              storage_view(target->parameter, segment->first, segment->count),
              storage_view(target->gradient.source(), segment->first,
                           segment->count));
        }
        fused.flush();
      });
      lane.settle();
    } catch (...) {
      // Copies to and from the segments may be on their way.
      DeviceLanes::settle_quietly(lane);
      throw;
    }
  }

  void find_gradient(const Target& target, const AdamWScratch& scratch,
                     AdamWRun& run) const {
    const bool packed = format_ != StateFormat::kExact;
    if (has_direct_gradient(target, at::kFloat)) {
      run.gradient = static_cast<float*>(target.gradient.pointer(run.first));
    } else if (packed && has_direct_gradient(target, at::kBFloat16)) {
      run.gradient_bf16 =
          static_cast<std::uint16_t*>(target.gradient.pointer(run.first));
    } else {
      // Gradients pass through where a device's parameter comes next.
      target.gradient.copy_as_float(scratch.gradient(), scratch.staging(),
                                    run.first, run.count);
      run.gradient = scratch.gradient();
    }
  }

  void update_exact(const StateSegment& segment, std::uint64_t done,
                    const AdamWRun& run, const at::Tensor& here,
                    const AdamWScratch& scratch) {
    auto* gradient = const_cast<float*>(run.gradient);
    switch (master_format(here.scalar_type())) {
      case MasterFormat::kNone:
        push(segment, done, run.count, here.mutable_data_ptr<float>(),
             gradient);
        flush();
        break;
      case MasterFormat::kLow16: {
        auto* parameter = static_cast<std::uint16_t*>(here.mutable_data_ptr());
        auto* low = segment.field<std::uint16_t>(AdamWFields::kMaster) + done;
        join_master(parameter, low, scratch.state(), run.count);
        push(segment, done, run.count, scratch.state(), gradient);
        flush();
        split_master(scratch.state(), parameter, low, run.count);
        break;
      }
      case MasterFormat::kFloat: {
        float* master = adopted(segment, done, run.count, here, scratch);
        push(segment, done, run.count, master, gradient);
        flush();
        convert(here.mutable_data_ptr(), at::kHalf, master, at::kFloat,
                run.count);
        break;
      }
    }
  }

  void update_packed(const StateSegment& segment, std::uint64_t done,
                     AdamWRun run, const at::Tensor& here, const Target& target,
                     const AdamWScratch& scratch) const {
    run.exp_avg = moment_at(segment, format_, AdamWFields::kExpAvg, done);
    run.exp_avg_sq = moment_at(segment, format_, AdamWFields::kExpAvgSq, done);
    const MasterFormat kind = master_format(here.scalar_type());
    if (kind == MasterFormat::kNone) {
      run.master = here.mutable_data_ptr<float>();
    } else if (kind == MasterFormat::kLow16) {
      run.parameter_bf16 = static_cast<std::uint16_t*>(here.mutable_data_ptr());
      run.low = segment.field<std::uint16_t>(AdamWFields::kMaster) + done;
    } else {
      run.master = adopted(segment, done, run.count, here, scratch);
    }
    update_in_parallel(format_, run, coefficients(*target.hyper, segment.step),
                       {seed_, segment.step, target.ordinal});
    if (kind == MasterFormat::kFloat) {
      convert(here.mutable_data_ptr(), at::kHalf, run.master, at::kFloat,
              run.count);
    }
  }

  static float* adopted(const StateSegment& segment, std::uint64_t done,
                        std::uint64_t count, const at::Tensor& here,
                        const AdamWScratch& scratch) {
    float* master = segment.field(AdamWFields::kMaster) + done;
    adopt_parameter(master, here.const_data_ptr<c10::Half>(), scratch.small(),
                    count);
    return master;
  }

  static AdamWCoefficients coefficients(const AdamWHyper& hyper,
                                        std::uint64_t step) {
    const auto t = static_cast<double>(step);
    return {.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay),
            .exp_avg = static_cast<float>(1 - hyper.beta1),
            .beta2 = static_cast<float>(hyper.beta2),
            .exp_avg_sq = static_cast<float>(1 - hyper.beta2),
            .inverse_root =
                static_cast<float>(1 / std::sqrt(1 - std::pow(hyper.beta2, t))),
            .eps = static_cast<float>(hyper.eps),
            .step_size =
                static_cast<float>(hyper.lr / (1 - std::pow(hyper.beta1, t))),
            .maximize = hyper.maximize};
  }

  /// Adds a tensor to the next call of the fused kernel.
  void push(const StateSegment& segment, std::uint64_t done,
            std::uint64_t count, float* parameter, float* gradient) {
    parameters_.push_back(host_view(parameter, count, at::kFloat));
    gradients_.push_back(host_view(gradient, count, at::kFloat));
    exp_avgs_.push_back(host_view(segment.field(AdamWFields::kExpAvg) + done,
                                  count, at::kFloat));
    exp_avg_sqs_.push_back(host_view(
        segment.field(AdamWFields::kExpAvgSq) + done, count, at::kFloat));
    steps_.push_back(step_tensor(segment.step));
  }

  void flush() {
    if (parameters_.empty()) return;
    const AdamWHyper& hyper = *batch_hyper_;
    at::_fused_adamw_(parameters_, gradients_, exp_avgs_, exp_avg_sqs_, {},
                      steps_, hyper.lr, hyper.beta1, hyper.beta2,
                      hyper.weight_decay, hyper.eps, /*amsgrad=*/false,
                      hyper.maximize);
    for (auto* list :
         {&parameters_, &gradients_, &exp_avgs_, &exp_avg_sqs_, &steps_}) {
      list->clear();
    }
  }

  // Parameters mostly have the same number of steps, and nobody writes to it.
  const at::Tensor& step_tensor(std::uint64_t step) {
    if (!step_tensor_.defined() || step_tensor_of_ != step) {
      step_tensor_ = at::scalar_tensor(static_cast<double>(step), at::kFloat);
      step_tensor_of_ = step;
    }
    return step_tensor_;
  }

  const StateFormat format_;
  const std::uint64_t seed_;
  const MakeScratch make_scratch_;
  DeviceLanes& lanes_;
  const UpdateOn update_on_;
  std::mutex targets_mutex_;
  std::unordered_map<std::size_t, Target> targets_;
  std::vector<OnDevice> on_device_;  ///< Of the tile.
  const AdamWHyper* batch_hyper_ = nullptr;
  std::vector<at::Tensor> parameters_, gradients_, exp_avgs_, exp_avg_sqs_;
  std::vector<at::Tensor> steps_;
  at::Tensor step_tensor_;
  std::uint64_t step_tensor_of_ = 0;
};

}  // namespace torch_ext
