// Elements of a tensor that a commit has in parts.
//
// Several processes have committed: each has a shard of the tensor, a box of
// it. Whoever asks has a box of his own, the target, and wants its elements in
// the order in which they lie in his memory. Both orders may be any.
//
// The target's dimensions are sorted, the slowest first. Each shard that meets
// the target has, in these dimensions, a range and a stride. Neighbouring
// dimensions become one where all shards have the inner one whole and step
// through both evenly. What is left of the usual divisions, by rows, is one
// dimension; then all is copied in long runs. In any other division a run ends
// with the innermost dimension.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dense_tensor.h"
#include "masters.h"
#include "optim/commit_source.h"
#include "state_layout.h"
#include "torch_ext/optim/adamw_update.h"

namespace torch_ext {

/// A box of a tensor, and the order in which it lies in memory.
struct TensorBox {
  std::vector<std::uint64_t> begin;  ///< In the whole, for each dimension.
  std::vector<std::uint64_t> sizes;
  std::vector<std::uint64_t> order;  ///< Dimensions, the slowest first.
};

/// A part of a parameter that a commit has.
struct CommittedShard {
  std::shared_ptr<CommitSource> source;
  std::size_t slot = 0;
  /// The number of its values in the commit, if that has them.
  std::optional<std::size_t> value = {};
  TensorBox box;
};

/// What is asked for.
struct CommittedTensor {
  enum class Kind { kField, kMaster, kValue };
  Kind kind = Kind::kValue;
  std::size_t field = 0;               ///< As the layout counts.
  c10::ScalarType dtype = at::kFloat;  ///< The parameter's.
  StateLayout layout = {};             ///< The committed state's.
};

/// Where the elements of a target are in shards.
class ShardMap {
 public:
  /// Errors: std::invalid_argument if boxes cannot be, or do not cover the
  /// target.
  ShardMap(const std::vector<TensorBox>& shards, const TensorBox& target) {
    check(target, target.sizes.size());
    const std::size_t dims = target.sizes.size();
    for (const std::uint64_t dim : target.order) {
      sizes_.push_back(target.sizes[dim]);
    }
    std::uint64_t total = 1;
    for (const std::uint64_t size : sizes_) total *= size;
    std::uint64_t covered = 0;
    for (std::size_t i = 0; i < shards.size(); ++i) {
      const TensorBox& box = shards[i];
      check(box, dims);
      std::vector<std::uint64_t> strides(dims);
      std::uint64_t next = 1;
      for (std::size_t d = dims; d-- > 0;) {
        strides[box.order[d]] = next;
        next *= box.sizes[box.order[d]];
      }
      Part part{.shard = i};
      std::uint64_t volume = 1;
      for (const std::uint64_t dim : target.order) {
        const std::uint64_t begin = std::max(box.begin[dim], target.begin[dim]);
        const std::uint64_t end =
            std::min(box.begin[dim] + box.sizes[dim],
                     target.begin[dim] + target.sizes[dim]);
        if (begin >= end) {
          volume = 0;
          break;
        }
        part.low.push_back(begin - target.begin[dim]);
        part.high.push_back(end - target.begin[dim]);
        part.strides.push_back(strides[dim]);
        // Where the target begins, seen from the shard: below it, if it is
        // negative, and then never used.
        part.base += (target.begin[dim] - box.begin[dim]) * strides[dim];
        volume *= end - begin;
      }
      if (volume == 0) continue;
      covered += volume;
      parts_.push_back(std::move(part));
    }
    if (covered < total) {
      throw std::invalid_argument("the commit has " + std::to_string(covered) +
                                  " of " + std::to_string(total) +
                                  " elements that are asked for");
    }
    merge();
  }

  /// Calls take(shard, from, stride, count) for runs of elements, in the
  /// target's order: the shard's elements from, from + stride, ...
  template <typename Take>
  void visit(std::uint64_t first, std::uint64_t count, const Take& take) const {
    if (sizes_.empty()) {
      if (count > 0) take(parts_.at(0).shard, parts_[0].base, 1, 1);
      return;
    }
    const std::size_t inner = sizes_.size() - 1;
    std::vector<std::uint64_t> index(sizes_.size());
    while (count > 0) {
      std::uint64_t rest = first;
      for (std::size_t d = sizes_.size(); d-- > 0; rest /= sizes_[d]) {
        index[d] = rest % sizes_[d];
      }
      const Part& part = find(index);
      const std::uint64_t run =
          std::min(count, part.high[inner] - index[inner]);
      std::uint64_t from = part.base;
      for (std::size_t d = 0; d < index.size(); ++d) {
        from += index[d] * part.strides[d];
      }
      take(part.shard, from, part.strides[inner], run);
      first += run;
      count -= run;
    }
  }

