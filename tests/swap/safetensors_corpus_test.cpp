// The fuzzer's corpus, run by whatever compiler there is. The library's verdict
// on each of these files is in safetensors_test.cpp.

#include <gtest/gtest.h>

#include "support/corpus.h"

namespace torch_ext {
namespace {

TEST(SafetensorsCorpusTest, EveryFileIsReadOrRefusedInAFewWords) {
  const auto inputs = test::corpus("safetensors");
  std::size_t read = 0;
  for (const auto& [name, data] : inputs) {
    read += fuzz_safetensors(data.data(), data.size()) ? 1u : 0u;
  }
  EXPECT_GE(inputs.size(), 60u);
  EXPECT_GE(read, 10u);
}

}  // namespace
}  // namespace torch_ext
