#include "torch_ext/optim/adamw_update.h"

#include "adamw_dispatch.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Only inlined functions take and return vectors, so the warning about their
// ABI does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace torch_ext {
namespace {
#include "adamw_loops.h"

const AdamWLoops& loops() noexcept {
  static const AdamWLoops* const avx2 = avx2_adamw_loops();
  return avx2 != nullptr ? *avx2 : plain_adamw_loops();
}

}  // namespace

const AdamWLoops& plain_adamw_loops() noexcept { return kLoops; }

void threefry(const std::uint32_t (&counter)[4], const std::uint32_t (&key)[4],
              std::uint32_t (&out)[4]) noexcept {
  for (std::size_t i = 0; i < 4; ++i) out[i] = counter[i];
  threefry_rounds(out, key);
}

std::uint32_t noise_of(const RoundingNoise& noise, std::uint32_t field,
                       std::uint64_t element) noexcept {
  const Source source = source_of(noise, field);
  U32 words[4];
  draw(source, element / kGroup * kGroup, words);
  return half_of(words, element % kGroup / kLanes)[element % kLanes];
}

void join_master(const std::uint16_t* parameter, const std::uint16_t* low,
                 float* master, std::size_t count) noexcept {
  loops().join(parameter, low, master, count);
}

void split_master(const float* master, std::uint16_t* parameter,
                  std::uint16_t* low, std::size_t count) noexcept {
  loops().split(master, parameter, low, count);
}

void unpack_moment(StateFormat format, std::size_t field, const Moment& from,
                   float* to, std::uint64_t count) noexcept {
  loops().unpack(format, field, from, to, count);
}

void pack_moment(StateFormat format, std::size_t field, const float* from,
                 const Moment& to, std::uint64_t first, std::uint64_t count,
                 const RoundingNoise& noise) noexcept {
  loops().pack(format, field, from, to, first, count, noise);
}

void update_adamw(StateFormat format, const AdamWRun& run,
                  const AdamWCoefficients& with,
                  const RoundingNoise& noise) noexcept {
  loops().update(format, run, with, noise);
}

}  // namespace torch_ext
