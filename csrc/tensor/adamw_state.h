#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "adamw_kernel.h"
#include "dense_tensor.h"
#include "snapshot.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/adamw_options.h"

namespace torch_ext {

/// Copies state into tensors of its own, tile by tile.
class AdamWSnapshot final : public UpdateKernel {
 public:
  AdamWSnapshot(StateFormat format, AdamWKernel::MakeScratch make_scratch,
                StateDictMode mode, std::filesystem::path directory)
      : format_(format),
        make_scratch_(std::move(make_scratch)),
        snapshot_(mode, std::move(directory)) {}

  void add(std::size_t number, const at::Tensor& parameter) {
    Place place{parameter, master_format(parameter.scalar_type()), {}};
    for (std::size_t i = 0; i < place.tensors(); ++i) {
      place.numbers[i] = snapshot_.add(parameter, at::kFloat);
    }
    places_.emplace(number, std::move(place));
  }

  /// Takes the space. Called after the last add(). Errors: IoError.
  void open() { snapshot_.open(); }

  /// Called instead of open(), for one tensor of one parameter. Returns the
  /// tensor, which update() fills.
  at::Tensor open_in_memory(std::size_t number, std::size_t field) {
    Place& place = places_.at(number);
    only_ = at::empty_strided(
        place.parameter.sizes(), place.parameter.strides(),
        at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
    only_field_ = field;
    return only_;
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const auto found = places_.find(segment.parameter);
      if (found == places_.end()) continue;
      save(segment, found->second);
    }
  }

  /// Called after the last update(). Errors: IoError.
  void finish() { tensors_ = snapshot_.finish(); }

  /// Returns the state of a parameter, with the parameter's shape and strides.
  /// The step is not set.
  AdamWState state(std::size_t number) const {
    const Place& place = places_.at(number);
    return {.step = 0,
            .exp_avg = tensors_[place.numbers[0]],
            .exp_avg_sq = tensors_[place.numbers[1]],
            .master = place.master != MasterFormat::kNone
                          ? tensors_[place.numbers[AdamWFields::kMaster]]
                          : at::Tensor()};
  }

 private:
  struct Place {
    at::Tensor parameter;
    MasterFormat master = MasterFormat::kNone;
    std::array<std::size_t, 3> numbers = {};  ///< The tensors'.

    std::size_t tensors() const {
      return master == MasterFormat::kNone ? 2 : numbers.size();
    }
  };

  void save(const StateSegment& segment, const Place& place) {
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk = scratch.chunk();
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      for (std::size_t i = 0; i < place.tensors(); ++i) {
        if (only_.defined() && i != only_field_) continue;
        const float* values = i == AdamWFields::kMaster
                                  ? master(segment, done, count, place, scratch)
                                  : moment(segment, done, count, i, scratch);
        if (only_.defined()) {
          std::copy_n(values, count,
                      only_.mutable_data_ptr<float>() + segment.first + done);
          continue;
        }
        snapshot_.write(place.numbers[i], segment.first + done,
                        std::as_bytes(std::span(values, count)));
      }
    }
  }

  const float* moment(const StateSegment& segment, std::uint64_t done,
                      std::uint64_t count, std::size_t field,
                      const AdamWScratch& scratch) const {
    if (format_ == StateFormat::kExact) return segment.field(field) + done;
    unpack_moment(format_, field, moment_at(segment, format_, field, done),
                  scratch.state(), count);
    return scratch.state();
  }

  // Returns the master. The segment's own stays as it is: for the moment, the
  // parameter may hold somebody's average of weights.
  static const float* master(const StateSegment& segment, std::uint64_t done,
                             std::uint64_t count, const Place& place,
                             const AdamWScratch& scratch) {
    const at::Tensor here = host_part(place.parameter, segment.first + done,
                                      count, scratch.staging());
    float* const values = scratch.state();
    if (place.master == MasterFormat::kLow16) {
      join_master(
          static_cast<const std::uint16_t*>(here.const_data_ptr()),
          segment.field<const std::uint16_t>(AdamWFields::kMaster) + done,
          values, count);
    } else {
      std::memcpy(values, segment.field(AdamWFields::kMaster) + done,
                  count * sizeof(float));
      adopt_parameter(values, here.const_data_ptr<c10::Half>(), count);
    }
    return values;
  }

  const StateFormat format_;
  const AdamWKernel::MakeScratch make_scratch_;
  Snapshot snapshot_;
  std::unordered_map<std::size_t, Place> places_;
  std::vector<at::Tensor> tensors_;
  at::Tensor only_;
  std::size_t only_field_ = 0;
};

/// Fills state from tensors of any floating dtype, device and strides.
class AdamWLoader final : public UpdateKernel {
 public:
  AdamWLoader(StateFormat format, std::uint64_t seed,
              AdamWKernel::MakeScratch make_scratch)
      : format_(format), seed_(seed), make_scratch_(std::move(make_scratch)) {}

  /// Adds a parameter. Undefined tensors leave what there is. But in `fresh`
  /// state, a 16-bit parameter without a master is its own master.
  void add(std::size_t number, const at::Tensor& parameter,
           std::uint32_t ordinal, std::uint64_t first_element,
           const AdamWState& state, bool fresh = true) {
    const auto reader = [&](const at::Tensor& tensor) {
      return tensor.defined() ? OrderedReader(tensor, parameter.strides())
                              : OrderedReader();
    };
    Source source{{reader(state.exp_avg), reader(state.exp_avg_sq), {}},
                  master_format(parameter.scalar_type()),
                  ordinal,
                  first_element};
    if (source.master != MasterFormat::kNone) {
      const bool own = state.master.defined() || !fresh;
      source.readers[AdamWFields::kMaster] =
          reader(own ? state.master : parameter);
    }
    sources_.emplace(number, std::move(source));
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    const AdamWScratch scratch(make_scratch_());
    for (const StateSegment& segment : segments) {
      const Source& source = sources_.at(segment.parameter);
      for (std::size_t i = 0; i < source.readers.size(); ++i) {
        if (segment.fields[i] == nullptr ||
            !source.readers[i].source().defined()) {
          continue;
        }
        fill(segment, i, source, scratch);
      }
    }
  }

 private:
  struct Source {
    std::array<OrderedReader, 3> readers;
    MasterFormat master = MasterFormat::kNone;
    std::uint32_t ordinal = 0;
    std::uint64_t first_element = 0;
  };

  void fill(const StateSegment& segment, std::size_t field,
            const Source& source, const AdamWScratch& scratch) const {
    const bool is_master = field == AdamWFields::kMaster;
    const bool as_it_is = is_master ? source.master == MasterFormat::kFloat
                                    : format_ == StateFormat::kExact;
    const OrderedReader& reader = source.readers[field];
    const std::uint64_t chunk = scratch.chunk();
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      const std::uint64_t first = segment.first + done;
      float* const values =
          as_it_is ? segment.field(field) + done : scratch.state();
      reader.copy_as_float(values, scratch.staging(), first, count);
      if (as_it_is) continue;
      if (is_master) {
        // This is done even if the master does not round to the parameter,
        // which may be loaded after its state.
        split_master(values, nullptr,
                     segment.field<std::uint16_t>(field) + done, count);
      } else {
        pack_moment(
            format_, field, values, moment_at(segment, format_, field, done),
            first, count,
            {seed_, segment.step, source.ordinal, source.first_element});
      }
    }
  }

  const StateFormat format_;
  const std::uint64_t seed_;
  const AdamWKernel::MakeScratch make_scratch_;
  std::unordered_map<std::size_t, Source> sources_;
};

}  // namespace torch_ext
