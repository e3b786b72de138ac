// Random requests against a model of the file, by seed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "support/engine_test.h"

namespace torch_ext {
namespace {

using test::AlignedBuffer;
using test::kLong;
using test::kPage;

constexpr std::size_t kFilePages = 128;
constexpr std::size_t kMaxPages = 9;
constexpr std::size_t kRequests = 1000;

/// One request in flight and what it will have done.
struct Flight {
  IoRequest request;
  AlignedBuffer memory;
  std::size_t first_page;
  std::size_t pages;
};

class IoEngineStress : public test::EngineTest {
 protected:
  void run_seed(std::uint64_t seed) {
    random_.seed(seed);
    model_.assign(kFilePages * kPage, std::byte{0});
    const File file = filled(model_.size(), seed);
    test::fill_pattern(model_, seed);
    // All direct or all buffered: read-ahead would mix them in one page.
    direct_ = seed % 2 == 0;
    const auto engine = make(static_cast<int>(1 + below(40)));
    std::uint64_t made = 0;
    while (made < kRequests || !flights_.empty()) {
      std::vector<IoRequest> batch;
      for (std::size_t i = below(12); i > 0 && made < kRequests; --i) {
        if (add_flight(direct_ ? file.fd() : file.buffered_fd(), made)) {
          batch.push_back(flights_.at(made++).request);
        }
      }
      const std::size_t taken = engine->submit(batch);
      for (std::size_t i = taken; i < batch.size(); ++i) {
        flights_.erase(batch[i].cookie);
      }
      std::vector<IoCompletion> done(1 + below(40));
      const std::size_t wanted = flights_.empty() ? 0 : below(done.size());
      const std::size_t count = engine->poll(done, wanted, kLong);
      ASSERT_GE(count, std::min(wanted, flights_.size()));
      for (std::size_t i = 0; i < count; ++i) land(done[i]);
      if (HasFailure()) return;
    }
    EXPECT_EQ(engine->poll({}, 0, kLong), 0u);
  }

 private:
  std::size_t below(std::size_t limit) { return random_() % limit; }

  /// False if the range drawn touches one in flight.
  bool add_flight(int fd, std::uint64_t cookie) {
    const std::size_t pages = 1 + below(kMaxPages);
    const std::size_t first = below(kFilePages - pages + 1);
    for (const auto& [key, other] : flights_) {
      if (first < other.first_page + other.pages &&
          other.first_page < first + pages) {
        return false;
      }
    }
    const std::size_t front = direct_ ? 0 : below(kPage / 2);
    const std::size_t back = direct_ ? 0 : below(kPage / 2);
    AlignedBuffer memory(pages * kPage - front - back);
    IoRequest request = read(fd, first * kPage + front, memory.bytes(), cookie);
    if (below(2) == 0) {
      request.op = IoRequest::Op::kWrite;
      test::fill_pattern(memory.bytes(), random_());
    }
    flights_.emplace(cookie, Flight{request, std::move(memory), first, pages});
    return true;
  }

  void land(const IoCompletion& done) {
    const auto found = flights_.find(done.cookie);
    ASSERT_NE(found, flights_.end()) << "twice or never: " << done.cookie;
    const IoRequest& request = found->second.request;
    ASSERT_EQ(done.result, static_cast<std::int64_t>(request.length));
    std::byte* expected = model_.data() + request.offset;
    if (request.op == IoRequest::Op::kWrite) {
      std::memcpy(expected, request.data, request.length);
    } else {
      ASSERT_EQ(std::memcmp(expected, request.data, request.length), 0)
          << "read at " << request.offset << " of " << request.length;
    }
    flights_.erase(found);
  }

  std::mt19937_64 random_;
  std::vector<std::byte> model_;
  std::map<std::uint64_t, Flight> flights_;
  bool direct_ = true;
};

INSTANTIATE_TEST_SUITE_P(Engines, IoEngineStress, test::kEngineCases,
                         test::engine_case_name);

TEST_P(IoEngineStress, RandomRequestsAgreeWithAModel) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    run_seed(seed);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace torch_ext
