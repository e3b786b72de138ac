// Part of adamw_loops.h, which says how it is compiled. This part makes random
// bits.

#include "adamw_vectors.h"

template <typename Word>
TORCH_EXT_INLINE Word rotate(const Word& x, int by) {
  return (x << by) | (x >> (32 - by));
}

/// Threefry for one counter, or for eight at once.
template <typename Word>
TORCH_EXT_INLINE void threefry_rounds(Word (&x)[4],
                                      const std::uint32_t (&key)[4]) {
  constexpr int kTurns[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                {6, 20},  {17, 11}, {25, 10}, {18, 20}};
  const std::uint32_t keys[5] = {
      key[0], key[1], key[2], key[3],
      0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
  for (std::size_t i = 0; i < 4; ++i) x[i] += keys[i];
#pragma GCC unroll 5
  for (std::uint32_t four = 0; four < 5; ++four) {
#pragma GCC unroll 4
    for (std::uint32_t round = 0; round < 4; ++round) {
      const int(&turn)[2] = kTurns[(4 * four + round) % 8];
      const std::size_t second = round % 2 == 0 ? 1 : 3;
      const std::size_t fourth = 4 - second;
      x[0] += x[second];
      x[second] = rotate(x[second], turn[0]) ^ x[0];
      x[2] += x[fourth];
      x[fourth] = rotate(x[fourth], turn[1]) ^ x[2];
    }
    for (std::uint32_t i = 0; i < 4; ++i) x[i] += keys[(four + 1 + i) % 5];
    x[3] += four + 1;
  }
}

/// What the noise of a field's elements is made from.
struct Source {
  std::uint32_t key[4];
  std::uint32_t parameter;
  std::uint32_t field;
  std::uint64_t first_group;
};

TORCH_EXT_INLINE Source source_of(const RoundingNoise& noise,
                                  std::uint32_t field) {
  return {{static_cast<std::uint32_t>(noise.seed),
           static_cast<std::uint32_t>(noise.seed >> 32),
           static_cast<std::uint32_t>(noise.step),
           static_cast<std::uint32_t>(noise.step >> 32)},
          noise.parameter,
          field,
          noise.first / kGroup};
}

/// Draws for 64 elements, from `first` on, a multiple of 64. Each lane has a
/// counter. Element 8 * i + lane has half i % 2 of the lane's word i / 2.
TORCH_EXT_INLINE void draw(const Source& source, std::uint64_t first,
                           U32 (&words)[4]) {
  const std::uint64_t counter = (source.first_group + first / kGroup) * kLanes;
  words[0] = U32{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<std::uint32_t>(counter);
  words[1] = all(static_cast<std::uint32_t>(counter >> 32));
  words[2] = all(source.parameter);
  words[3] = all(source.field);
  threefry_rounds(words, source.key);
}

TORCH_EXT_INLINE U32 half_of(const U32 (&words)[4], std::size_t i) {
  return i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16;
}
