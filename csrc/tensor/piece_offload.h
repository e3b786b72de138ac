// Steps of any optimizer class, piece by piece.
//
// A piece is a run of one parameter's elements: their values and gradient as
// floats on the CPU, and their state as it is kept. Segments of tiles are cut
// into pieces that fit the processor's cache. The caller's function gets
// batches of pieces. It writes to values, gradients and state in place. Values
// and gradients are views of the parameter's own memory where that is possible.
// Elsewhere they are copies. What was written to a copy goes back when the
// function has returned: to the parameter and its master, and to the gradient
// if the class writes to gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tensor_offload.h"
#include "torch_ext/base/align.h"
#include "torch_ext/optim/update_kernel.h"

namespace torch_ext {

/// Errors and threads: as TensorOffload.
class PieceOffload final : public TensorOffload {
 public:
  using Fields = std::vector<StateLayout::Field>;

  /// A parameter of a step.
  struct Target {
    Parameter parameter;
    at::Tensor gradient;  ///< Undefined: it has none.
    std::size_t group = 0;
    bool writes_gradient = false;
  };

  /// Elements of the parameter of a target.
  struct Piece {
    std::size_t target = 0;
    at::Tensor values;    ///< 1-D floats, as all here.
    at::Tensor gradient;  ///< Undefined: there is none.
    /// Whether the gradient is no view: it goes back if the target says so.
    bool gradient_is_copy = false;
    std::vector<at::Tensor> fields;  ///< In their own dtypes; no master.
  };
  /// Updates pieces in place. All are of one group, and all have state from
  /// before the step, or none has. An empty batch ends a tile.
  using Update = std::function<void(std::vector<Piece>&)>;

  /// A sixteenth of the host memory, at most 768 KiB, is for pieces and for
  /// what is computed in between. `options.scratch_bytes` is chosen here.
  /// `resume`: what take_commit() then takes; without a generation, the store
  /// is new.
  PieceOffload(TileOptions options, StateDictMode mode,
               const CommitChoice& resume = {})
      : TensorOffload(with_scratch(options), "OffloadedOptimizer", mode,
                      /*seed=*/0, resume),
        scratch_(scratch_for(options.host_memory)),
        most_(align_down(scratch_ / kPieceBytes, StateFields::kCut)) {}

  /// Sets what is kept of a parameter when it gets its first state.
  void describe(std::size_t slot, Fields fields) {
    fields_[slot] = std::move(fields);
  }

