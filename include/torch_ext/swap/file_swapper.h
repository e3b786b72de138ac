#pragma once

#include "torch_ext/swap/file_transfer.h"

namespace torch_ext {

/// The former name, for one release.
using FileSwapper = FileTransfer;

}  // namespace torch_ext
