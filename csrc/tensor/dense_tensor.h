#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <span>
#include <vector>

namespace torch_ext {

/// Options of a tensor in host memory. Each tensor here names its dtype, so
/// that the caller's default dtype decides nothing.
inline at::TensorOptions host_options(c10::ScalarType dtype) {
  return at::TensorOptions().dtype(dtype).device(at::kCPU);
}

/// A 1-D tensor over `count` elements of host memory that it does not own.
inline at::Tensor host_view(void* data, std::uint64_t count,
                            c10::ScalarType dtype) {
  return at::from_blob(data, {static_cast<std::int64_t>(count)},
                       host_options(dtype));
}

/// With so many elements in a call, PyTorch does not wake its other threads.
/// Where these compete with I/O and data loaders, waiting for them takes longer
/// than the work.
constexpr std::int64_t kQuietPiece = 16384;

/// Calls `to.copy_(from)` in such pieces, for tensors of the same shape on the
/// CPU.
inline void copy_in_pieces(const at::Tensor& to, const at::Tensor& from) {
  if (to.numel() <= kQuietPiece) {
    to.copy_(from);
    return;
  }
  std::int64_t dim = 0;
  while (to.size(dim) == 1) ++dim;
  const std::int64_t half = to.size(dim) / 2;
  const std::int64_t rest = to.size(dim) - half;
  copy_in_pieces(to.narrow(dim, 0, half), from.narrow(dim, 0, half));
  copy_in_pieces(to.narrow(dim, half, rest), from.narrow(dim, half, rest));
}

/// Converts elements in host memory, in such pieces.
inline void convert(void* to, c10::ScalarType to_dtype, const void* from,
                    c10::ScalarType from_dtype, std::uint64_t count) {
  constexpr std::uint64_t kPiece = kQuietPiece;
  auto* out = static_cast<std::byte*>(to);
  auto* in = static_cast<std::byte*>(const_cast<void*>(from));
  while (count > 0) {
    const std::uint64_t piece = std::min(count, kPiece);
    host_view(out, piece, to_dtype).copy_(host_view(in, piece, from_dtype));
    out += piece * c10::elementSize(to_dtype);
    in += piece * c10::elementSize(from_dtype);
    count -= piece;
  }
}

/// Whether elements of the same index come in the same order in memory. Both
/// tensors have the same shape, and one of them has neither gaps nor overlaps.
inline bool same_order(at::IntArrayRef sizes, at::IntArrayRef a,
                       at::IntArrayRef b) {
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] != 1 && a[i] != b[i]) return false;
  }
  return true;
}

