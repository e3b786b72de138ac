#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <unordered_map>
#include <vector>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/dense_tensor.h"

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

/// Host memory for one chunk of elements on its way.
class AdamWScratch {
 public:
  static constexpr std::uint64_t kBytesPerElement = 12;

  explicit AdamWScratch(std::span<std::byte> memory)
      : chunk_(
            align_down(memory.size() / kBytesPerElement, StateSegment::kCut)),
        memory_(memory.data()) {}

  std::uint64_t chunk() const { return chunk_; }  ///< Elements.
  float* gradient() const { return reinterpret_cast<float*>(memory_); }
  /// The parameter: as float, or twice in 16 bits.
  std::byte* parameter() const { return memory_ + 4 * chunk_; }
  std::byte* rounded() const { return memory_ + 6 * chunk_; }
  std::byte* raw() const { return memory_ + 8 * chunk_; }
  std::byte* all() const { return memory_; }  ///< In place of the others.

 private:
  std::uint64_t chunk_;
  std::byte* memory_;
};

/// Makes `master`, `count` floats, agree with a bfloat16 or float16 parameter
/// in host memory, whose word is final: an element that does not round to the
/// parameter's takes its value. So whatever writes to the parameter between
/// steps (model.load_state_dict, zero_, clamp_) counts.
/// `rounded` is host memory for `count` such elements.
inline void adopt_parameter(float* master, const void* parameter,
                            std::byte* rounded, std::uint64_t count,
                            c10::ScalarType dtype) {
  host_view(rounded, count, dtype).copy_(host_view(master, count, at::kFloat));
  if (std::memcmp(rounded, parameter, 2 * count) == 0) return;
  const auto* ours = reinterpret_cast<const std::uint16_t*>(rounded);
  const auto* theirs = static_cast<const std::uint16_t*>(parameter);
  for (std::uint64_t i = 0; i < count; ++i) {
    if (ours[i] == theirs[i]) continue;
    master[i] =
        dtype == at::kHalf
            ? static_cast<float>(c10::Half(theirs[i], c10::Half::from_bits()))
            : static_cast<float>(
                  c10::BFloat16(theirs[i], c10::BFloat16::from_bits()));
  }
}

/// Elements of a dense parameter as a tensor in host memory: in place on the
/// CPU, else copied to scratch.parameter().
inline at::Tensor host_part(const at::Tensor& parameter, std::uint64_t first,
                            std::uint64_t count, const AdamWScratch& scratch) {
  const at::Tensor there = storage_view(parameter, first, count);
  if (parameter.is_cpu()) return there;
  const at::Tensor here =
      host_view(scratch.parameter(), count, parameter.scalar_type());
  return here.copy_(there);
}

/// AdamW by PyTorch's own fused CPU kernel. Fields of the state are exp_avg,
/// exp_avg_sq and, for parameters of 16 bits, the master in float.
///
/// float parameters on the CPU are updated in place, bit for bit as
/// torch.optim.AdamW(fused=True) does. Others go through scratch memory, chunk
/// by chunk: on another device they, and the gradients, are copied to the host
/// and back; those of 16 bits are rounded from the master.
class AdamWKernel final : public UpdateKernel {
 public:
  /// A parameter that the step updates. Dense, of float, bfloat16 or float16.
  struct Target {
    at::Tensor parameter;
    OrderedReader gradient;
    const AdamWHyper* hyper = nullptr;
  };
  using MakeScratch = std::function<std::span<std::byte>()>;

  /// Scratch is asked for when it is first needed.
  explicit AdamWKernel(MakeScratch make_scratch)
      : make_scratch_(std::move(make_scratch)) {}

  void add(std::size_t parameter, Target target) {
    targets_.insert_or_assign(parameter, std::move(target));
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const Target& target = targets_.at(segment.parameter);
      if (batch_hyper_ != target.hyper) flush();
      batch_hyper_ = target.hyper;
      if (in_place(target)) {
        push(segment, 0, segment.count, parameter_at(target, segment.first),
             static_cast<float*>(target.gradient.pointer(segment.first)));
      } else {
        update_by_chunks(segment, target);
      }
    }
    flush();
  }

 private:
  static bool in_place(const Target& target) {
    return target.parameter.is_cpu() &&
           target.parameter.scalar_type() == at::kFloat &&
           target.gradient.direct() &&
           target.gradient.source().scalar_type() == at::kFloat;
  }

  static float* parameter_at(const Target& target, std::uint64_t first) {
    return target.parameter.mutable_data_ptr<float>() + first;
  }

  void update_by_chunks(const StateSegment& segment, const Target& target) {
    flush();
    batch_hyper_ = target.hyper;
    const AdamWScratch scratch(make_scratch_());
    for (std::uint64_t done = 0; done < segment.count;) {
      const std::uint64_t count =
          std::min(scratch.chunk(), segment.count - done);
      const std::uint64_t first = segment.first + done;
      target.gradient.copy_as_float(scratch.gradient(), scratch.raw(), first,
                                    count);
      if (target.parameter.scalar_type() == at::kFloat) {
        update_float(segment, done, count, target, scratch);
      } else {
        update_half(segment, done, count, target, scratch);
      }
      done += count;
    }
  }

  void update_float(const StateSegment& segment, std::uint64_t done,
                    std::uint64_t count, const Target& target,
                    const AdamWScratch& scratch) {
    const std::uint64_t first = segment.first + done;
    const at::Tensor here = host_part(target.parameter, first, count, scratch);
    push(segment, done, count, here.mutable_data_ptr<float>(),
         scratch.gradient());
    flush();
    put_back(here, target.parameter, first, count);
  }

  void update_half(const StateSegment& segment, std::uint64_t done,
                   std::uint64_t count, const Target& target,
                   const AdamWScratch& scratch) {
    const std::uint64_t first = segment.first + done;
    const at::Tensor here = host_part(target.parameter, first, count, scratch);
    float* master = segment.fields[2] + done;
    adopt_parameter(master, here.const_data_ptr(), scratch.rounded(), count,
                    here.scalar_type());
    push(segment, done, count, master, scratch.gradient());
    flush();
    here.copy_(host_view(master, count, at::kFloat));
    put_back(here, target.parameter, first, count);
  }

  static void put_back(const at::Tensor& here, const at::Tensor& parameter,
                       std::uint64_t first, std::uint64_t count) {
    if (parameter.is_cpu()) return;
    storage_view(parameter, first, count).copy_(here);
  }

  /// Adds a tensor to the next call of the fused kernel.
  void push(const StateSegment& segment, std::uint64_t done,
            std::uint64_t count, float* parameter, float* gradient) {
    parameters_.push_back(host_view(parameter, count, at::kFloat));
    gradients_.push_back(host_view(gradient, count, at::kFloat));
    exp_avgs_.push_back(host_view(segment.fields[0] + done, count, at::kFloat));
    exp_avg_sqs_.push_back(
        host_view(segment.fields[1] + done, count, at::kFloat));
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

  const MakeScratch make_scratch_;
  std::unordered_map<std::size_t, Target> targets_;
  const AdamWHyper* batch_hyper_ = nullptr;
  std::vector<at::Tensor> parameters_, gradients_, exp_avgs_, exp_avg_sqs_;
  std::vector<at::Tensor> steps_;
  at::Tensor step_tensor_;
  std::uint64_t step_tensor_of_ = 0;
};

}  // namespace torch_ext
