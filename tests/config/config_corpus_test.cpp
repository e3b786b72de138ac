// The fuzzer's corpus, run by whatever compiler there is.

#include <gtest/gtest.h>

#include "support/corpus.h"

namespace torch_ext {
namespace {

TEST(ConfigCorpusTest, EveryTextIsReadOrRefusedInAFewWords) {
  const auto inputs = test::corpus("config");
  for (const auto& [name, data] : inputs) {
    SCOPED_TRACE(name);
    fuzz_config(data.data(), data.size());
  }
  EXPECT_GE(inputs.size(), 40u);
}

}  // namespace
}  // namespace torch_ext
