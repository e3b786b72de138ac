#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>

#include "adamw_hyper.h"
#include "dense_tensor.h"
#include "one_thread.h"
#include "state_layout.h"
#include "torch_ext/base/process.h"
#include "torch_ext/optim/adamw_update.h"
#include "torch_ext/optim/state_format.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// Makes `master`, `count` floats, agree with a float16 parameter in host
/// memory. An element that does not round to the parameter's element takes its
/// value. So whatever writes to the parameter between steps
/// (model.load_state_dict, zero_, clamp_) counts.
inline void adopt_parameter(float* master, const c10::Half* parameter,
                            std::uint64_t count) {
  constexpr std::uint64_t kPiece = 4096;
  std::array<std::uint16_t, kPiece> ours;
  for (std::uint64_t done = 0; done < count;) {
    const std::uint64_t piece = std::min(kPiece, count - done);
    convert(ours.data(), at::kHalf, master + done, at::kFloat, piece);
    if (std::memcmp(ours.data(), parameter + done, 2 * piece) != 0) {
      for (std::uint64_t i = 0; i < piece; ++i) {
        const c10::Half theirs = parameter[done + i];
        if (ours[i] != theirs.x) master[done + i] = static_cast<float>(theirs);
      }
    }
    done += piece;
  }
}

/// Where a moment of a segment begins, at element `done` of the segment, a
/// multiple of StateFields::kCut.
inline Moment moment_at(const StateSegment& segment, StateFormat format,
                        std::size_t field, std::uint64_t done) {
  if (format == StateFormat::kBf16) return {segment.fields[field] + 2 * done};
  const std::size_t scales = field == AdamWFields::kExpAvg
                                 ? AdamWFields::kExpAvgScale
                                 : AdamWFields::kExpAvgSqScale;
  return {segment.fields[field] + done,
          segment.fields[scales] + done / StateFields::kCut};
}

/// The coefficients of a step with these numbers.
inline AdamWCoefficients coefficients(const AdamWHyper& hyper,
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

/// Returns elements of a dense parameter as a tensor in host memory. On the CPU
/// it is a view of them; otherwise they are copied to `staging`.
inline at::Tensor host_part(const at::Tensor& parameter, std::uint64_t first,
                            std::uint64_t count, std::span<std::byte> staging) {
  const at::Tensor there = storage_view(parameter, first, count);
  if (parameter.is_cpu()) return there;
  const at::Tensor here =
      host_view(staging.data(), count, parameter.scalar_type());
  return here.copy_(there);
}

/// Calls `work` for each number below `parts`, on `threads` threads in all.
/// They are the calling thread and, as far as they come in time, those of
/// PyTorch's inter-op pool. Throws what `work` has thrown first, when all is
/// done.
template <typename Work>
void run_in_parallel(std::size_t threads, std::size_t parts, const Work& work) {
  struct Shared {
    std::atomic<std::size_t> next = 0;
    std::atomic<std::size_t> done = 0;
    std::atomic_flag failed;
    std::exception_ptr error;
  };
  const auto shared = std::make_shared<Shared>();
  // A thread that comes late finds nothing to do. `work` is gone then.
  const auto help = [shared, parts, &work] {
    for (std::size_t i = shared->next++; i < parts; i = shared->next++) {
      try {
        const OneThread here;
        work(i);
      } catch (...) {
        if (!shared->failed.test_and_set()) {
          shared->error = std::current_exception();
        }
      }
      if (++shared->done == parts) shared->done.notify_all();
    }
  };
  // The pool of a forked child has no threads, and waking them may take for
  // ever.
  if (is_forked_child()) threads = 1;
  try {
    for (std::size_t i = 1; i < std::min(threads, parts); ++i) at::launch(help);
  } catch (...) {
    // There is no more help. This thread can do all of it.
  }
  help();
  for (std::size_t done = shared->done; done < parts; done = shared->done) {
    shared->done.wait(done);
  }
  if (shared->error != nullptr) std::rethrow_exception(shared->error);
}

}  // namespace torch_ext
