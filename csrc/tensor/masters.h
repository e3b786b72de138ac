#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dense_tensor.h"
#include "state_layout.h"
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

/// Returns the masters of a segment's elements [done, done + count), in host
/// memory. The segment's own stay as they are: for the moment, the parameter
/// may hold somebody's average of weights. `here` has the parameter's elements.
inline void read_master(const StateSegment& segment, const StateLayout& layout,
                        std::uint64_t done, std::uint64_t count,
                        const at::Tensor& here, float* out) {
  const std::size_t field = layout.fields.size();
  if (layout.master == MasterFormat::kLow16) {
    join_master(static_cast<const std::uint16_t*>(here.const_data_ptr()),
                segment.field<const std::uint16_t>(field) + done, out, count);
  } else {
    std::memcpy(out, segment.field(field) + done, count * sizeof(float));
    adopt_parameter(out, here.const_data_ptr<c10::Half>(), count);
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

}  // namespace torch_ext