 private:
  struct Part {
    std::size_t shard = 0;
    std::uint64_t base = 0;  ///< Modulo 2^64.
    std::vector<std::uint64_t> low = {};
    std::vector<std::uint64_t> high = {};
    std::vector<std::uint64_t> strides = {};
  };

  static void check(const TensorBox& box, std::size_t dims) {
    std::vector<std::uint64_t> order = box.order;
    std::ranges::sort(order);
    bool good = box.begin.size() == dims && box.sizes.size() == dims &&
                order.size() == dims;
    std::uint64_t total = 1;
    for (std::size_t d = 0; good && d < dims; ++d) {
      constexpr std::uint64_t kMost = std::uint64_t{1} << 48;
      good = order[d] == d && box.sizes[d] <= kMost && box.begin[d] <= kMost;
      if (!good || box.sizes[d] == 0) continue;
      good = total <= kMost / box.sizes[d];
      total *= box.sizes[d];
    }
    if (!good) throw std::invalid_argument("a shard's box cannot be");
  }

  void merge() {
    for (std::size_t d = sizes_.size(); d-- > 0;) {
      const bool goes = sizes_[d] == 1;
      if (goes) drop(d);
    }
    for (std::size_t d = sizes_.size(); d-- > 1;) {
      const std::uint64_t size = sizes_[d];
      const bool even = std::ranges::all_of(parts_, [&](const Part& part) {
        return part.low[d] == 0 && part.high[d] == size &&
               part.strides[d - 1] == part.strides[d] * size;
      });
      if (!even) continue;
      for (Part& part : parts_) {
        part.low[d] = part.low[d - 1] * size;
        part.high[d] = part.high[d - 1] * size;
      }
      sizes_[d] *= sizes_[d - 1];
      drop(d - 1);
    }
  }

  void drop(std::size_t dim) {
    const auto erase = [dim](std::vector<std::uint64_t>& from) {
      from.erase(from.begin() + static_cast<std::ptrdiff_t>(dim));
    };
    erase(sizes_);
    for (Part& part : parts_) {
      erase(part.low);
      erase(part.high);
      erase(part.strides);
    }
  }

  const Part& find(const std::vector<std::uint64_t>& index) const {
    for (const Part& part : parts_) {
      bool has = true;
      for (std::size_t d = 0; has && d < index.size(); ++d) {
        has = part.low[d] <= index[d] && index[d] < part.high[d];
      }
      if (has) return part;
    }
    throw std::invalid_argument(
        "the commit's shards overlap, and lack an element");
  }

  std::vector<std::uint64_t> sizes_;  ///< The target's, merged.
  std::vector<Part> parts_;
};

/// Reads elements of one tensor of shards, decoded. The result has its own
/// dtype: that of the parameter for values, else the layout's.
class CommittedElements {
 public:
  /// Errors: std::invalid_argument if the shards do not have the target.
  CommittedElements(std::vector<CommittedShard> shards, CommittedTensor what,
                    const TensorBox& target)
      : shards_(std::move(shards)),
        what_(std::move(what)),
        map_(boxes(), target) {
    if (what_.kind == CommittedTensor::Kind::kValue) {
      for (const CommittedShard& shard : shards_) check_value(shard);
    }
  }

  c10::ScalarType dtype() const {
    if (what_.kind == CommittedTensor::Kind::kValue) return what_.dtype;
    if (what_.kind == CommittedTensor::Kind::kField) {
      return what_.layout.dtype(what_.field);
    }
    return what_.layout.master == MasterFormat::kLow16 ? at::kShort
                                                       : at::kFloat;
  }

  /// Copies elements of the target, in dtype(). What is returned for a master
  /// of a bfloat16 parameter is its low half. Errors: those of CommitSource.
  void copy_to(std::byte* out, std::uint64_t first, std::uint64_t count) {
    const std::size_t item = c10::elementSize(dtype());
    map_.visit(first, count,
               [&](std::size_t shard, std::uint64_t from, std::uint64_t stride,
                   std::uint64_t run) {
                 while (run > 0) {
                   const auto [elements, there] = decoded(shard, from);
                   const std::uint64_t fitting = (there - 1) / stride + 1;
                   const std::uint64_t taken = std::min(run, fitting);
                   if (stride == 1) {
                     std::memcpy(out, elements, taken * item);
                   } else {
                     for (std::uint64_t i = 0; i < taken; ++i) {
                       std::memcpy(out + i * item, elements + i * stride * item,
                                   item);
                     }
                   }
                   out += taken * item;
                   from += taken * stride;
                   run -= taken;
                 }
               });
  }

