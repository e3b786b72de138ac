#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "adamw_scratch.h"
#include "dense_tensor.h"
#include "masters.h"
#include "snapshot.h"
#include "state_layout.h"
#include "torch_ext/optim/update_kernel.h"
#include "torch_ext/tensor/adamw_options.h"

namespace torch_ext {

/// Copies state into tensors of its own, tile by tile.
class StateSnapshot final : public UpdateKernel {
 public:
  StateSnapshot(MakeScratch make_scratch, StateDictMode mode,
                std::filesystem::path directory)
      : make_scratch_(std::move(make_scratch)),
        snapshot_(mode, std::move(directory)) {}

  /// Adds the tensors of a parameter's state. `layout` outlives the kernel.
  void add(std::size_t number, const at::Tensor& parameter,
           const StateLayout& layout) {
    Place place{parameter, &layout, {}};
    for (std::size_t i = 0; i < layout.tensors(); ++i) {
      place.numbers.push_back(snapshot_.add(parameter, layout.dtype(i)));
    }
    places_.emplace(number, std::move(place));
  }

  /// Takes the space. Called after the last add(). Errors: IoError.
  void open() { snapshot_.open(); }

  /// Called in place of add() and open(), for one tensor of one parameter.
  /// Returns the tensor, which update() fills.
  at::Tensor open_in_memory(std::size_t number, const at::Tensor& parameter,
                            const StateLayout& layout, std::size_t tensor) {
    places_.emplace(number, Place{parameter, &layout, {}});
    only_ = at::empty_strided(parameter.sizes(), parameter.strides(),
                              host_options(layout.dtype(tensor)));
    only_tensor_ = tensor;
    return only_;
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    for (const StateSegment& segment : segments) {
      const auto found = places_.find(segment.parameter);
      if (found != places_.end()) save(segment, found->second);
    }
  }

  /// Writes a part of a tensor that no segment has.
  void write(std::size_t number, std::size_t tensor, std::uint64_t first,
             std::span<const std::byte> bytes) {
    snapshot_.write(places_.at(number).numbers.at(tensor), first, bytes);
  }

  /// Called after the last update(). Errors: IoError.
  void finish() { tensors_ = snapshot_.finish(); }

  /// Returns the tensors of a parameter's state, with the parameter's shape and
  /// strides.
  std::vector<at::Tensor> state(std::size_t number) const {
    std::vector<at::Tensor> state;
    for (const std::size_t tensor : places_.at(number).numbers) {
      state.push_back(tensors_[tensor]);
    }
    return state;
  }

 private:
  struct Place {
    at::Tensor parameter;
    const StateLayout* layout;
    std::vector<std::size_t> numbers;  ///< The tensors'.
  };

  void save(const StateSegment& segment, const Place& place) {
    const StateLayout& layout = *place.layout;
    const AdamWScratch scratch(make_scratch_());
    const std::uint64_t chunk = scratch.chunk();
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      for (std::size_t i = 0; i < layout.tensors(); ++i) {
        if (only_.defined() && i != only_tensor_) continue;
        const std::size_t item = c10::elementSize(layout.dtype(i));
        const std::span<const std::byte> bytes{
            values(segment, i, done, count, place, scratch), count * item};
        if (only_.defined()) {
          std::copy_n(bytes.data(), bytes.size(),
                      static_cast<std::byte*>(only_.mutable_data_ptr()) +
                          (segment.first + done) * item);
        } else {
          snapshot_.write(place.numbers[i], segment.first + done, bytes);
        }
      }
    }
  }

  static const std::byte* values(const StateSegment& segment,
                                 std::size_t tensor, std::uint64_t done,
                                 std::uint64_t count, const Place& place,
                                 const AdamWScratch& scratch) {
    const StateLayout& layout = *place.layout;
    float* const converted = scratch.state();
    if (layout.is_master(tensor)) {
      const at::Tensor here = host_part(place.parameter, segment.first + done,
                                        count, scratch.staging());
      read_master(segment, layout, done, count, here, converted);
    } else if (layout.format == StateFormat::kExact) {
      return segment.fields[tensor] +
             done * c10::elementSize(layout.dtype(tensor));
    } else {
      unpack_moment(layout.format, tensor,
                    moment_at(segment, layout.format, tensor, done), converted,
                    count);
    }
    return reinterpret_cast<const std::byte*>(converted);
  }

