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

/// Host memory for a chunk of elements on their way.
class AdamWScratch {
 public:
  explicit AdamWScratch(std::span<std::byte> memory)
      : small_(
            memory.first(align_down(std::min(memory.size() / 3, kSmall), 64))),
        large_(memory.subspan(small_.size())) {}

  /// For what is needed for a moment only.
  std::span<std::byte> small() const { return small_; }

  /// Elements of a chunk, whose gradients take half of the rest if the
  /// parameter is on another device, else all of it.
  std::uint64_t chunk(bool on_host) const {
    return align_down(large_.size() / (on_host ? 4 : 8), StateSegment::kCut);
  }
  float* gradient() const { return reinterpret_cast<float*>(large_.data()); }
  /// The other half: parameters from a device.
  std::span<std::byte> staging() const {
    return large_.subspan(chunk(/*on_host=*/false) * 4);
  }

 private:
  static constexpr std::size_t kSmall = std::size_t{128} << 10;
  std::span<std::byte> small_;
  std::span<std::byte> large_;
};

/// Makes `master`, `count` floats, agree with a bfloat16 or float16 parameter
/// in host memory, whose word is final: an element that does not round to the
/// parameter's takes its value. So whatever writes to the parameter between
/// steps (model.load_state_dict, zero_, clamp_) counts.
/// `memory` is host memory for some such elements.
inline void adopt_parameter(float* master, const void* parameter,
                            std::span<std::byte> memory, std::uint64_t count,
                            c10::ScalarType dtype) {
  const auto* ours = reinterpret_cast<const std::uint16_t*>(memory.data());
  const auto* theirs = static_cast<const std::uint16_t*>(parameter);
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t piece =
        std::min<std::uint64_t>(memory.size() / 2, count - done);
    convert(memory.data(), dtype, master + done, at::kFloat, piece);
    if (std::memcmp(memory.data(), theirs + done, 2 * piece) != 0) {
      for (std::uint64_t i = 0; i < piece; ++i) {
        const std::uint16_t bits = theirs[done + i];
        if (ours[i] == bits) continue;
        master[done + i] =
            dtype == at::kHalf
                ? static_cast<float>(c10::Half(bits, c10::Half::from_bits()))
                : static_cast<float>(
                      c10::BFloat16(bits, c10::BFloat16::from_bits()));
      }
    }
    done += piece;
  }
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
    const std::uint64_t chunk = scratch.chunk(target.parameter.is_cpu());
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      update_chunk(segment, done, std::min(chunk, segment.count - done), target,
                   scratch);
    }
  }

  void update_chunk(const StateSegment& segment, std::uint64_t done,
                    std::uint64_t count, const Target& target,
                    const AdamWScratch& scratch) {
    const std::uint64_t first = segment.first + done;
    const at::Tensor& parameter = target.parameter;
    // Gradients from a device pass through where the parameter comes next.
    target.gradient.copy_as_float(
        scratch.gradient(),
        parameter.is_cpu() ? scratch.small() : scratch.staging(), first, count);
    const at::Tensor here =
        host_part(parameter, first, count, scratch.staging());
    const c10::ScalarType dtype = here.scalar_type();
    if (dtype == at::kFloat) {
      push(segment, done, count, here.mutable_data_ptr<float>(),
           scratch.gradient());
      flush();
    } else {
      float* master = segment.fields[2] + done;
      adopt_parameter(master, here.const_data_ptr(), scratch.small(), count,
                      dtype);
      push(segment, done, count, master, scratch.gradient());
      flush();
      convert(here.mutable_data_ptr(), dtype, master, at::kFloat, count);
    }
    if (!parameter.is_cpu()) storage_view(parameter, first, count).copy_(here);
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
