#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../base/mutex.h"
#include "adamw_hyper.h"
#include "adamw_scratch.h"
#include "copy_stream.h"
#include "dense_tensor.h"
#include "fused_on_device.h"
#include "masters.h"
#include "parallel.h"
#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/adamw_options.h"

namespace torch_ext {

/// Updates AdamW's state. PyTorch's own fused CPU kernel updates state that is
/// float (StateFormat::kExact), and update_adamw() any other state.
///
/// float parameters on the CPU are updated in place. With kExact, the bits are
/// those of torch.optim.AdamW(fused=True). Other dtypes, masters, and
/// parameters on a device with their gradients go through scratch memory, chunk
/// by chunk. Chunks of a device are copied to the host and back, the next one
/// while one is updated. With UpdateOn::kDevice, such parameters are updated on
/// their device instead.
///
/// update() does not look at the thread's current streams. What it queues on a
/// device comes after Target::ready and before the stream's leave().
class AdamWKernel final : public UpdateKernel {
 public:
  /// A parameter that the step updates. It is dense, in float, bfloat16 or
  /// float16.
  struct Target {
    at::Tensor parameter;
    OrderedReader gradient;
    const AdamWHyper* hyper = nullptr;
    std::uint64_t first = 0;  ///< For RoundingNoise.
    /// The stream of the device that both are on. Null for the CPU.
    CopyStream* stream = nullptr;
    /// After this event, gradient and parameter are what they shall be. It
    /// lives as long as the target.
    const c10::Event* ready = nullptr;
    /// Owns `ready`, if that is not the stream's.
    std::shared_ptr<const c10::Event> own_ready = {};
    std::uint64_t left = 0;  ///< Elements not updated yet.
    /// Where the gradient is on the host, once the stream has done what was
    /// queued there before. Null if it has not been copied yet.
    std::byte* on_host = nullptr;
  };

  /// Scratch, which the streams use too, is asked for when it is first needed.
  /// UpdateOn::kDevice needs kExact.
  AdamWKernel(StateFormat format, std::uint64_t seed, MakeScratch make_scratch,
              CopyStreams& streams, UpdateOn update_on = UpdateOn::kCpu)
      : format_(format),
        seed_(seed),
        make_scratch_(std::move(make_scratch)),
        streams_(streams),
        update_on_(update_on) {}

  /// Adds a target. Called on any thread, also while others are updated. The
  /// kernel lets go of the gradient when all elements are updated.
  void add(std::size_t parameter, Target target) {
    target.left = static_cast<std::uint64_t>(target.parameter.numel());
    const MutexLock lock(targets_mutex_);
    targets_.insert_or_assign(parameter, std::move(target));
  }

  /// Sets on how many threads a tile is updated. By default these are as many
  /// as PyTorch has for the thread that made the kernel. Called on any thread.
  void use_threads(std::size_t threads) { threads_ = threads; }

  void enter_thread() override { streams_.enter_thread(); }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    on_device_.clear();
    for (const StateSegment& segment : segments) {
      const Target& target = target_of(segment);
      if (target.stream != nullptr) {
        on_device_.push_back({&segment, &target});
        continue;
      }
      if (batch_hyper_ != target.hyper) flush();
      batch_hyper_ = target.hyper;
      if (in_place(target)) {
        // The fused kernel takes many tensors in one call.
        push(segment, target);
      } else {
        flush();
        update_by_chunks(segment, target);
      }
    }
    flush();
    update_those_on_devices();
    for (const StateSegment& segment : segments) let_go_of_updated(segment);
  }

 private:
  // Others may be added meanwhile. This one stays where it is.
  const Target& target_of(const StateSegment& segment) {
    const MutexLock lock(targets_mutex_);
    return targets_.at(segment.parameter);
  }

  void let_go_of_updated(const StateSegment& segment) {
    decltype(targets_)::node_type updated;
    const MutexLock lock(targets_mutex_);
    const auto found = targets_.find(segment.parameter);
    found->second.left -= segment.count;
    if (found->second.left == 0) updated = targets_.extract(found);
  }

  /// The most elements of a chunk: enough for fast copies, and a tile has
  /// several such chunks.
  static constexpr std::uint64_t kMostOnTheWay = 65536;
  /// Elements for a thread: they take much longer than waking it. A multiple of
  /// StateFields::kCut.
  static constexpr std::uint64_t kPart = 32768;