  const MakeScratch make_scratch_;
  Snapshot snapshot_;
  std::unordered_map<std::size_t, Place> places_;
  std::vector<at::Tensor> tensors_;
  at::Tensor only_;
  std::size_t only_tensor_ = 0;
};

/// Fills state from tensors of any floating dtype, device and strides.
class StateLoader final : public UpdateKernel {
 public:
  /// `seed` is for the rounding of formats that are not exact.
  StateLoader(MakeScratch make_scratch, std::uint64_t seed)
      : make_scratch_(std::move(make_scratch)), seed_(seed) {}

  /// Adds the tensors of a parameter's state. Undefined ones leave what there
  /// is. But in `fresh` state, a 16-bit parameter without a master is its own
  /// master. `first_element` is where a shard begins. `layout` outlives the
  /// kernel.
  void add(std::size_t number, const at::Tensor& parameter,
           const StateLayout& layout, std::uint64_t first_element,
           const std::vector<at::Tensor>& tensors, bool fresh) {
    Source source{.layout = &layout, .first_element = first_element};
    for (std::size_t i = 0; i < layout.tensors(); ++i) {
      at::Tensor tensor = i < tensors.size() ? tensors[i] : at::Tensor();
      if (!tensor.defined() && fresh && layout.is_master(i)) tensor = parameter;
      source.readers.push_back(tensor.defined()
                                   ? read_in_order(tensor, parameter.strides())
                                   : ReadElements());
    }
    sources_.emplace(number, std::move(source));
  }

  /// Adds a parameter whose state is read in the order of its memory. The
  /// readers count as the layout does; empty ones leave what there is.
  void add(std::size_t number, const StateLayout& layout,
           std::uint64_t first_element, std::vector<ReadElements> readers) {
    readers.resize(layout.tensors());
    sources_.emplace(number,
                     Source{&layout, first_element, std::move(readers)});
  }

  void update(std::span<const StateSegment> segments) override {
    const c10::NoGradGuard no_grad;
    const AdamWScratch scratch(make_scratch_());
    for (const StateSegment& segment : segments) {
      const Source& source = sources_.at(segment.parameter);
      for (std::size_t i = 0; i < source.readers.size(); ++i) {
        if (source.readers[i]) fill(segment, i, source, scratch);
      }
    }
  }

 private:
  struct Source {
    const StateLayout* layout;
    std::uint64_t first_element;
    std::vector<ReadElements> readers = {};
  };

  void fill(const StateSegment& segment, std::size_t tensor,
            const Source& source, const AdamWScratch& scratch) const {
    const StateLayout& layout = *source.layout;
    const ReadElements& read = source.readers[tensor];
    const bool is_master = layout.is_master(tensor);
    const bool as_it_is = is_master ? layout.master == MasterFormat::kFloat
                                    : layout.format == StateFormat::kExact;
    const c10::ScalarType dtype = layout.dtype(tensor);
    const std::uint64_t chunk = scratch.chunk();
    for (std::uint64_t done = 0; done < segment.count; done += chunk) {
      const std::uint64_t count = std::min(chunk, segment.count - done);
      const std::uint64_t first = segment.first + done;
      if (as_it_is) {
        read(segment.fields[tensor] + done * c10::elementSize(dtype), dtype,
             scratch.staging(), first, count);
        continue;
      }
      float* const values = scratch.state();
      read(values, at::kFloat, scratch.staging(), first, count);
      if (is_master) {
        // This is done even if the master does not round to the parameter,
        // which may be loaded after its state.
        split_master(values, nullptr,
                     segment.field<std::uint16_t>(tensor) + done, count);
      } else {
        pack_moment(
            layout.format, tensor, values,
            moment_at(segment, layout.format, tensor, done), first, count,
            {seed_, segment.step, static_cast<std::uint32_t>(segment.parameter),
             source.first_element});
      }
    }
  }

  const MakeScratch make_scratch_;
  const std::uint64_t seed_;
  std::unordered_map<std::size_t, Source> sources_;
};

}  // namespace torch_ext