  /// Makes a step of these parameters. Errors: also what `update` throws.
  void step(const std::vector<Target>& targets, const Update& update) {
    for (const auto& [parameter, gradient, group, writes] : targets) {
      if (gradient.defined()) {
        check(parameter, gradient);
      } else {
        check(parameter);
      }
    }
    Kernel kernel(*this, targets, update);
    std::vector<std::size_t> numbers;
    for (const Target& target : targets) {
      numbers.push_back(number_of(target.parameter));
      // Autograd must see that a tensor that it saved has changed.
      const at::Tensor& tensor = target.parameter.tensor;
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
    kernel.update_empty();
    offload().step(numbers, kernel);
    kernel.write_back();
  }

  /// Counts the memory that pieces take too.
  OptimizerOffloadStats stats() const override {
    OptimizerOffloadStats stats = TensorOffload::stats();
    if (stats.tile_visits > 0) stats.host_bytes_peak += scratch_;
    return stats;
  }

 private:
  /// The bytes that an element of a piece takes: its value, its gradient, and
  /// four floats for what a class computes in between.
  static constexpr std::uint64_t kPieceBytes = 24;
  /// The most elements of a batch: what is computed in between then stays in
  /// the processor's cache.
  static constexpr std::uint64_t kMost = 128 * StateFields::kCut;

  static std::uint64_t scratch_for(std::uint64_t host_memory) {
    constexpr std::uint64_t kLeast = std::uint64_t{48} << 10;
    return std::min(std::max(align_down(host_memory / 16, page_size()), kLeast),
                    kMost * kPieceBytes);
  }
  static TileOptions with_scratch(TileOptions options) {
    options.scratch_bytes = scratch_for(options.host_memory);
    return options;
  }

  class Kernel final : public UpdateKernel {
   public:
    Kernel(PieceOffload& offload, const std::vector<Target>& targets,
           const Update& update)
        : offload_(offload), targets_(targets), update_(update) {
      for (std::size_t i = 0; i < targets.size(); ++i) {
        const auto& [slot, tensor] = targets[i].parameter;
        Work& work = works_[slot];
        work.target = i;
        work.has_state = offload.has_state(slot);
        work.values = OrderedReader(tensor, tensor.strides());
        if (targets[i].gradient.defined()) {
          work.gradient = OrderedReader(targets[i].gradient, tensor.strides());
        }
      }
    }

    void update(std::span<const StateSegment> segments) override {
      const c10::NoGradGuard no_grad;
      std::uint64_t elements = 0;
      for (const StateSegment& segment : segments) {
        for (std::uint64_t done = 0; done < segment.count;) {
          const std::uint64_t count =
              std::min(offload_.most_, segment.count - done);
          const Work& work = works_.at(segment.parameter);
          elements += count;
          if (!batch_.empty() && (elements > offload_.most_ ||
                                  !joins(*batch_.back().work, work))) {
            run();
            elements = count;
          }
          batch_.push_back({&work, &segment, done, count});
          done += count;
        }
      }
      end_tile();
    }

    /// Calls the class for parameters without elements, as for others. It is
    /// first, so that an error of the class finds all as it was.
    void update_empty() {
      const c10::NoGradGuard no_grad;
      for (const auto& [slot, work] : works_) {
        if (targets_[work.target].parameter.tensor.numel() > 0) continue;
        const StateSegment none{.parameter = slot};
        batch_.push_back({&work, &none, 0, 0});
        end_tile();
      }
    }

    /// Writes to gradients of which the readers have had copies.
    void write_back() const {
      for (const auto& [slot, work] : works_) {
        const Target& target = targets_[work.target];
        const at::Tensor& source = work.gradient.source();
        if (target.writes_gradient && source.defined() &&
            !source.is_alias_of(target.gradient)) {
          const c10::InferenceMode mode(source.is_inference());
          target.gradient.detach().copy_(source);
        }
      }
    }

   private:
    struct Work {
      std::size_t target = 0;
      bool has_state = false;
      OrderedReader values;
      OrderedReader gradient;
    };
    /// What a piece is made of, and goes back to.
    struct Part {
      const Work* work;
      const StateSegment* segment;
      std::uint64_t done;
      std::uint64_t count;
      at::Tensor here = {};  ///< The parameter's elements in host memory.

      std::uint64_t first() const { return segment->first + done; }
    };

    bool joins(const Work& one, const Work& other) const {
      return targets_[one.target].group == targets_[other.target].group &&
             one.has_state == other.has_state;
    }

    void end_tile() {
      if (!batch_.empty()) run();
      std::vector<Piece> none;
      update_(none);
    }

    void run() {
      std::vector<Piece> pieces;
      for (Part& part : batch_) pieces.push_back(piece_of(part));
      try {
        update_(pieces);
      } catch (...) {
        // A traceback keeps them longer than the tile's memory.
        for (const Piece& piece : pieces) {
          for (const at::Tensor& field : piece.fields) own(field);
        }
        throw;
      }
      for (std::size_t i = 0; i < batch_.size(); ++i) {
        put_back(batch_[i], pieces[i]);
      }
      batch_.clear();
    }

    /// Gives a tensor, and all that share its storage, memory of their own.
    static void own(const at::Tensor& tensor) {
      const at::Tensor copy = tensor.clone();
      tensor.storage().set_data_ptr(copy.storage().set_data_ptr({}));
    }

    const StateLayout& layout_of(const Part& part) const {
      return offload_.layout_of(part.segment->parameter);
    }

    Piece piece_of(Part& part) const {
      const StateLayout& layout = layout_of(part);
      Piece piece;
      piece.target = part.work->target;
      for (std::size_t i = 0; i < layout.fields.size(); ++i) {
        const c10::ScalarType dtype = layout.dtype(i);
        piece.fields.push_back(
            part.count == 0 ? at::empty({0}, host_options(dtype))
                            : host_view(part.segment->fields[i] +
                                            part.done * c10::elementSize(dtype),
                                        part.count, dtype));
      }
      part.here = elements_of(part.work->values, part);
      piece.values = part.here;
      if (layout.has_master()) {
        piece.values = at::empty({static_cast<std::int64_t>(part.count)},
                                 host_options(at::kFloat));
        if (part.count > 0) {
          read_master(*part.segment, layout, part.done, part.count, part.here,
                      piece.values.mutable_data_ptr<float>());
        }
      }
      const OrderedReader& gradient = part.work->gradient;
      if (gradient.source().defined()) {
        piece.gradient = as_float(elements_of(gradient, part));
        piece.gradient_is_copy =
            !gradient.direct() || gradient.source().scalar_type() != at::kFloat;
      }
      return piece;
    }

    /// Returns elements in host memory, in the source's dtype: a view of the
    /// source's memory where that is possible.
    static at::Tensor elements_of(const OrderedReader& reader,
                                  const Part& part) {
      const at::Tensor& source = reader.source();
      const auto options = host_options(source.scalar_type());
      const auto size = static_cast<std::int64_t>(part.count);
      if (reader.direct() && size > 0) {
        // This is no view of autograd's. Such a view would be an inference
        // tensor if the source is one, and nobody could train it.
        return at::from_blob(
            reader.pointer(part.first()), {size},
            [storage = source.storage()](void*) mutable { storage = {}; },
            options);
      }
      const at::Tensor piece = at::empty({size}, options);
      if (size > 0) {
        reader.copy_to(static_cast<std::byte*>(piece.mutable_data_ptr()),
                       part.first(), part.count);
      }
      return piece;
    }

    static at::Tensor as_float(const at::Tensor& elements) {
      if (elements.scalar_type() == at::kFloat) return elements;
      const at::Tensor floats =
          at::empty(elements.sizes(), host_options(at::kFloat));
      return floats.copy_(elements);
    }

    void put_back(const Part& part, const Piece& piece) const {
      if (part.count == 0) return;
      const StateLayout& layout = layout_of(part);
      const std::size_t master = layout.fields.size();
      const auto* values = piece.values.const_data_ptr<float>();
      if (layout.master == MasterFormat::kLow16) {
        split_master(
            values, static_cast<std::uint16_t*>(part.here.mutable_data_ptr()),
            part.segment->field<std::uint16_t>(master) + part.done, part.count);
      } else if (layout.master == MasterFormat::kFloat) {
        std::copy_n(values, part.count,
                    part.segment->field(master) + part.done);
        part.here.copy_(piece.values);
      }
      const at::Tensor& there = part.work->values.source();
      if (!there.is_cpu()) {
        const c10::InferenceMode mode(there.is_inference());
        storage_view(there, part.first(), part.count).copy_(part.here);
      }
      const OrderedReader& gradient = part.work->gradient;
      const Target& target = targets_[part.work->target];
      if (!target.writes_gradient || !piece.gradient_is_copy) return;
      const at::Tensor written =
          piece.gradient.to(gradient.source().scalar_type());
      const c10::InferenceMode mode(gradient.source().is_inference());
      gradient.write(static_cast<const std::byte*>(written.const_data_ptr()),
                     part.first(), part.count);
    }

    PieceOffload& offload_;
    const std::vector<Target>& targets_;
    const Update& update_;
    std::unordered_map<std::size_t, Work> works_;
    std::vector<Part> batch_;
  };

  void check_kind(const at::Tensor& gradient,
                  const at::Tensor& /*parameter*/) const override {
    if (c10::isFloatingType(gradient.scalar_type())) return;
    refuse_dtype(name(), gradient);
  }

  Layout wanted_layout(const Parameter& parameter) const override {
    return std::make_shared<const StateLayout>(
        StateLayout{fields_.at(parameter.slot),
                    master_format(parameter.tensor.scalar_type())});
  }

  MakeScratch make_scratch() override {
    // Nothing is computed in between then.
    const auto memory = std::make_shared<std::vector<std::byte>>(scratch_);
    return [memory] { return std::span<std::byte>(*memory); };
  }

  const std::uint64_t scratch_;
  const std::uint64_t most_;
  std::map<std::size_t, Fields> fields_;
};

}  // namespace torch_ext
