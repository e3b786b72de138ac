// libFuzzer's entry. The build says which target it is.

#include "targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  TORCH_EXT_FUZZ_TARGET(data, size);
  return 0;
}