 private:
  std::vector<TensorBox> boxes() const {
    std::vector<TensorBox> all;
    for (const CommittedShard& shard : shards_) {
      all.push_back(shard.box);
      if (what_.kind != CommittedTensor::Kind::kValue) continue;
      // Values lie in row-major order.
      for (std::size_t d = 0; d < all.back().order.size(); ++d) {
        all.back().order[d] = d;
      }
    }
    return all;
  }

  void check_value(const CommittedShard& shard) const {
    std::uint64_t elements = 1;
    for (const std::uint64_t size : shard.box.sizes) elements *= size;
    const CommittedValue wanted{
        elements, static_cast<std::uint32_t>(c10::elementSize(what_.dtype))};
    const auto& values = shard.source->document().values;
    if (!shard.value) {
      throw std::invalid_argument(
          shard.source->path() +
          ": the commit has no parameters (include_parameters=False)");
    }
    if (*shard.value >= values.size() || values[*shard.value] != wanted) {
      throw std::invalid_argument("a value in the commit has another size");
    }
  }

  /// Elements of a shard from `from` on, and how many are there (> 0).
  std::pair<const std::byte*, std::uint64_t> decoded(std::size_t shard,
                                                     std::uint64_t from) {
    const CommittedShard& of = shards_[shard];
    const std::size_t item = c10::elementSize(dtype());
    if (what_.kind == CommittedTensor::Kind::kValue) {
      const StateSegment& segment = of.source->value_at(*of.value, from);
      const std::uint64_t skip = from - segment.first;
      return {segment.fields[0] + skip * item, segment.count - skip};
    }
    const bool packed = what_.kind == CommittedTensor::Kind::kField &&
                        what_.layout.format != StateFormat::kExact;
    if (packed && shard == cached_shard_ && from >= cached_first_ &&
        from - cached_first_ < cached_count_) {
      const std::uint64_t skip = from - cached_first_;
      return {reinterpret_cast<const std::byte*>(cache_.data() + skip),
              cached_count_ - skip};
    }
    const StateSegment& segment = of.source->state_at(of.slot, from);
    const std::uint64_t skip = from - segment.first;
    if (!packed) {
      const std::size_t field = what_.kind == CommittedTensor::Kind::kMaster
                                    ? what_.layout.fields.size()
                                    : what_.field;
      return {segment.fields.at(field) + skip * item, segment.count - skip};
    }
    const std::uint64_t begin = skip - skip % StateFields::kCut;
    cached_shard_ = shard;
    cached_first_ = segment.first + begin;
    cached_count_ = std::min<std::uint64_t>(segment.count - begin, kCached);
    cache_.resize(kCached);
    unpack_moment(what_.layout.format, what_.field,
                  moment_at(segment, what_.layout.format, what_.field, begin),
                  cache_.data(), cached_count_);
    return decoded(shard, from);
  }

  static constexpr std::uint64_t kCached = 16 * StateFields::kCut;