  struct OnDevice {
    const StateSegment* segment;
    const Target* target;
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

  void update_by_chunks(const StateSegment& segment, const Target& target) {
    streams_.make_way_for(nullptr);
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk =
        needs_scratch(target) ? scratch.chunk() : segment.count;
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      update_in_parts({segment, target, done, count, scratch},
                      [this](const Part& part, AdamWRun& run) {
                        find_gradient(part, run);
                        return part.of(part.target.parameter);
                      });
    }
  }

  /// Whether scratch is needed. Otherwise all is where update_adamw() takes it.
  bool needs_scratch(const Target& target) const {
    return format_ == StateFormat::kExact ||
           !(has_direct_gradient(target, at::kFloat) ||
             has_direct_gradient(target, at::kBFloat16));
  }

  /// A part of a segment's elements, and the scratch for them.
  struct Part {
    const StateSegment& segment;
    const Target& target;
    std::uint64_t done;  ///< Elements of the segment before these.
    std::uint64_t count;
    AdamWScratch scratch;

    std::uint64_t first() const { return segment.first + done; }
    at::Tensor of(const at::Tensor& tensor) const {
      return storage_view(tensor, first(), count);
    }
    Part from(std::uint64_t element, std::uint64_t length) const {
      return {segment, target, done + element, length, scratch.from(element)};
    }
  };

  /// Updates parts of a chunk on several threads. `prepare(part, run)` sets
  /// where a part's gradient is, and returns its parameter on the host.
  template <typename Prepare>
  void update_in_parts(const Part& chunk, const Prepare& prepare) {
    step_tensor(chunk.segment.step);  // Made before several threads ask for it.
    const std::uint64_t parts = (chunk.count + kPart - 1) / kPart;
    run_in_parallel(threads_, parts, [&](std::size_t i) {
      const c10::NoGradGuard no_grad;
      const std::uint64_t before = i * kPart;
      const Part part =
          chunk.from(before, std::min(kPart, chunk.count - before));
      AdamWRun run;
      run.first = part.first();
      run.count = part.count;
      const at::Tensor here = prepare(part, run);
      if (format_ == StateFormat::kExact) {
        update_exact(part, run, here);
      } else {
        update_packed(part, run, here);
      }
    });
  }

  void update_those_on_devices() {
    std::span<const OnDevice> rest = on_device_;
    while (!rest.empty()) {
      CopyStream& stream = *rest[0].target->stream;
      std::size_t same = 0;
      while (same < rest.size() && rest[same].target->stream == &stream) {
        stream.after(*rest[same++].target->ready);
      }
      streams_.make_way_for(&stream);
      if (update_on_ == UpdateOn::kCpu) {
        update_here(stream, rest.first(same));
      } else {
        update_there(stream, rest.first(same));
      }
      rest = rest.subspan(same);
    }
  }

