#pragma once

#include "torch_ext/tensor/tensor_file_transfer.h"

namespace torch_ext {

/// The former name, for one release.
using TensorFileSwapper = TensorFileTransfer;

}  // namespace torch_ext
