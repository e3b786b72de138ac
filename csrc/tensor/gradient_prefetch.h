#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <c10/core/GradMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../base/mutex.h"
#include "copy_stream.h"
#include "dense_tensor.h"
#include "torch_ext/base/align.h"

namespace torch_ext {

/// Sums of a dense 1-D tensor's bits as integers, on its device. For each 2^20
/// elements there is a plain sum, and a sum with the elements' numbers as
/// factors. Scaling changes the first, also scaling by powers of two, which
/// only adds to exponents. Moving elements changes the second; so does negating
/// them, where signs are balanced.
inline at::Tensor sums_of_bits(const at::Tensor& flat) {
  constexpr std::int64_t kBlock = std::int64_t{1} << 20;
  const at::Tensor bits =
      flat.view(flat.element_size() == 2 ? at::kShort : at::kInt);
  const std::int64_t count = bits.numel();
  const at::Tensor numbers =
      at::arange(1, std::min(count, kBlock) + 1,
                 at::TensorOptions().dtype(at::kLong).device(flat.device()));
  std::vector<at::Tensor> sums;
  for (std::int64_t done = 0; done < count; done += kBlock) {
    const std::int64_t length = std::min(kBlock, count - done);
    const at::Tensor block = bits.narrow(0, done, length).to(at::kLong);
    sums.push_back(at::sum(block));
    sums.push_back(at::sum(block.mul_(numbers.narrow(0, 0, length))));
  }
  return at::stack(sums);
}

/// Gradients on devices that were copied to the host while backward went on,
/// for a step that updates there.
///
/// A copy counts only if the step's gradient is the one that was copied, and
/// has not changed. It must have the same storage and version, and its bits
/// must have the same sums. The sums also show what a version does not
/// (`.data`, a GradScaler, a collective's kernel). The step copies all other
/// gradients again.
///
/// Memory: copies lie one after the other in the memory that bring() gets, in
/// the order in which their gradients first came. Without room, no copy is
/// made. Gradients are not kept alive. On the device, the sums of a copy take
/// 16 MiB for a moment. Errors: StateError with what a device says. Threads:
/// any.
class GradientPrefetch {
 public:
  /// A gradient whose elements lie in memory as its parameter's do.
  struct Wanted {
    std::size_t number = 0;
    at::Tensor gradient;
  };

  /// How many bytes of bring()'s memory a copy of a parameter's gradient takes.
  /// For a DTensor, `part` is this process's part. Frozen ones may be anything.
  static std::uint64_t room_for(const at::Tensor& parameter,
                                const at::Tensor& part) {
    if (!parameter.requires_grad() || !parameter.is_leaf() || part.is_cpu()) {
      return 0;
    }
    const c10::ScalarType dtype = parameter.grad_dtype().value_or(at::kFloat);
    return room_for(static_cast<std::uint64_t>(part.numel()) *
                    c10::elementSize(dtype));
  }

  /// Queues a copy into `memory`, which is the same in each call. It comes
  /// after what the calling thread has queued so far on the gradient's device.
  void bring(const Wanted& wanted, CopyStream& stream,
             std::span<std::byte> memory) {
    const at::Tensor& gradient = wanted.gradient;
    if (gradient.is_inference() || gradient.is_neg() || gradient.numel() == 0) {
      return;
    }
    const c10::NoGradGuard no_grad;
    const MutexLock lock(mutex_);
    Copy& copy = copies_[wanted.number];
    copy.source.reset();
    const auto count = static_cast<std::uint64_t>(gradient.numel());
    const std::uint64_t bytes = count * gradient.dtype().itemsize();
    if (copy.memory.size() < bytes) {
      if (memory.size() - used_ < bytes) return;
      copy.memory = memory.subspan(used_, bytes);
      used_ += std::min(room_for(bytes), memory.size() - used_);
    }
    copy.bytes = bytes;
    const at::Tensor flat = storage_view(gradient, 0, count);
    stream.after(*stream.now());
    stream.queue([&] {
      host_view(copy.memory.data(), count, flat.scalar_type())
          .copy_(flat, /*non_blocking=*/true);
      stream.uses(flat);
    });
    stream.guarded([&] { copy.sums = sums_of_bits(flat); });
    copy.offset = gradient.storage_offset();
    copy.dtype = gradient.scalar_type();
    copy.version = version_of(gradient);
    copy.source = gradient.storage().getWeakStorageImpl();
  }

