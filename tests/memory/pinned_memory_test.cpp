#include "torch_ext/memory/pinned_memory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>

#include "support/fake_cuda.h"
#include "torch_ext/base/error.h"

namespace torch_ext {
namespace {

TEST(PinnedMemoryTest, IsWholePagesThatAreKnownWhileTheyLive) {
  std::shared_ptr<std::byte> memory = allocate_pinned(10'000, nullptr);
  std::byte* const data = memory.get();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 4096, 0u);
  EXPECT_EQ(data[9'999], std::byte{0});
  EXPECT_TRUE(is_pinned(data, 10'000));
  EXPECT_TRUE(is_pinned(data + 5'000, 5'000));
  EXPECT_FALSE(is_pinned(data + 5'000, 10'000));
  EXPECT_FALSE(is_pinned(data - 1, 2));
  memory.reset();
  EXPECT_FALSE(is_pinned(data, 1));
}

TEST(PinnedMemoryTest, DisownedItLivesAsLongAsItsReferences) {
  const std::shared_ptr<std::byte> memory = allocate_pinned(1, nullptr);
  EXPECT_FALSE(disown_pinned(memory.get() + 1));
  EXPECT_TRUE(disown_pinned(memory.get()));
  EXPECT_FALSE(disown_pinned(memory.get()));
  EXPECT_FALSE(is_pinned(memory.get(), 1));
  *memory = std::byte{1};
}

TEST(PinnedMemoryTest, IsPageLockedWhereThereIsACudaRuntimeAndElseSaysWhyNot) {
  test::FakeCuda fake;
  const auto cuda = CudaRuntime::open(fake.path());
  ASSERT_NE(cuda, nullptr);
  std::string why_not;
  std::shared_ptr<std::byte> memory = allocate_pinned(10'000, cuda, &why_not);
  EXPECT_EQ(why_not, "");
  EXPECT_EQ(fake.registered_bytes(), 12'288u);
  memory.reset();
  EXPECT_EQ(fake.registered_bytes(), 0u);
  fake.fail_next(2);
  memory = allocate_pinned(10'000, cuda, &why_not);
  EXPECT_NE(why_not, "");
  EXPECT_TRUE(is_pinned(memory.get(), 10'000));
  memory.reset();
  EXPECT_EQ(fake.registered_bytes(), 0u);
}

TEST(PinnedMemoryTest, MemoryThatCannotBeHadIsAnError) {
  EXPECT_THROW(allocate_pinned(std::size_t{1} << 60, nullptr), IoError);
  EXPECT_THROW(allocate_pinned(~std::size_t{0}, nullptr), IoError);
}

}  // namespace
}  // namespace torch_ext
