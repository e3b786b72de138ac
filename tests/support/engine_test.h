#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "support/aligned_buffer.h"
#include "support/pattern.h"
#include "support/temp_dir.h"
#include "torch_ext/io/file.h"
#include "torch_ext/io/io_engine.h"

namespace torch_ext::test {

constexpr std::size_t kPage = 4096;
/// Longer than any working wait; a broken one fails instead of hanging.
constexpr std::chrono::nanoseconds kLong = std::chrono::seconds(60);

/// An engine and where its files lie: empty for the temporary directory.
struct EngineCase {
  const char* engine;
  const char* place;
};

inline std::string engine_case_name(
    const testing::TestParamInfo<EngineCase>& info) {
  return std::string(info.param.engine) + "_" +
         (std::string(info.param.place) == "/dev/shm" ? "tmpfs" : "disk");
}

class EngineTest : public testing::TestWithParam<EngineCase> {
 protected:
  void SetUp() override {
    const std::string reason = engine_unavailable_reason(GetParam().engine);
    if (!reason.empty()) GTEST_SKIP() << reason;
    if (access(place().c_str(), W_OK) != 0) GTEST_SKIP() << "no " << place();
  }

  static std::filesystem::path place() {
    const std::string place = GetParam().place;
    return place.empty() ? test::temp_parent() : std::filesystem::path(place);
  }
  static bool is(std::string_view engine) {
    return GetParam().engine == engine;
  }

  std::unique_ptr<IoEngine> make(int depth) { return factory_(depth); }
  static File scratch() { return File::scratch(place()); }

  /// A file that holds pattern `seed` up to `size`, any number.
  File filled(std::uint64_t size, std::uint64_t seed) {
    File file = scratch();
    AlignedBuffer bytes(size);
    fill_pattern(bytes.bytes(), seed);
    if (is("memory")) {
      EXPECT_EQ(run(*make(1), write(file.buffered_fd(), 0, bytes.bytes())),
                static_cast<std::int64_t>(size));
    } else {  // Contexts of libaio take long to destroy.
      EXPECT_EQ(pwrite(file.buffered_fd(), bytes.data(), size, 0),
                static_cast<ssize_t>(size));
    }
    return file;
  }

  /// The one request's result.
  static std::int64_t run(IoEngine& engine, const IoRequest& request) {
    EXPECT_EQ(engine.submit({&request, 1}), 1u);
    IoCompletion done;
    EXPECT_EQ(engine.poll({&done, 1}, 1, kLong), 1u);
    EXPECT_EQ(done.cookie, request.cookie);
    return done.result;
  }

  /// All requests' results by cookie, each of which must come once.
  static std::map<std::uint64_t, std::int64_t> run_all(
      IoEngine& engine, std::span<const IoRequest> requests) {
    std::map<std::uint64_t, std::int64_t> results;
    std::vector<IoCompletion> done(requests.size());
    std::size_t submitted = 0;
    while (results.size() < requests.size()) {
      submitted += engine.submit(requests.subspan(submitted));
      const std::size_t count = engine.poll(done, 1, kLong);
      if (count == 0) {
        ADD_FAILURE() << "nothing completed";
        break;
      }
      for (const IoCompletion& completion : std::span(done).first(count)) {
        EXPECT_TRUE(
            results.emplace(completion.cookie, completion.result).second)
            << "twice: " << completion.cookie;
      }
    }
    return results;
  }

  static IoRequest read(int fd, std::uint64_t offset,
                        std::span<std::byte> bytes, std::uint64_t cookie = 7) {
    return {.op = IoRequest::Op::kRead,
            .fd = fd,
            .offset = offset,
            .data = bytes.data(),
            .length = bytes.size(),
            .cookie = cookie};
  }
  static IoRequest write(int fd, std::uint64_t offset,
                         std::span<std::byte> bytes, std::uint64_t cookie = 7) {
    IoRequest request = read(fd, offset, bytes, cookie);
    request.op = IoRequest::Op::kWrite;
    return request;
  }

  /// Pages of one file to read: request i reads page i into buffer's page i.
  static std::vector<IoRequest> page_reads(int fd,
                                           const AlignedBuffer& buffer) {
    std::vector<IoRequest> requests;
    for (std::size_t i = 0; i < buffer.size() / kPage; ++i) {
      requests.push_back(
          read(fd, i * kPage, buffer.bytes(i * kPage, kPage), i));
    }
    return requests;
  }

  const IoEngineFactory factory_ = make_engine_factory(GetParam().engine);
};

/// Every engine that moves bytes, on a disk and in memory.
inline const auto kEngineCases = testing::Values(
    EngineCase{"libaio", ""}, EngineCase{"libaio", "/dev/shm"},
    EngineCase{"io_uring", ""}, EngineCase{"io_uring", "/dev/shm"},
    EngineCase{"threads", ""}, EngineCase{"threads", "/dev/shm"},
    EngineCase{"memory", ""});

}  // namespace torch_ext::test