  std::vector<CommittedShard> shards_;
  CommittedTensor what_;
  ShardMap map_;
  std::vector<float> cache_;
  std::size_t cached_shard_ = 0;
  std::uint64_t cached_first_ = 0;
  std::uint64_t cached_count_ = 0;
};

/// Returns how to read a tensor of the state. A master of bfloat16 is put
/// together from its low half and `value`, which reads the parameter. One of
/// float16 takes from `value` what it does not round to, as a step does.
inline ReadElements read_committed(std::shared_ptr<CommittedElements> elements,
                                   ReadElements value = {}) {
  return [elements = std::move(elements), value = std::move(value),
          own_raw = std::vector<std::byte>()](
             void* to, c10::ScalarType dtype, std::span<std::byte> raw,
             std::uint64_t first, std::uint64_t count) mutable {
    constexpr std::uint64_t kPiece = 16384;
    auto* out = static_cast<std::byte*>(to);
    const c10::ScalarType own = elements->dtype();
    // A master, what is kept of it, and half of it; or an element to convert.
    own_raw.resize(kPiece * std::max<std::size_t>(2 * sizeof(float) + 2,
                                                  c10::elementSize(own)));
    for (; count > 0;) {
      const std::uint64_t piece = std::min(count, kPiece);
      if (value) {
        auto* const master = reinterpret_cast<float*>(own_raw.data());
        auto* const kept = reinterpret_cast<std::byte*>(master + kPiece);
        std::byte* const half = kept + kPiece * sizeof(float);
        if (own == at::kShort) {
          elements->copy_to(kept, first, piece);
          value(half, at::kBFloat16, raw, first, piece);
          join_master(reinterpret_cast<std::uint16_t*>(half),
                      reinterpret_cast<std::uint16_t*>(kept), master, piece);
        } else {
          elements->copy_to(own_raw.data(), first, piece);
          value(half, at::kHalf, raw, first, piece);
          adopt_parameter(master, reinterpret_cast<c10::Half*>(half), piece);
        }
        convert(out, dtype, master, at::kFloat, piece);
      } else if (own == dtype) {
        elements->copy_to(out, first, piece);
      } else {
        elements->copy_to(own_raw.data(), first, piece);
        convert(out, dtype, own_raw.data(), own, piece);
      }
      out += piece * c10::elementSize(dtype);
      first += piece;
      count -= piece;
    }
  };
}

/// A tensor's place in the whole, in the order in which it lies in memory.
inline TensorBox box_of(const at::Tensor& tensor,
                        std::vector<std::uint64_t> begin) {
  TensorBox box{.begin = std::move(begin), .sizes = {}, .order = {}};
  for (const std::int64_t size : tensor.sizes()) {
    box.order.push_back(box.sizes.size());
    box.sizes.push_back(static_cast<std::uint64_t>(size));
  }
  std::ranges::stable_sort(box.order, std::greater(), [&](std::uint64_t dim) {
    return tensor.stride(static_cast<std::int64_t>(dim));
  });
  return box;
}

/// Fills a tensor, which is the box that begins at `begin`, with elements that
/// `read` gives in row-major order.
inline void fill_row_major(const at::Tensor& out, const ReadElements& read) {
  constexpr std::uint64_t kPiece = std::uint64_t{1} << 18;
  std::vector<std::int64_t> strides(out.sizes().size());
  std::int64_t next = 1;
  for (std::size_t d = strides.size(); d-- > 0;) {
    strides[d] = next;
    next *= std::max<std::int64_t>(out.sizes()[d], 1);
  }
  const OrderedReader writer(out, strides);
  const auto total = static_cast<std::uint64_t>(out.numel());
  if (writer.direct()) {
    read(writer.writable_pointer(0), out.scalar_type(), {}, 0, total);
    return;
  }
  std::vector<std::byte> piece;
  for (std::uint64_t first = 0; first < total; first += kPiece) {
    const std::uint64_t count = std::min(kPiece, total - first);
    piece.resize(count * out.dtype().itemsize());
    read(piece.data(), out.scalar_type(), {}, first, count);
    writer.write(piece.data(), first, count);
  }
}

/// Returns how to read a box of what a commit has, in row-major order. Errors:
/// those of CommittedElements.
inline ReadElements read_row_major(std::vector<std::uint64_t> begin,
                                   std::vector<std::uint64_t> sizes,
                                   const std::vector<CommittedShard>& shards,
                                   const CommittedTensor& what) {
  TensorBox box{std::move(begin), std::move(sizes), {}};
  for (std::size_t d = 0; d < box.sizes.size(); ++d) box.order.push_back(d);
  ReadElements value;
  const bool has_values = std::ranges::all_of(
      shards,
      [](const CommittedShard& shard) { return shard.value.has_value(); });
  // Half a master alone is nothing, so that is an error.
  if (what.kind == CommittedTensor::Kind::kMaster &&
      (what.layout.master == MasterFormat::kLow16 || has_values)) {
    CommittedTensor of_value = what;
    of_value.kind = CommittedTensor::Kind::kValue;
    value = read_committed(
        std::make_shared<CommittedElements>(shards, of_value, box));
  }
  return read_committed(std::make_shared<CommittedElements>(shards, what, box),
                        std::move(value));
}

/// Fills a tensor with a box of what a commit has. Errors: those of
/// CommittedElements.
inline void fill_from_commit(const at::Tensor& out,
                             std::vector<std::uint64_t> begin,
                             const std::vector<CommittedShard>& shards,
                             const CommittedTensor& what) {
  std::vector<std::uint64_t> sizes(out.sizes().begin(), out.sizes().end());
  fill_row_major(
      out, read_row_major(std::move(begin), std::move(sizes), shards, what));
}

}  // namespace torch_ext