/// A 1-D view of elements [first, first + count), as they lie in memory, of a
/// tensor that has neither gaps nor overlaps.
inline at::Tensor storage_view(const at::Tensor& dense, std::uint64_t first,
                               std::uint64_t count) {
  return at::as_strided(
      dense.detach(), {static_cast<std::int64_t>(count)}, {1},
      dense.storage_offset() + static_cast<std::int64_t>(first));
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

/// Reads a tensor of any strides in the order in which another tensor holds its
/// elements in memory. That one has the same shape, and neither gaps nor
/// overlaps.
class OrderedReader {
 public:
  OrderedReader() = default;

  /// A source that is not on the CPU is copied on its device, if it has another
  /// order.
  OrderedReader(const at::Tensor& source, at::IntArrayRef strides)
      : source_(source.detach().resolve_neg()),
        in_order_(same_order(source.sizes(), source_.strides(), strides)) {
    if (in_order_) return;
    if (!source_.is_cpu()) {
      const at::Tensor copy =
          at::empty_strided(source_.sizes(), strides, source_.options());
      source_ = copy.copy_(source_);
      in_order_ = true;
      return;
    }
    std::vector<std::size_t> dims(source_.sizes().size());
    std::iota(dims.begin(), dims.end(), 0);
    std::stable_sort(
        dims.begin(), dims.end(),
        [&](std::size_t a, std::size_t b) { return strides[a] > strides[b]; });
    for (const std::size_t dim : dims) {
      if (source_.sizes()[dim] == 1) continue;
      sizes_.push_back(source_.sizes()[dim]);
      strides_.push_back(source_.strides()[dim]);
    }
  }

  const at::Tensor& source() const { return source_; }

  /// Whether pointer() can be used: on the CPU, in order.
  bool direct() const { return in_order_ && source_.is_cpu(); }

  void* pointer(std::uint64_t first) const {
    return static_cast<std::byte*>(
               const_cast<void*>(source_.const_data_ptr())) +
           first * item_size();
  }

  /// As pointer(), to write there. The source counts as changed.
  std::byte* writable_pointer(std::uint64_t first) const {
    if (!source_.is_inference()) {
      source_.unsafeGetTensorImpl()->bump_version();
    }
    return static_cast<std::byte*>(source_.mutable_data_ptr()) +
           first * item_size();
  }

  /// Copies elements [first, first + count) to host memory, in the source's own
  /// dtype. Returns when the copy is made.
  void copy_to(std::byte* out, std::uint64_t first, std::uint64_t count) const {
    if (direct()) {
      std::memcpy(out, pointer(first), count * item_size());
    } else if (in_order_) {
      host_view(out, count, source_.scalar_type())
          .copy_(storage_view(source_, first, count));
    } else {
      gather(out, first, count);
    }
  }

  /// As copy_to(), but converts to `dtype`. `raw` is host memory for some
  /// elements of the source, for the time of the call.
  void copy_as(void* to, c10::ScalarType dtype, std::span<std::byte> raw,
               std::uint64_t first, std::uint64_t count) const {
    const c10::ScalarType own = source_.scalar_type();
    auto* out = static_cast<std::byte*>(to);
    if (own == dtype) {
      copy_to(out, first, count);
    } else if (direct()) {
      convert(out, dtype, pointer(first), own, count);
    } else {
      while (count > 0) {
        const std::uint64_t piece =
            std::min<std::uint64_t>(count, raw.size() / item_size());
        copy_to(raw.data(), first, piece);
        convert(out, dtype, raw.data(), own, piece);
        out += piece * c10::elementSize(dtype);
        first += piece;
        count -= piece;
      }
    }
  }

  void copy_as_float(float* out, std::span<std::byte> raw, std::uint64_t first,
                     std::uint64_t count) const {
    copy_as(out, at::kFloat, raw, first, count);
  }

  /// Writes elements to the source, which has its memory still. `from` has the
  /// source's dtype, and is in host memory.
  void write(const std::byte* from, std::uint64_t first,
             std::uint64_t count) const {
    if (direct()) {
      // Not by torch, which would share this out to threads and wait for them.
      std::memcpy(writable_pointer(first), from, count * item_size());
      return;
    }
    if (in_order_) {
      storage_view(source_, first, count)
          .copy_(host_view(const_cast<std::byte*>(from), count,
                           source_.scalar_type()));
      return;
    }
    visit(first, count, [&, item = item_size()](std::byte* element) {
      std::memcpy(element, from, item);
      from += item;
    });
  }

 private:
  std::size_t item_size() const { return source_.dtype().itemsize(); }

  void gather(std::byte* out, std::uint64_t first, std::uint64_t count) const {
    visit(first, count, [&, item = item_size()](const std::byte* element) {
      std::memcpy(out, element, item);
      out += item;
    });
  }

  // Counts through the indexes like an odometer, the last dimension fastest.
  template <typename Visit>
  void visit(std::uint64_t first, std::uint64_t count,
             const Visit& element) const {
    const auto item = static_cast<std::int64_t>(item_size());
    auto* base = static_cast<std::byte*>(pointer(0));
    std::vector<std::int64_t> index(sizes_.size());
    auto rest = static_cast<std::int64_t>(first);
    std::int64_t at = 0;
    for (std::size_t d = sizes_.size(); d-- > 0; rest /= sizes_[d]) {
      index[d] = rest % sizes_[d];
      at += index[d] * strides_[d];
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      element(base + at * item);
      for (std::size_t d = sizes_.size(); d-- > 0;) {
        at += strides_[d];
        if (++index[d] < sizes_[d]) break;
        at -= sizes_[d] * strides_[d];
        index[d] = 0;
      }
    }
  }

  at::Tensor source_;
  bool in_order_ = true;
  std::vector<std::int64_t> sizes_;  ///< Slowest dimension first.
  std::vector<std::int64_t> strides_;
};

/// Copies elements [first, first + count) of some tensor to host memory, as
/// `dtype`. `raw`: memory for the time of the call. The order is agreed on.
using ReadElements = std::function<void(
    void* to, c10::ScalarType dtype, std::span<std::byte> raw,
    std::uint64_t first, std::uint64_t count)>;

/// Reads a tensor in the order that `strides` have.
inline ReadElements read_in_order(const at::Tensor& source,
                                  at::IntArrayRef strides) {
  return [reader = OrderedReader(source, strides)](
             void* to, c10::ScalarType dtype, std::span<std::byte> raw,
             std::uint64_t first, std::uint64_t count) {
    reader.copy_as(to, dtype, raw, first, count);
  };
}

}  // namespace torch_ext
