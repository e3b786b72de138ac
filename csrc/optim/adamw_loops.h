// A source file for each instruction set includes this, inside a namespace of
// its own and after the headers. The linker keeps one copy of each inline
// function, and that copy must run on every processor. So nothing of the
// standard library is called here.
//
// Vectors of eight use the compiler's vector types. An operation becomes one
// instruction with AVX2, and several without. All arithmetic is exact, or
// rounds as IEEE 754 says. So results do not depend on the instruction set.

#include "adamw_formats.h"

// ---- A block of kBlock elements --------------------------------------------

template <StateFormat kFormat, std::size_t kField>
TORCH_EXT_INLINE void unpack(const Moment& from, std::size_t block, float* to) {
  if constexpr (kFormat == StateFormat::kBf16) {
    unpack_bf16(from.values + 2 * kBlock * block, to);
  } else {
    unpack_int8<kField == AdamWFields::kExpAvg>(from.values + kBlock * block,
                                                from.scales[block], to);
  }
}

template <StateFormat kFormat, std::size_t kField>
TORCH_EXT_INLINE void pack(const float* from, const Moment& to,
                           std::size_t block, const Source& source,
                           std::uint64_t first) {
  if constexpr (kFormat == StateFormat::kBf16) {
    pack_bf16(from, to.values + 2 * kBlock * block, source, first);
  } else {
    pack_int8<kField == AdamWFields::kExpAvg>(from, to.values + kBlock * block,
                                              to.scales + block, source, first);
  }
}

TORCH_EXT_INLINE void average(float* exp_avg, float* exp_avg_sq,
                              const F32& gradient,
                              const AdamWCoefficients& with) {
  const F32 m = load<F32>(exp_avg);
  store(exp_avg, m + (gradient - m) * with.exp_avg);
  store(exp_avg_sq, load<F32>(exp_avg_sq) * with.beta2 +
                        (gradient * gradient) * with.exp_avg_sq);
}

/// Finds what a step takes off the masters of a block.
TORCH_EXT_INLINE void find_changes(const float* exp_avg,
                                   const float* exp_avg_sq, float* changes,
                                   const AdamWCoefficients& with) {
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    const F32 root =
        square_root(load<F32>(exp_avg_sq + i)) * with.inverse_root + with.eps;
    store(changes + i, load<F32>(exp_avg + i) * with.step_size / root);
  }
}

TORCH_EXT_INLINE void change_floats(float* masters, const float* changes,
                                    float decay) {
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    store(masters + i, load<F32>(masters + i) * decay - load<F32>(changes + i));
  }
}

TORCH_EXT_INLINE void change_halves(std::uint16_t* parameters,
                                    std::uint16_t* lows, const float* changes,
                                    float decay) {
  for (std::size_t i = 0; i < kBlock; i += 2 * kLanes) {
    Pair master = join(load<Wide16>(parameters + i), load<Wide16>(lows + i));
    const Pair change = load_pair(changes + i);
    master.first =
        as<U32>(as<F32>(master.first) * decay - as<F32>(change.first));
    master.second =
        as<U32>(as<F32>(master.second) * decay - as<F32>(change.second));
    Wide16 parameter, low;
    split(master, parameter, low);
    store(parameters + i, parameter);
    store(lows + i, low);
  }
}

/// Updates one whole block of a run. The loops are short, so that a processor
/// has several of their rounds under way at a time. That hides how long roots
/// and quotients take.
template <StateFormat kFormat>
inline void update_block(const AdamWRun& run, std::size_t block,
                         const AdamWCoefficients& with, const Source& exp_avg,
                         const Source& exp_avg_sq) {
  alignas(64) float m[kBlock];
  alignas(64) float v[kBlock];
  alignas(64) float changes[kBlock];
  unpack<kFormat, AdamWFields::kExpAvg>(run.exp_avg, block, m);
  unpack<kFormat, AdamWFields::kExpAvgSq>(run.exp_avg_sq, block, v);
  const U32 sign = all(with.maximize ? ~kMagnitude : 0u);
  const std::size_t begin = block * kBlock;
  for (std::size_t i = 0; i < kBlock; i += kLanes) {
    const U32 bits = run.gradient != nullptr
                         ? load<U32>(run.gradient + begin + i)
                         : load_u16(run.gradient_bf16 + begin + i) << 16;
    average(m + i, v + i, as<F32>(bits ^ sign), with);
  }
  find_changes(m, v, changes, with);
  if (run.master != nullptr) {
    change_floats(run.master + begin, changes, with.decay);
  } else {
    change_halves(run.parameter_bf16 + begin, run.low + begin, changes,
                  with.decay);
  }
  const std::uint64_t first = run.first + begin;
  pack<kFormat, AdamWFields::kExpAvg>(m, run.exp_avg, block, exp_avg, first);
  pack<kFormat, AdamWFields::kExpAvgSq>(v, run.exp_avg_sq, block, exp_avg_sq,
                                        first);
}

