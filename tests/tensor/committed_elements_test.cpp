// Boxes of a whole are found in the shards that it was cut into, whatever the
// orders of dimensions are: compared element by element.

#include "tensor/committed_elements.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace torch_ext {
namespace {

using Numbers = std::vector<std::uint64_t>;

std::uint64_t volume(const Numbers& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::uint64_t{1},
                         std::multiplies<>());
}

/// The index of an element of a box, as it lies there, in the whole.
Numbers place_of(const TensorBox& box, std::uint64_t element) {
  Numbers place(box.sizes.size());
  for (std::size_t i = box.order.size(); i-- > 0;) {
    const std::uint64_t dim = box.order[i];
    place[dim] = box.begin[dim] + element % box.sizes[dim];
    element /= box.sizes[dim];
  }
  return place;
}

class ShardMapTest : public testing::Test {
 protected:
  std::uint64_t below(std::uint64_t most) { return random_() % most; }

  Numbers any_order(std::size_t dims) {
    Numbers order(dims);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    if (below(2) == 0) std::ranges::shuffle(order, random_);
    return order;
  }

  /// Cuts a box in two again and again.
  std::vector<TensorBox> cut(const Numbers& whole, int times) {
    std::vector<TensorBox> parts{
        {Numbers(whole.size()), whole, any_order(whole.size())}};
    for (int i = 0; i < times && !whole.empty(); ++i) {
      TensorBox& part = parts[below(parts.size())];
      const std::size_t dim = below(whole.size());
      const std::uint64_t low = below(part.sizes[dim] + 1);
      TensorBox rest = part;
      rest.begin[dim] += low;
      rest.sizes[dim] -= low;
      rest.order = any_order(whole.size());
      part.sizes[dim] = low;
      parts.push_back(std::move(rest));
    }
    std::ranges::shuffle(parts, random_);
    return parts;
  }

  std::mt19937 random_;
};

TEST_F(ShardMapTest, EveryElementIsThatOfTheWhole) {
  for (unsigned seed = 0; seed < 500; ++seed) {
    SCOPED_TRACE(seed);
    random_.seed(seed);
    Numbers whole(below(5));
    for (std::uint64_t& size : whole) size = 1 + below(6);
    const std::vector<TensorBox> shards =
        cut(whole, static_cast<int>(below(7)));
    TensorBox target{whole, whole, any_order(whole.size())};
    for (std::size_t d = 0; d < whole.size(); ++d) {
      target.begin[d] = below(whole[d]);
      target.sizes[d] = below(whole[d] - target.begin[d] + 1);
    }
    const ShardMap map(shards, target);
    const std::uint64_t all = volume(target.sizes);
    const std::uint64_t first = below(all + 1);
    const std::uint64_t count = below(all - first + 1);
    std::uint64_t next = first;
    map.visit(first, count,
              [&](std::size_t shard, std::uint64_t from, std::uint64_t stride,
                  std::uint64_t run) {
                ASSERT_GT(run, 0u);
                for (; run > 0; --run, from += stride) {
                  ASSERT_LT(from, volume(shards[shard].sizes));
                  ASSERT_EQ(place_of(shards[shard], from),
                            place_of(target, next++));
                }
              });
    EXPECT_EQ(next, first + count);
  }
}

TEST(ShardMapOfRowsTest, RowsAreOneRun) {
  // The usual division, with any number of dimensions.
  const Numbers order{0, 1, 2};
  const std::vector<TensorBox> shards{{{0, 0, 0}, {5, 7, 3}, order},
                                      {{5, 0, 0}, {4, 7, 3}, order}};
  const ShardMap map(shards, {{3, 0, 0}, {6, 7, 3}, order});
  std::vector<Numbers> runs;
  map.visit(0, 126,
            [&](std::size_t shard, std::uint64_t from, std::uint64_t stride,
                std::uint64_t run) {
              runs.push_back({shard, from, stride, run});
            });
  EXPECT_EQ(runs, (std::vector<Numbers>{{0, 63, 1, 42}, {1, 0, 1, 84}}));
}

TEST(ShardMapOfStrangersTest, BoxesThatCannotBeAreRefused) {
  const TensorBox whole{{0, 0}, {4, 4}, {0, 1}};
  const auto refused = [&](const TensorBox& shard, const TensorBox& target) {
    EXPECT_THROW(ShardMap({shard}, target), std::invalid_argument);
  };
  refused({{0, 0}, {4, 3}, {0, 1}}, whole);  // Not all of it.
  refused({{0, 0}, {4}, {0, 1}}, whole);     // Dimensions differ.
  refused({{0, 0}, {4, 4}, {1, 1}}, whole);  // No order.
  refused({{0, 0}, {4, 4}, {0, 2}}, whole);
  const std::uint64_t huge = std::uint64_t{1} << 40;
  refused({{0, 0}, {huge, huge}, {0, 1}}, whole);  // 2^80 elements.
  refused(whole, {{~std::uint64_t{0}, 0}, {4, 4}, {0, 1}});
  // Two that overlap, and so have as many elements as are asked for.
  const TensorBox half{{0, 0}, {2, 4}, {0, 1}};
  const ShardMap overlapping({half, half}, whole);
  EXPECT_THROW(overlapping.visit(0, 16, [](auto...) {}), std::invalid_argument);
}

}  // namespace
}  // namespace torch_ext
