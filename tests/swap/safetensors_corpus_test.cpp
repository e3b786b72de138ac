// The fuzzer's corpus, run by whatever compiler there is.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int fuzz_safetensors(const std::uint8_t* data, std::size_t size);

namespace torch_ext {
namespace {

TEST(SafetensorsCorpusTest, EveryFileIsReadOrRefusedInAFewWords) {
  std::size_t files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(TORCH_EXT_SAFETENSORS_CORPUS)) {
    SCOPED_TRACE(entry.path());
    std::ifstream file(entry.path(), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    ASSERT_FALSE(file.bad());
    fuzz_safetensors(reinterpret_cast<const std::uint8_t*>(bytes.data()),
                     bytes.size());
    ++files;
  }
  EXPECT_GE(files, 60u);
}

}  // namespace
}  // namespace torch_ext
