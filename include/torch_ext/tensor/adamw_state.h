#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>

#include "torch_ext/base/align.h"
#include "torch_ext/optim/snapshot_file.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/adamw_kernel.h"
#include "torch_ext/tensor/dense_tensor.h"

namespace torch_ext {

/// A parameter's state as tensors.
struct AdamWState {
  std::uint64_t step = 0;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  at::Tensor master;  ///< Of 16-bit parameters; undefined: the parameter.
};

/// Copies state into a file, tile by tile, and makes tensors of it that are
/// private memory over the file.
class AdamWSnapshot final : public UpdateKernel {
 public:
  explicit AdamWSnapshot(AdamWKernel::MakeScratch make_scratch)
      : make_scratch_(std::move(make_scratch)) {}

  void add(std::size_t number, const at::Tensor& parameter, int fields) {
    Place place{parameter, fields, {}};
    for (int i = 0; i < fields; ++i) {
      place.offsets[static_cast<std::size_t>(i)] = bytes_;
      bytes_ += align_up(
          sizeof(float) * static_cast<std::uint64_t>(parameter.numel()), 64);
    }
    places_.emplace(number, std::move(place));
  }

  /// Reserves the space; after the last add().
  void open(const std::filesystem::path& directory) {
    file_ = std::make_unique<SnapshotFile>(directory, bytes_);
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const auto found = places_.find(segment.parameter);
      if (found == places_.end()) continue;
      const Place& place = found->second;
      if (place.fields == 3) adopt(segment, place.parameter);
      for (int i = 0; i < place.fields; ++i) {
        const auto field = static_cast<std::size_t>(i);
        file_->write(
            place.offsets[field] + segment.first * sizeof(float),
            std::as_bytes(std::span(segment.fields[field], segment.count)));
      }
    }
  }

  /// The state of a parameter, with its shape and strides, without the step.
  AdamWState state(std::size_t number) {
    if (memory_ == nullptr) memory_ = file_->map();
    const Place& place = places_.at(number);
    return {.step = 0,
            .exp_avg = tensor(place, 0),
            .exp_avg_sq = tensor(place, 1),
            .master = place.fields == 3 ? tensor(place, 2) : at::Tensor()};
  }

 private:
  struct Place {
    at::Tensor parameter;
    int fields = 0;
    std::array<std::uint64_t, 3> offsets = {};  ///< Bytes into the file.
  };

  void adopt(const StateSegment& segment, const at::Tensor& parameter) {
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk = scratch.chunk(/*on_host=*/false);
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      const at::Tensor here =
          host_part(parameter, segment.first + done, count, scratch.staging());
      adopt_parameter(segment.fields[2] + done, here.const_data_ptr(),
                      scratch.small(), count, here.scalar_type());
    }
  }

  at::Tensor tensor(const Place& place, std::size_t field) const {
    const at::Tensor& like = place.parameter;
    const auto options = at::TensorOptions().dtype(at::kFloat);
    if (like.numel() == 0) {
      return at::empty_strided(like.sizes(), like.strides(), options);
    }
    return at::from_blob(
        memory_.get() + place.offsets[field], like.sizes(), like.strides(),
        [memory = memory_](void*) mutable { memory.reset(); }, options);
  }

  const AdamWKernel::MakeScratch make_scratch_;
  std::unordered_map<std::size_t, Place> places_;
  std::uint64_t bytes_ = 0;
  std::unique_ptr<SnapshotFile> file_;
  std::shared_ptr<std::byte> memory_;
};

/// Fills state from tensors of any floating dtype, device and strides.
class AdamWLoader final : public UpdateKernel {
 public:
  explicit AdamWLoader(AdamWKernel::MakeScratch make_scratch)
      : make_scratch_(std::move(make_scratch)) {}

  void add(std::size_t number, const at::Tensor& parameter, int fields,
           const AdamWState& state) {
    const at::IntArrayRef strides = parameter.strides();
    Sources sources{OrderedReader(state.exp_avg, strides),
                    OrderedReader(state.exp_avg_sq, strides), OrderedReader()};
    if (fields == 3) {
      const bool own = state.master.defined();
      sources[2] = OrderedReader(own ? state.master : parameter, strides);
    }
    sources_.emplace(number, std::move(sources));
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    const AdamWScratch scratch(make_scratch_());
    for (const StateSegment& segment : segments) {
      const Sources& sources = sources_.at(segment.parameter);
      for (std::size_t field = 0; field < sources.size(); ++field) {
        if (segment.fields[field] == nullptr) continue;
        sources[field].copy_as_float(segment.fields[field], scratch.staging(),
                                     segment.first, segment.count);
      }
    }
  }

 private:
  using Sources = std::array<OrderedReader, 3>;

  const AdamWKernel::MakeScratch make_scratch_;
  std::unordered_map<std::size_t, Sources> sources_;
};

}  // namespace torch_ext
