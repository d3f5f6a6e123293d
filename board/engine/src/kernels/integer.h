// Products of integer weights with activations rounded to levels. Sums within a group of columns are exact integers,
// whatever the instruction set; the float sum of an output has one order:
//   y = 0; where there are zero points, for each group: y = fma(sum of its activations, -scale of the group * zero, y)
//   for each block: b = 0; for each of its groups: b = fma(sum, scale of the group, b); y = fma(b, scale of the block, y)
//   where a row has one scale, b is the block's sum, and y is scaled at the end
// Its file brings, before it includes this:
//   kIntRows, kIntPanel       tokens and outputs of a tile
//   store_levels              one block of activations in the order its products read, and what they need besides of
//                             each group of columns that share a scale of the weight
//   pack_int8, pack_int4      <precision>: one block of kIntPanel rows of a weight
//   int_tile                  <tokens, group, precision>: a block: c[t][o] += scale[t] * sum over groups g of row_scale[g][o]
//                             * product; group 0: c[t][o] += scale[t] * product
//   kRoundsBfloat16           whether there is kBfloat16Linear: rows [first, last) by products of bfloat16
//   kDotRows, dots            the same for whole rows of a weight, in place, with one token; writes kDotRows numbers, also
//                             where fewer rows are left
#pragma once

#include "panels.h"

namespace axc {
namespace {

inline void round_to_bfloat16(const float* x, size_t first, size_t last, const Activations& out) {
  for (size_t row = first; row < last; ++row) {
    for (size_t block = 0; block < out.blocks(); ++block) {
      const size_t begin = block * kBlock, count = least(kBlock, out.columns - begin);
      uint8_t* to = out.levels + out.entry(block, row) * kLevelBytes;
      std::memset(to, 0, kLevelBytes);
      narrow(Type::BFloat16, x + row * out.columns + begin, count, to);
    }
  }
}

// Of each group of a block the sum of the values that the levels stand for.
inline void store_totals(const int16_t* levels, float scale, size_t group, float* out) {
  for (size_t begin = 0; begin < kBlock; begin += group) {
    int32_t sum = 0;
    for (size_t i = begin; i < begin + group; ++i) sum += levels[i];
    *out++ = static_cast<float>(sum) * scale;
  }
}

// The magnitude's bits order as the magnitudes do; a NaN or an infinity makes its block NaN.
inline void quantise(const float* x, Arithmetic order, size_t first, size_t last, const Activations& out) {
  if (order == Arithmetic::BFloat16) return round_to_bfloat16(x, first, last, out);
  constexpr float kRound = 12582912.0f;
  const float top = top_level(out.precision);
  for (size_t row = first; row < last; ++row) {
    for (size_t block = 0; block < out.blocks(); ++block) {
      const size_t begin = block * kBlock, count = least(kBlock, out.columns - begin);
      alignas(64) float values[kBlock] = {};
      alignas(64) int16_t levels[kBlock];
      std::memcpy(values, x + row * out.columns + begin, count * sizeof(float));
      int32_t peak = 0;
      for (size_t i = 0; i < kBlock; ++i) {
        const int32_t size = std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF;
        peak = size > peak ? size : peak;
      }
      const float largest = std::bit_cast<float>(peak);
      const bool finite = peak < 0x7F800000;
      const float factor = finite && largest > 1e-30f ? top / largest : 0.0f;
      for (size_t i = 0; i < kBlock; ++i) {
        const int32_t level = std::bit_cast<int32_t>(values[i] * factor + kRound) - std::bit_cast<int32_t>(kRound);
        levels[i] = static_cast<int16_t>(finite ? level : 0);
      }
      const size_t entry = out.entry(block, row), groups = out.groups();
      const float scale = finite ? largest / top : std::bit_cast<float>(0x7FC00000);
      for (size_t g = 0; g < groups; ++g) out.scales[entry * groups + g] = scale;
      store_levels(levels, out, order, out.levels + entry * kLevelBytes, out.sums + entry * groups);
      if (out.totals) store_totals(levels, scale, out.group, out.totals + (row * out.blocks() + block) * groups);
    }
  }
}

// Rows as they lie in memory: what bounds this is how fast the weight is read.
inline void int_linear_in_place(const LinearJob& job, size_t first, size_t last, void* scratch) {
  static_assert(kPanel % kDotRows == 0);
  const Matrix& w = *job.weight;
  const bool by_row = w.arithmetic == Arithmetic::Int8;
  float* c = static_cast<float*>(scratch);
  float* scales = c + kTokensByDot * kPanel;
  for (size_t row = first; row < last; row += kPanel) {
    const size_t rows = least(kPanel, last - row);
    std::memset(c, 0, job.tokens * kPanel * sizeof(float));
    if (w.zeros) subtract_zeros(w, *job.levels, row, rows, 0, job.tokens, scales, c);
    for (size_t r = 0; r < rows; r += kDotRows) {
      for (size_t t = 0; t < job.tokens; ++t) dots(w, row + r, *job.levels, t, c + t * kPanel + r);
    }
    if (by_row) widen(w.scale_type, static_cast<const uint8_t*>(w.scales) + row * w.scale_bytes(), rows, scales);
    for (size_t t = 0; t < job.tokens; ++t) finish_rows(job, t, row, rows, c + t * kPanel, by_row ? scales : nullptr);
  }
}

inline void linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  const Arithmetic arithmetic = job.weight->arithmetic;
  if (kRoundsBfloat16 && arithmetic == Arithmetic::BFloat16) {
    kBfloat16Linear(job, first, last, scratch);
  } else if (arithmetic == Arithmetic::Float || arithmetic == Arithmetic::BFloat16) {
    float_linear(job, first, last, scratch);
  } else if (job.tokens > kTokensByDot) {
    const bool narrow = job.levels->precision == Precision::Bits8;
    (narrow ? panel_linear<Precision::Bits8> : panel_linear<Precision::Bits16>)(job, first, last, scratch);
  } else {
    int_linear_in_place(job, first, last, scratch);
  }
}

}  // namespace
}  // namespace axc
