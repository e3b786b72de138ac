#pragma once

#include <filesystem>
#include <string>

#include "support/swapper_test.h"
#include "torch_ext/swap/file_transfer.h"

namespace torch_ext::test {

/// A directory for files, and options of FileTransfers.
class FileTransferTest : public SwapperTest {
 protected:
  static FileTransferOptions options() {
    return {.aio = {.block_size = 64 << 10}, .host_memory = 4 * kMiB};
  }
  FileTransferOptions scripted() const {
    FileTransferOptions result = options();
    result.engine_factory = faulty_factory("libaio", script_);
    return result;
  }
  std::filesystem::path path(const std::string& name) const {
    return dir_.path() / name;
  }
  std::filesystem::path path(int number) const {
    return path(std::to_string(number));
  }
};

}  // namespace torch_ext::test