  /// Returns where each gradient's copy is, or null. A copy is handed out once.
  /// It is made when work that is queued next on its stream is done. Returns
  /// when the work is done that made the gradients.
  std::vector<std::byte*> claim(const std::vector<Wanted>& all) {
    const c10::NoGradGuard no_grad;
    const MutexLock lock(mutex_);
    std::vector<std::byte*> found(all.size(), nullptr);
    std::vector<std::size_t> candidates;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto copy = copies_.find(all[i].number);
      if (copy == copies_.end() || !is_of(copy->second, all[i])) continue;
      found[i] = copy->second.memory.data();
      candidates.push_back(i);
    }
    while (!candidates.empty()) {
      drop_changed(all, candidates, found);
    }
    forget();
    return found;
  }

  /// Forgets all copies.
  void clear() {
    const MutexLock lock(mutex_);
    forget();
  }

 private:
  struct Copy {
    std::span<std::byte> memory;
    std::uint64_t bytes = 0;  ///< How much of it is used.
    /// The gradient's storage, while the copy may be claimed.
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> source;
    std::int64_t offset = 0;
    std::int64_t version = 0;
    c10::ScalarType dtype = at::kFloat;
    at::Tensor sums;
  };

  static std::uint64_t room_for(std::uint64_t bytes) {
    return align_up(bytes, 64);
  }

  static std::int64_t version_of(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }

  static bool is_of(const Copy& copy, const Wanted& wanted) {
    const at::Tensor& gradient = wanted.gradient;
    return copy.source && !gradient.is_inference() &&
           copy.source->lock().get() ==
               gradient.storage().unsafeGetStorageImpl() &&
           !gradient.is_neg() && copy.offset == gradient.storage_offset() &&
           copy.dtype == gradient.scalar_type() &&
           copy.version == version_of(gradient) &&
           copy.bytes == static_cast<std::uint64_t>(gradient.numel()) *
                             gradient.dtype().itemsize();
  }

  /// Compares the candidates on the device of the first, and takes them off the
  /// list.
  void drop_changed(const std::vector<Wanted>& all,
                    std::vector<std::size_t>& candidates,
                    std::vector<std::byte*>& found) REQUIRES(mutex_) {
    const c10::Device device = all[candidates.front()].gradient.device();
    std::vector<std::size_t> here;
    std::vector<at::Tensor> equal;
    std::vector<std::size_t> elsewhere;
    for (const std::size_t i : candidates) {
      const at::Tensor& gradient = all[i].gradient;
      if (gradient.device() != device) {
        elsewhere.push_back(i);
        continue;
      }
      const at::Tensor now = sums_of_bits(storage_view(
          gradient, 0, static_cast<std::uint64_t>(gradient.numel())));
      here.push_back(i);
      equal.push_back(now.eq(copies_.at(all[i].number).sums).all());
    }
    candidates = std::move(elsewhere);
    const at::Tensor answers = at::stack(equal).to(at::kCPU);
    for (std::size_t i = 0; i < here.size(); ++i) {
      if (!answers.const_data_ptr<bool>()[i]) found[here[i]] = nullptr;
    }
  }

  void forget() REQUIRES(mutex_) {
    for (auto& [number, copy] : copies_) {
      copy.source.reset();
      copy.sums = at::Tensor();
    }
  }

  Mutex mutex_;
  std::unordered_map<std::size_t, Copy> copies_ GUARDED_BY(mutex_);
  std::uint64_t used_ GUARDED_BY(mutex_) = 0;
};

}  // namespace torch_ext
