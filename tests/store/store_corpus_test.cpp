// The fuzzer's corpus, run by whatever compiler there is. It was written from
// docs/file_format.md by another program. What begins with "bad" is refused.

#include <gtest/gtest.h>

#include <string>

#include "support/corpus.h"

namespace torch_ext {
namespace {

TEST(StoreCorpusTest, WhatIsNoPartOfAStoreIsRefused) {
  const auto inputs = test::corpus("store");
  for (const auto& [name, data] : inputs) {
    EXPECT_EQ(fuzz_store(data.data(), data.size()), !name.starts_with("bad"))
        << name;
  }
  EXPECT_GE(inputs.size(), 30u);
}

}  // namespace
}  // namespace torch_ext