/// The last elements of a run, fewer than a block, in memory for a whole block.
struct Tail {
  float gradient[kBlock] = {};
  std::uint16_t gradient_bf16[kBlock] = {};
  float master[kBlock] = {};
  std::uint16_t parameter_bf16[kBlock] = {};
  std::uint16_t low[kBlock] = {};
  std::byte exp_avg[2 * kBlock] = {};
  std::byte exp_avg_sq[2 * kBlock] = {};
};

TORCH_EXT_INLINE void copy_bytes(void* to, const void* from,
                                 std::size_t bytes) {
  if (from != nullptr && to != nullptr) __builtin_memcpy(to, from, bytes);
}

template <StateFormat kFormat>
inline void update(const AdamWRun& run, const AdamWCoefficients& with,
                   const RoundingNoise& noise) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const Source exp_avg = source_of(noise, AdamWFields::kExpAvg);
  const Source exp_avg_sq = source_of(noise, AdamWFields::kExpAvgSq);
  const std::size_t whole = run.count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    update_block<kFormat>(run, block, with, exp_avg, exp_avg_sq);
  }
  const std::size_t left = run.count % kBlock;
  if (left == 0) return;
  Tail tail;
  const std::size_t at = whole * kBlock;
  // Advances a pointer that may be null.
  const auto end_of = [at](auto* pointer) {
    return pointer != nullptr ? pointer + at : nullptr;
  };
  std::byte* const m = run.exp_avg.values + at * kBytes;
  std::byte* const v = run.exp_avg_sq.values + at * kBytes;
  copy_bytes(tail.gradient, end_of(run.gradient), 4 * left);
  copy_bytes(tail.gradient_bf16, end_of(run.gradient_bf16), 2 * left);
  copy_bytes(tail.master, end_of(run.master), 4 * left);
  copy_bytes(tail.parameter_bf16, end_of(run.parameter_bf16), 2 * left);
  copy_bytes(tail.low, end_of(run.low), 2 * left);
  copy_bytes(tail.exp_avg, m, kBytes * left);
  copy_bytes(tail.exp_avg_sq, v, kBytes * left);
  std::byte* const m_scale = run.exp_avg.scales;
  std::byte* const v_scale = run.exp_avg_sq.scales;
  update_block<kFormat>(
      {run.first + at,
       kBlock,
       {tail.exp_avg, m_scale != nullptr ? m_scale + whole : nullptr},
       {tail.exp_avg_sq, v_scale != nullptr ? v_scale + whole : nullptr},
       run.gradient != nullptr ? tail.gradient : nullptr,
       tail.gradient_bf16,
       run.master != nullptr ? tail.master : nullptr,
       tail.parameter_bf16,
       tail.low},
      0, with, exp_avg, exp_avg_sq);
  copy_bytes(end_of(run.master), tail.master, 4 * left);
  copy_bytes(end_of(run.parameter_bf16), tail.parameter_bf16, 2 * left);
  copy_bytes(end_of(run.low), tail.low, 2 * left);
  copy_bytes(m, tail.exp_avg, kBytes * left);
  copy_bytes(v, tail.exp_avg_sq, kBytes * left);
}

template <StateFormat kFormat, std::size_t kField>
inline void unpack_all(const Moment& from, float* to, std::uint64_t count) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const std::size_t whole = count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    unpack<kFormat, kField>(from, block, to + block * kBlock);
  }
  const std::size_t left = count % kBlock;
  if (left == 0) return;
  std::byte in[kBytes * kBlock] = {};
  float out[kBlock];
  __builtin_memcpy(in, from.values + kBytes * kBlock * whole, kBytes * left);
  unpack<kFormat, kField>(
      {in, from.scales != nullptr ? from.scales + whole : nullptr}, 0, out);
  __builtin_memcpy(to + whole * kBlock, out, 4 * left);
}

