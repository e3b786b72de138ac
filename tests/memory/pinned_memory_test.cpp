#include "torch_ext/memory/pinned_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

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

/// The flags of the mapping that begins at `data`, as the kernel names them.
std::string flags_of(const std::byte* data) {
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<std::uintptr_t>(data) << '-';
  std::ifstream maps("/proc/self/smaps");
  bool found = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.starts_with(begin.str())) found = true;
    if (found && line.starts_with("VmFlags:")) return line + ' ';
  }
  return "";
}

TEST(PinnedMemoryTest, LargeOnesBeginAtHugePagesAndAskForThem) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  if (!std::filesystem::exists("/sys/kernel/mm/transparent_hugepage")) {
    GTEST_SKIP() << "this kernel has no transparent huge pages";
  }
  const auto memory = allocate_pinned(2 * kHugePage + 5'000, nullptr);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  EXPECT_EQ(address % kHugePage, 0u);
  EXPECT_NE(flags_of(memory.get()).find(" hg "), std::string::npos);
  // All of it is there, and no page more.
  EXPECT_TRUE(is_pinned(memory.get(), 2 * kHugePage + 8'192));
  EXPECT_FALSE(is_pinned(memory.get(), 2 * kHugePage + 8'193));
  memory.get()[2 * kHugePage + 8'191] = std::byte{1};
}

TEST(PinnedMemoryTest, IsPresentFromTheStart) {
#ifndef MADV_POPULATE_WRITE
  GTEST_SKIP() << "made for kernels before 5.14";
#else
  constexpr std::size_t kPages = 700;
  const auto memory = allocate_pinned(kPages * 4096, nullptr);
  if (madvise(memory.get(), 4096, MADV_POPULATE_WRITE) != 0) {
    GTEST_SKIP() << "this kernel does not know MADV_POPULATE_WRITE";
  }
  std::vector<unsigned char> present(kPages);
  ASSERT_EQ(mincore(memory.get(), kPages * 4096, present.data()), 0);
  EXPECT_TRUE(std::ranges::all_of(present, [](int page) { return page & 1; }));
#endif
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
