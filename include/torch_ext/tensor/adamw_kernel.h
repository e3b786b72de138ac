#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/dense_tensor.h"

/// Of the OpenMP that PyTorch brings, if it does: for the calling thread only.
extern "C" void omp_set_num_threads(int) noexcept __attribute__((weak));

namespace torch_ext {

/// What the parameters of a group have in common in a step.
struct AdamWHyper {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool maximize = false;

  bool operator==(const AdamWHyper&) const = default;
};

/// Host memory for a chunk of elements on their way.
class AdamWScratch {
 public:
  explicit AdamWScratch(std::span<std::byte> memory)
      : small_(
            memory.first(align_down(std::min(memory.size() / 3, kSmall), 64))),
        large_(memory.subspan(small_.size())) {}

  /// For what is needed for a moment only.
  std::span<std::byte> small() const { return small_; }

  /// Elements of a chunk, for which there are three parts of 4 bytes each.
  std::uint64_t chunk() const {
    return align_down(large_.size() / 12, StateFields::kCut);
  }
  float* gradient() const { return reinterpret_cast<float*>(large_.data()); }
  /// Parameters from a device.
  std::span<std::byte> staging() const { return part(1); }
  /// State as float.
  float* state() const { return reinterpret_cast<float*>(part(2).data()); }

 private:
  std::span<std::byte> part(std::size_t i) const {
    return large_.subspan(i * chunk() * 4, chunk() * 4);
  }

  static constexpr std::size_t kSmall = std::size_t{128} << 10;
  std::span<std::byte> small_;
  std::span<std::byte> large_;
};

/// Makes `master`, `count` floats, agree with a float16 parameter in host
/// memory, whose word is final: an element that does not round to the
/// parameter's takes its value. So whatever writes to the parameter between
/// steps (model.load_state_dict, zero_, clamp_) counts.
/// `memory` is host memory for some such elements.
inline void adopt_parameter(float* master, const c10::Half* parameter,
                            std::span<std::byte> memory, std::uint64_t count) {
  const auto* ours = reinterpret_cast<const std::uint16_t*>(memory.data());
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t piece =
        std::min<std::uint64_t>(memory.size() / 2, count - done);
    convert(memory.data(), at::kHalf, master + done, at::kFloat, piece);
    if (std::memcmp(memory.data(), parameter + done, 2 * piece) != 0) {
      for (std::uint64_t i = 0; i < piece; ++i) {
        const c10::Half theirs = parameter[done + i];
        if (ours[i] != theirs.x) master[done + i] = static_cast<float>(theirs);
      }
    }
    done += piece;
  }
}

/// What is kept of a parameter besides its moments.
inline MasterFormat master_format(c10::ScalarType dtype) {
  return dtype == at::kFloat      ? MasterFormat::kNone
         : dtype == at::kBFloat16 ? MasterFormat::kLow16
                                  : MasterFormat::kFloat;
}

/// Where a moment of a segment begins, at element `done` of it; a multiple of
/// StateFields::kCut.
inline Moment moment_at(const StateSegment& segment, StateFormat format,
                        std::size_t field, std::uint64_t done) {
  if (format == StateFormat::kBf16) return {segment.fields[field] + 2 * done};
  const std::size_t scales = field == AdamWFields::kExpAvg
                                 ? AdamWFields::kExpAvgScale
                                 : AdamWFields::kExpAvgSqScale;
  return {segment.fields[field] + done,
          segment.fields[scales] + done / StateFields::kCut};
}

/// Elements of a dense parameter as a tensor in host memory: in place on the
/// CPU, else copied to `staging`.
inline at::Tensor host_part(const at::Tensor& parameter, std::uint64_t first,
                            std::uint64_t count, std::span<std::byte> staging) {
  const at::Tensor there = storage_view(parameter, first, count);
  if (parameter.is_cpu()) return there;
  const at::Tensor here =
      host_view(staging.data(), count, parameter.scalar_type());
  return here.copy_(there);
}

/// AdamW. State that is float (StateFormat::kExact) is updated by PyTorch's own
/// fused CPU kernel, other state by update_adamw().
///
/// float parameters on the CPU are updated in place, with kExact bit for bit as
/// torch.optim.AdamW(fused=True) does. What is in the way goes through scratch
/// memory, chunk by chunk: parameters and gradients on another device, which
/// are copied to the host and back, other dtypes, masters.
class AdamWKernel final : public UpdateKernel {
 public:
  /// A parameter that the step updates. Dense, of float, bfloat16 or float16.
  struct Target {
    at::Tensor parameter;
    OrderedReader gradient;
    const AdamWHyper* hyper = nullptr;
    std::uint32_t ordinal = 0;  ///< For RoundingNoise.
    std::uint64_t left = 0;     ///< Elements that are not updated yet.
  };
  using MakeScratch = std::function<std::span<std::byte>()>;

  /// Scratch is asked for when it is first needed.
  AdamWKernel(StateFormat format, std::uint64_t seed, MakeScratch make_scratch)
      : format_(format), seed_(seed), make_scratch_(std::move(make_scratch)) {}

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
    at::get_num_threads();  // PyTorch sets its number at its first use.
    if (omp_set_num_threads != nullptr) omp_set_num_threads(1);
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const Target& target = target_of(segment);
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

  bool in_place(const Target& target) const {
    return format_ == StateFormat::kExact && target.parameter.is_cpu() &&
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
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk = scratch.chunk();
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      const std::uint64_t first = segment.first + done;
      AdamWRun run;
      run.first = first;
      run.count = count;
      find_gradient(target, scratch, run);
      const at::Tensor& parameter = target.parameter;
      const at::Tensor here =
          host_part(parameter, first, count, scratch.staging());
      if (format_ == StateFormat::kExact) {
        update_exact(segment, done, run, here, scratch);
      } else {
        update_packed(segment, done, run, here, target, scratch);
      }
      if (!parameter.is_cpu()) {
        storage_view(parameter, first, count).copy_(here);
      }
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
    update_adamw(format_, run, coefficients(*target.hyper, segment.step),
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
  std::mutex targets_mutex_;
  std::unordered_map<std::size_t, Target> targets_;
  const AdamWHyper* batch_hyper_ = nullptr;
  std::vector<at::Tensor> parameters_, gradients_, exp_avgs_, exp_avg_sqs_;
  std::vector<at::Tensor> steps_;
  at::Tensor step_tensor_;
  std::uint64_t step_tensor_of_ = 0;
};

}  // namespace torch_ext