template <StateFormat kFormat, std::size_t kField>
inline void pack_all(const float* from, const Moment& to, std::uint64_t first,
                     std::uint64_t count, const RoundingNoise& noise) {
  constexpr std::size_t kBytes = kFormat == StateFormat::kBf16 ? 2 : 1;
  const Source source = source_of(noise, kField);
  const std::size_t whole = count / kBlock;
  for (std::size_t block = 0; block < whole; ++block) {
    pack<kFormat, kField>(from + block * kBlock, to, block, source,
                          first + block * kBlock);
  }
  const std::size_t left = count % kBlock;
  if (left == 0) return;
  float in[kBlock] = {};
  std::byte out[kBytes * kBlock];
  __builtin_memcpy(in, from + whole * kBlock, 4 * left);
  pack<kFormat, kField>(
      in, {out, to.scales != nullptr ? to.scales + whole : nullptr}, 0, source,
      first + whole * kBlock);
  __builtin_memcpy(to.values + kBytes * kBlock * whole, out, kBytes * left);
}

TORCH_EXT_INLINE void store_pair(float* to, const Pair& pair) {
  const Pair in_order = pair_of(pair.first, pair.second);
  store(to, in_order.first);
  store(to + kLanes, in_order.second);
}

inline void join_all(const std::uint16_t* parameter, const std::uint16_t* low,
                     float* master, std::size_t count) {
  constexpr std::size_t kStep = 2 * kLanes;
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    store_pair(master + i,
               join(load<Wide16>(parameter + i), load<Wide16>(low + i)));
  }
  if (i == count) return;
  std::uint16_t ends[2][kStep] = {};
  float out[kStep];
  __builtin_memcpy(ends[0], parameter + i, 2 * (count - i));
  __builtin_memcpy(ends[1], low + i, 2 * (count - i));
  store_pair(out, join(load<Wide16>(ends[0]), load<Wide16>(ends[1])));
  __builtin_memcpy(master + i, out, 4 * (count - i));
}

inline void split_all(const float* master, std::uint16_t* parameter,
                      std::uint16_t* low, std::size_t count) {
  constexpr std::size_t kStep = 2 * kLanes;
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Wide16 rounded, rest;
    split(load_pair(master + i), rounded, rest);
    if (parameter != nullptr) store(parameter + i, rounded);
    store(low + i, rest);
  }
  if (i == count) return;
  float in[kStep] = {};
  __builtin_memcpy(in, master + i, 4 * (count - i));
  Wide16 rounded, rest;
  split(load_pair(in), rounded, rest);
  if (parameter != nullptr)
    copy_bytes(parameter + i, &rounded, 2 * (count - i));
  copy_bytes(low + i, &rest, 2 * (count - i));
}

inline void unpack_any(StateFormat format, std::size_t field,
                       const Moment& from, float* to, std::uint64_t count) {
  const bool is_signed = field == AdamWFields::kExpAvg;
  if (format == StateFormat::kBf16) {
    unpack_all<StateFormat::kBf16, 0>(from, to, count);
  } else if (is_signed) {
    unpack_all<StateFormat::kInt8, AdamWFields::kExpAvg>(from, to, count);
  } else {
    unpack_all<StateFormat::kInt8, AdamWFields::kExpAvgSq>(from, to, count);
  }
}

inline void pack_any(StateFormat format, std::size_t field, const float* from,
                     const Moment& to, std::uint64_t first, std::uint64_t count,
                     const RoundingNoise& noise) {
  constexpr std::size_t kExpAvg = AdamWFields::kExpAvg;
  constexpr std::size_t kExpAvgSq = AdamWFields::kExpAvgSq;
  const bool is_signed = field == kExpAvg;
  if (format == StateFormat::kBf16) {
    if (is_signed) {
      pack_all<StateFormat::kBf16, kExpAvg>(from, to, first, count, noise);
    } else {
      pack_all<StateFormat::kBf16, kExpAvgSq>(from, to, first, count, noise);
    }
  } else if (is_signed) {
    pack_all<StateFormat::kInt8, kExpAvg>(from, to, first, count, noise);
  } else {
    pack_all<StateFormat::kInt8, kExpAvgSq>(from, to, first, count, noise);
  }
}

inline void update_any(StateFormat format, const AdamWRun& run,
                       const AdamWCoefficients& with,
                       const RoundingNoise& noise) {
  if (format == StateFormat::kBf16) {
    update<StateFormat::kBf16>(run, with, noise);
  } else {
    update<StateFormat::kInt8>(run, with, noise);
  }
}

constexpr AdamWLoops kLoops = {join_all, split_all, unpack_any, pack_any,
                               update_any};
