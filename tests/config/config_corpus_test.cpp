// The fuzzer's corpus, run by whatever compiler there is.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size);

namespace torch_ext {
namespace {

TEST(ConfigCorpusTest, EveryTextIsReadOrRefusedInAFewWords) {
  std::size_t files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(TORCH_EXT_CONFIG_CORPUS)) {
    SCOPED_TRACE(entry.path());
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    ASSERT_FALSE(file.bad());
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()),
                           text.size());
    ++files;
  }
  EXPECT_GE(files, 40u);
}

}  // namespace
}  // namespace torch_ext
