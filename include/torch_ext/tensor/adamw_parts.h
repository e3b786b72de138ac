#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/dense_tensor.h"

namespace torch_ext {

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

/// As which a gradient is copied from a device: what the update takes.
inline c10::ScalarType dtype_on_host(c10::ScalarType gradient,
                                     StateFormat format) {
  const bool as_it_is =
      format != StateFormat::kExact && gradient == at::kBFloat16;
  return as_it_is ? gradient : at::kFloat;
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

/// A part of a run that ends at the run's end or at a multiple of
/// StateFields::kCut, as it begins.
inline AdamWRun part_of(const AdamWRun& run, StateFormat format,
                        std::uint64_t done, std::uint64_t count) {
  const auto moment = [&](const Moment& whole) {
    const std::uint64_t bytes = format == StateFormat::kBf16 ? 2 : 1;
    return Moment{whole.values + bytes * done,
                  whole.scales == nullptr
                      ? nullptr
                      : whole.scales + done / StateFields::kCut};
  };
  const auto at = [done](auto* pointer) {
    return pointer == nullptr ? nullptr : pointer + done;
  };
  AdamWRun part;
  part.first = run.first + done;
  part.count = count;
  part.exp_avg = moment(run.exp_avg);
  part.exp_avg_sq = moment(run.exp_avg_sq);
  part.gradient = at(run.gradient);
  part.gradient_bf16 = at(run.gradient_bf16);
  part.master = at(run.master);
  part.parameter_bf16 = at(run.parameter_bf16);
  part.low = at(run.low);
  return part;
}

/// Calls `work` for each number below `parts`, on the calling thread and, as
/// far as they come in time, on those of PyTorch's inter-op pool: all in all on
/// as many as PyTorch has for an operator of the calling thread. (Of
/// at::parallel_for() a caller that is built without OpenMP gets one.)
/// `work` does not throw.
template <typename Work>
void run_in_parallel(std::size_t parts, const Work& work) {
  struct Shared {
    std::atomic<std::size_t> next = 0;
    std::atomic<std::size_t> done = 0;
  };
  const auto shared = std::make_shared<Shared>();
  // Who comes late finds nothing to do, and no `work` any more.
  const auto help = [shared, parts, &work] {
    for (std::size_t i = shared->next++; i < parts; i = shared->next++) {
      work(i);
      if (++shared->done == parts) shared->done.notify_all();
    }
  };
  const auto threads = static_cast<std::size_t>(at::get_num_threads());
  for (std::size_t i = 1; i < std::min(threads, parts); ++i) at::launch(help);
  help();
  for (std::size_t done = shared->done; done < parts; done = shared->done) {
    shared->done.wait(done);
  }
}

/// update_adamw() by run_in_parallel().
inline void update_in_parallel(StateFormat format, const AdamWRun& run,
                               const AdamWCoefficients& with,
                               const RoundingNoise& noise) {
  // Much longer than it takes to wake a thread.
  constexpr std::uint64_t kPart = 128 * StateFields::kCut;
  run_in_parallel((run.count + kPart - 1) / kPart, [&](std::size_t i) {
    const std::uint64_t done = i * kPart;
    const std::uint64_t count = std::min(kPart, run.count - done);
    update_adamw(format, part_of(run, format, done, count), with, noise);
  });
}

}  // namespace torch_ext
