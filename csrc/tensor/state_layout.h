#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_ext/optim/state_format.h"

namespace torch_ext {

/// Returns how the master of a parameter of this dtype is kept.
inline MasterFormat master_format(c10::ScalarType dtype) {
  return dtype == at::kFloat      ? MasterFormat::kNone
         : dtype == at::kBFloat16 ? MasterFormat::kLow16
                                  : MasterFormat::kFloat;
}

/// The tensors of a parameter's state: how they are shown, and how they lie in
/// tiles. Each is a field. What is kept of the master of a 16-bit parameter is
/// one more field, after them; it is shown as float.
struct StateLayout {
  struct Field {
    std::string name;
    c10::ScalarType dtype = at::kFloat;

    bool operator==(const Field&) const = default;
  };

  static constexpr const char* kMaster = "master_param";

  std::vector<Field> fields;  ///< Without the master.
  MasterFormat master = MasterFormat::kNone;
  /// Fields that are not kExact are AdamW's two moments, packed.
  StateFormat format = StateFormat::kExact;

  bool has_master() const { return master != MasterFormat::kNone; }
  std::size_t tensors() const { return fields.size() + (has_master() ? 1 : 0); }
  bool is_master(std::size_t tensor) const { return tensor == fields.size(); }
  const char* name(std::size_t tensor) const {
    return is_master(tensor) ? kMaster : fields.at(tensor).name.c_str();
  }
  c10::ScalarType dtype(std::size_t tensor) const {
    return is_master(tensor) ? at::kFloat : fields.at(tensor).dtype;
  }

  /// How the fields lie in tiles. Errors: std::invalid_argument.
  StateFields in_tiles() const {
    if (format != StateFormat::kExact) return adamw_fields(format, master);
    if (tensors() > StateFields::kMax) {
      throw std::invalid_argument("optimizer: more than " +
                                  std::to_string(StateFields::kMax) +
                                  " fields for an element");
    }
    StateFields result;
    const auto put = [&](std::size_t field, std::size_t bytes) {
      result.bytes_per_cut.at(field) =
          static_cast<std::uint32_t>(bytes * StateFields::kCut);
    };
    for (std::size_t i = 0; i < fields.size(); ++i) {
      put(i, c10::elementSize(fields[i].dtype));
    }
    if (has_master()) {
      put(fields.size(), master == MasterFormat::kLow16 ? 2 : 4);
    }
    return result;
  }

  bool operator==(const StateLayout&) const = default;
};

}  // namespace torch_ext