  void update_here(CopyStream& stream, std::span<const OnDevice> parameters) {
    const AdamWScratch scratch(make_scratch_(), CopyStream::kSlots);
    const std::uint64_t most = std::min(scratch.chunk(), kMostOnTheWay);
    std::vector<Part> chunks;
    for (const auto& [segment, target] : parameters) {
      for (std::uint64_t done = 0; done < segment->count; done += most) {
        chunks.push_back({*segment, *target, done,
                          std::min(most, segment->count - done), scratch});
      }
    }
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      if (i == 0) bring(stream, chunks[0], 0);
      // The next chunk's copies are made while this one is updated.
      if (i + 1 < chunks.size()) {
        bring(stream, chunks[i + 1], (i + 1) % CopyStream::kSlots);
      }
      update_brought(stream, chunks[i], i % CopyStream::kSlots);
    }
  }

  /// Queues the copies of a chunk to the host. Copies to and from a slot are
  /// made in the order in which they are queued.
  void bring(CopyStream& stream, const Part& chunk, std::size_t slot) const {
    const at::Tensor& parameter = chunk.target.parameter;
    const AdamWScratch& scratch = chunk.scratch;
    stream.queue([&] {
      if (chunk.target.on_host == nullptr) {
        // It is copied as it is. A kernel that casts it would wait for a place
        // between those of backward.
        const at::Tensor gradient = chunk.of(chunk.target.gradient.source());
        const c10::ScalarType dtype = gradient.scalar_type();
        host_view(brought_gradient(scratch, slot, dtype), chunk.count, dtype)
            .copy_(gradient, /*non_blocking=*/true);
      }
      host_view(scratch.staging(slot).data(), chunk.count,
                parameter.scalar_type())
          .copy_(chunk.of(parameter), /*non_blocking=*/true);
    });
    stream.mark(slot);
  }

  void update_brought(CopyStream& stream, const Part& chunk, std::size_t slot) {
    const at::Tensor& parameter = chunk.target.parameter;
    stream.await(slot);
    update_in_parts(chunk, [&](const Part& part, AdamWRun& run) {
      // Elements may be smaller than those of the scratch.
      const std::uint64_t before = part.done - chunk.done;
      find_brought_gradient(part, slot, run);
      std::byte* const begin = chunk.scratch.staging(slot).data();
      return host_view(begin + before * parameter.dtype().itemsize(),
                       part.count, parameter.scalar_type());
    });
    const at::Tensor here = host_view(chunk.scratch.staging(slot).data(),
                                      chunk.count, parameter.scalar_type());
    stream.queue(
        [&] { chunk.of(parameter).copy_(here, /*non_blocking=*/true); });
  }

  static std::byte* brought_gradient(const AdamWScratch& scratch,
                                     std::size_t slot, c10::ScalarType dtype) {
    return dtype == at::kFloat
               ? reinterpret_cast<std::byte*>(scratch.gradient(slot))
               : scratch.gradient_16(slot);
  }

  void find_brought_gradient(const Part& part, std::size_t slot,
                             AdamWRun& run) const {
    std::byte* const early = part.target.on_host;
    const c10::ScalarType dtype = part.target.gradient.source().scalar_type();
    std::byte* const gradient =
        early != nullptr ? early + run.first * c10::elementSize(dtype)
                         : brought_gradient(part.scratch, slot, dtype);
    if (dtype == at::kFloat) {
      run.gradient = reinterpret_cast<float*>(gradient);
    } else if (dtype == at::kBFloat16 && format_ != StateFormat::kExact) {
      run.gradient_bf16 = reinterpret_cast<std::uint16_t*>(gradient);
    } else {
      float* const converted = part.scratch.gradient(slot);
      convert(converted, at::kFloat, gradient, dtype, part.count);
      run.gradient = converted;
    }
  }

  void update_there(CopyStream& stream, std::span<const OnDevice> parameters) {
    try {
      stream.queue([&] {
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
      stream.settle();
    } catch (...) {
      // Copies to and from the segments may be on their way still.
      CopyStreams::settle_quietly(stream);
      throw;
    }
  }

  void find_gradient(const Part& part, AdamWRun& run) const {
    const Target& target = part.target;
    const bool packed = format_ != StateFormat::kExact;
    if (has_direct_gradient(target, at::kFloat)) {
      run.gradient = static_cast<float*>(target.gradient.pointer(run.first));
    } else if (packed && has_direct_gradient(target, at::kBFloat16)) {
      run.gradient_bf16 =
          static_cast<std::uint16_t*>(target.gradient.pointer(run.first));
    } else {
      // Gradients pass through the place where a device's parameter comes next.
      target.gradient.copy_as_float(part.scratch.gradient(),
                                    part.scratch.staging(), run.first,
                                    run.count);
      run.gradient = part.scratch.gradient();
    }
  }

  void update_exact(const Part& part, const AdamWRun& run,
                    const at::Tensor& here) const {
    const auto update = [&](float* master) {
      Fused fused;
      fused.add(part.segment, part.done, part.count, master,
                const_cast<float*>(run.gradient), step_tensor_);
      fused.call(*part.target.hyper);
    };
    switch (master_format(here.scalar_type())) {
      case MasterFormat::kNone:
        update(here.mutable_data_ptr<float>());
        break;
      case MasterFormat::kLow16: {
        auto* parameter = static_cast<std::uint16_t*>(here.mutable_data_ptr());
        auto* low =
            part.segment.field<std::uint16_t>(AdamWFields::kMaster) + part.done;
        float* const master = part.scratch.state();
        join_master(parameter, low, master, part.count);
        update(master);
        split_master(master, parameter, low, part.count);
        break;
      }
      case MasterFormat::kFloat: {
        float* const master = adopted(part, here);
        update(master);
        convert(here.mutable_data_ptr(), at::kHalf, master, at::kFloat,
                part.count);
        break;
      }
    }
  }

  void update_packed(const Part& part, AdamWRun run,
                     const at::Tensor& here) const {
    const StateSegment& segment = part.segment;
    run.exp_avg = moment_at(segment, format_, AdamWFields::kExpAvg, part.done);
    run.exp_avg_sq =
        moment_at(segment, format_, AdamWFields::kExpAvgSq, part.done);
    const MasterFormat kind = master_format(here.scalar_type());
    if (kind == MasterFormat::kNone) {
      run.master = here.mutable_data_ptr<float>();
    } else if (kind == MasterFormat::kLow16) {
      run.parameter_bf16 = static_cast<std::uint16_t*>(here.mutable_data_ptr());
      run.low = segment.field<std::uint16_t>(AdamWFields::kMaster) + part.done;
    } else {
      run.master = adopted(part, here);
    }
    update_adamw(
        format_, run, coefficients(*part.target.hyper, segment.step),
        {seed_, segment.step, static_cast<std::uint32_t>(segment.parameter),
         part.target.first});
    if (kind == MasterFormat::kFloat) {
      convert(here.mutable_data_ptr(), at::kHalf, run.master, at::kFloat,
              run.count);
    }
  }

  static float* adopted(const Part& part, const at::Tensor& here) {
    float* master = part.segment.field(AdamWFields::kMaster) + part.done;
    adopt_parameter(master, here.const_data_ptr<c10::Half>(), part.count);
    return master;
  }

  /// The tensors of a call of the fused kernel.
  struct Fused {
    std::vector<at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, steps;

    void add(const StateSegment& segment, std::uint64_t done,
             std::uint64_t count, float* parameter, float* gradient,
             const at::Tensor& step) {
      const auto view = [count](float* data) {
        return host_view(data, count, at::kFloat);
      };
      parameters.push_back(view(parameter));
      gradients.push_back(view(gradient));
      exp_avgs.push_back(view(segment.field(AdamWFields::kExpAvg) + done));
      exp_avg_sqs.push_back(view(segment.field(AdamWFields::kExpAvgSq) + done));
      steps.push_back(step);
    }

    /// Calls the kernel on this thread.
    void call(const AdamWHyper& hyper) {
      at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, {}, steps,
                        hyper.lr, hyper.beta1, hyper.beta2, hyper.weight_decay,
                        hyper.eps, /*amsgrad=*/false, hyper.maximize);
    }
  };

  /// Puts elements that are updated in place on the list for the next flush().
  void push(const StateSegment& segment, const Target& target) {
    float* const parameter =
        target.parameter.mutable_data_ptr<float>() + segment.first;
    auto* const gradient =
        static_cast<float*>(target.gradient.pointer(segment.first));
    for (std::uint64_t done = 0; done < segment.count; done += kPart) {
      if (parts_.empty() || in_last_part_ >= kPart) {
        parts_.emplace_back();
        in_last_part_ = 0;
      }
      const std::uint64_t count = std::min(kPart, segment.count - done);
      parts_.back().add(segment, done, count, parameter + done, gradient + done,
                        step_tensor(segment.step));
      in_last_part_ += count;
    }
  }

  void flush() {
    run_in_parallel(threads_, parts_.size(),
                    [this](std::size_t i) { parts_[i].call(*batch_hyper_); });
    parts_.clear();
  }

  // Parameters mostly have the same number of steps, and nobody writes to the
  // tensor.
  const at::Tensor& step_tensor(std::uint64_t step) {
    if (!step_tensor_.defined() || step_tensor_of_ != step) {
      step_tensor_ = at::scalar_tensor(static_cast<double>(step),
                                       host_options(at::kFloat));
      step_tensor_of_ = step;
    }
    return step_tensor_;
  }

  const StateFormat format_;
  const std::uint64_t seed_;
  const MakeScratch make_scratch_;
  CopyStreams& streams_;
  const UpdateOn update_on_;
  std::atomic<std::size_t> threads_ =
      static_cast<std::size_t>(at::get_num_threads());
  Mutex targets_mutex_;
  std::unordered_map<std::size_t, Target> targets_ GUARDED_BY(targets_mutex_);
  std::vector<OnDevice> on_device_;  ///< The tile's.
  const AdamWHyper* batch_hyper_ = nullptr;
  std::vector<Fused> parts_;  ///< For the next flush().
  std::uint64_t in_last_part_ = 0;
  at::Tensor step_tensor_;
  std::uint64_t step_tensor_of_ = 0;
};

}  // namespace torch_ext
