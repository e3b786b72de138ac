#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "adamw_hyper.h"
#include "dense_tensor.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// The bits of 16-bit numbers as integers from 0 to 0xffff.
inline at::Tensor bits16(const at::Tensor& numbers) {
  return numbers.view(at::kShort).to(at::kInt).bitwise_and(0xffff);
}

/// As the core's join_master(), for tensors on one device. `low` is of int16.
inline at::Tensor join_on_device(const at::Tensor& parameter,
                                 const at::Tensor& low) {
  const at::Tensor upper = bits16(parameter);
  const at::Tensor lower = low.to(at::kInt).bitwise_and(0xffff);
  const at::Tensor ties = lower.bitwise_right_shift(15);
  const at::Tensor own = upper.bitwise_left_shift(16);
  const at::Tensor joined =
      upper.sub(ties).bitwise_left_shift(16).bitwise_or(lower);
  const at::Tensor magnitude = upper.bitwise_and(0x7fff);
  const at::Tensor impossible =
      magnitude.eq(0)
          .logical_and(lower.ge(0x8000))
          .logical_or(magnitude.eq(0x7f80)
                          .logical_and(lower.gt(0))
                          .logical_and(lower.lt(0x8000)));
  return at::where(impossible, own, joined)
      .masked_fill_(magnitude.gt(0x7f80), 0x7fc00000)
      .view(at::kFloat);
}

/// As the core's split_master(). Returns the upper and the lower half, as
/// int16.
inline std::pair<at::Tensor, at::Tensor> split_on_device(
    const at::Tensor& master) {
  const at::Tensor bits = master.view(at::kInt);
  const at::Tensor magnitude = bits.bitwise_and(0x7fffffff);
  const at::Tensor is_nan = magnitude.gt(0x7f800000);
  const at::Tensor upper =
      magnitude.add(0x8000)
          .bitwise_right_shift(16)
          .bitwise_or(bits.bitwise_right_shift(16).bitwise_and(0x8000))
          .masked_fill_(is_nan, 0x7fc0);
  const at::Tensor lower = bits.bitwise_and(0xffff).masked_fill_(is_nan, 0);
  return {upper.to(at::kShort), lower.to(at::kShort)};
}

/// AdamW by PyTorch's fused kernel on a parameter's own device. State, which is
/// float, is copied there and back. All is queued on the current stream. The
/// host may look at the state when that is done.
class FusedOnDevice {
 public:
  /// Adds a segment. Parameter and gradient are 1-D views, on the device, of
  /// its elements.
  void add(const StateSegment& segment, const AdamWHyper& hyper,
           const at::Tensor& parameter, const at::Tensor& gradient) {
    if (hyper_ != &hyper) flush();
    hyper_ = &hyper;
    Item item{&segment, parameter, parameter, {}, {}};
    item.exp_avg = bring(segment, AdamWFields::kExpAvg, at::kFloat, parameter);
    item.exp_avg_sq =
        bring(segment, AdamWFields::kExpAvgSq, at::kFloat, parameter);
    if (parameter.scalar_type() == at::kBFloat16) {
      item.master = join_on_device(
          parameter,
          bring(segment, AdamWFields::kMaster, at::kShort, parameter));
    } else if (parameter.scalar_type() == at::kHalf) {
      item.master =
          adopt(bring(segment, AdamWFields::kMaster, at::kFloat, parameter),
                parameter);
    }
    masters_.push_back(item.master);
    gradients_.push_back(gradient.to(at::kFloat));
    exp_avgs_.push_back(item.exp_avg);
    exp_avg_sqs_.push_back(item.exp_avg_sq);
    steps_.push_back(at::full({}, static_cast<double>(segment.step),
                              gradient.options().dtype(at::kFloat)));
    items_.push_back(std::move(item));
  }

  void flush() {
    if (items_.empty()) return;
    at::_fused_adamw_(masters_, gradients_, exp_avgs_, exp_avg_sqs_, {}, steps_,
                      hyper_->lr, hyper_->beta1, hyper_->beta2,
                      hyper_->weight_decay, hyper_->eps, /*amsgrad=*/false,
                      hyper_->maximize);
    for (const Item& item : items_) take_back(item);
    items_.clear();
    for (auto* list :
         {&masters_, &gradients_, &exp_avgs_, &exp_avg_sqs_, &steps_}) {
      list->clear();
    }
  }

 private:
  struct Item {
    const StateSegment* segment;
    at::Tensor parameter;
    at::Tensor master;  ///< The parameter itself, if that is float.
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
  };

  static at::Tensor here(const StateSegment& segment, std::size_t field,
                         c10::ScalarType dtype) {
    return host_view(segment.fields[field], segment.count, dtype);
  }

  static at::Tensor bring(const StateSegment& segment, std::size_t field,
                          c10::ScalarType dtype, const at::Tensor& like) {
    return here(segment, field, dtype)
        .to(like.device(), dtype, /*non_blocking=*/true);
  }

  /// As adopt_parameter(): returns the parameter where the master does not
  /// round to it.
  static at::Tensor adopt(const at::Tensor& master,
                          const at::Tensor& parameter) {
    const at::Tensor differs =
        bits16(master.to(at::kHalf)).ne(bits16(parameter));
    return at::where(differs, parameter.to(at::kFloat), master);
  }

  static void take_back(const Item& item) {
    const StateSegment& segment = *item.segment;
    const auto copy = [&](std::size_t field, const at::Tensor& from) {
      here(segment, field, from.scalar_type())
          .copy_(from, /*non_blocking=*/true);
    };
    copy(AdamWFields::kExpAvg, item.exp_avg);
    copy(AdamWFields::kExpAvgSq, item.exp_avg_sq);
    if (item.parameter.scalar_type() == at::kBFloat16) {
      const auto [upper, lower] = split_on_device(item.master);
      item.parameter.view(at::kShort).copy_(upper);
      copy(AdamWFields::kMaster, lower);
    } else if (item.parameter.scalar_type() == at::kHalf) {
      item.parameter.copy_(item.master);
      copy(AdamWFields::kMaster, item.master);
    }
  }

  const AdamWHyper* hyper_ = nullptr;
  std::vector<Item> items_;
  std::vector<at::Tensor> masters_, gradients_, exp_avgs_, exp_avg_sqs_;
  std::vector<at::Tensor> steps_;
};

}  // namespace torch_ext
