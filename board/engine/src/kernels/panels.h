// Products of many tokens for any instruction set: a block of a weight's rows is packed into a panel, outputs across the
// lanes, and multiplied with a few tokens at a time.
#pragma once

#include <utility>

#include "float_linear.h"

namespace axc {
namespace {

constexpr size_t kPanelBytes = (2 * kBlock + sizeof(int32_t)) * kIntPanel;  // 16-bit weights, and a number for each row

using IntTile = void (*)(const uint8_t*, const uint8_t*, const float*, const int32_t*, int32_t, const float*, float*);

template <bool kScaled, Precision kPrecision, size_t... kRows>
constexpr ByCount<IntTile, sizeof...(kRows)> int_tiles(std::index_sequence<kRows...>) {
  return {{int_tile<kRows + 1, kScaled, kPrecision>...}};
}

template <Precision kPrecision>
void panel_linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  static constexpr auto kPlain = int_tiles<false, kPrecision>(std::make_index_sequence<kIntRows>());
  static constexpr auto kScaled = int_tiles<true, kPrecision>(std::make_index_sequence<kIntRows>());
  const Matrix& w = *job.weight;
  const Activations& a = *job.levels;
  const bool four = w.arithmetic == Arithmetic::Int4;
  const size_t blocks = a.blocks();
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  float* c = reinterpret_cast<float*>(panel + kPanelBytes);
  float* row_scales = c + kTokenChunk * kIntPanel;
  for (size_t begin = 0; begin < job.tokens; begin += kTokenChunk) {
    const size_t tokens = least(kTokenChunk, job.tokens - begin);
    for (size_t row = first; row < last; row += kIntPanel) {
      const size_t rows = least(kIntPanel, last - row);
      std::memset(c, 0, tokens * kIntPanel * sizeof(float));
      for (size_t b = 0; b < blocks; ++b) {
        const uint8_t* data = w.data + row * w.stride() + b * (four ? kBlock / 2 : kBlock);
        if (four) {
          pack_int4<kPrecision>(data, w.stride(), rows, panel);
          for (size_t r = 0; r < kIntPanel; ++r) row_scales[r] = r < rows ? w.scales[(row + r) * blocks + b] : 0.0f;
        } else {
          pack_int8<kPrecision>(reinterpret_cast<const int8_t*>(data), w.stride(), rows, least(kBlock, w.columns - b * kBlock), panel);
        }
        Prefetcher prefetcher = behind(job, row, last, kIntPanel, b * kBlock, kBlock, (tokens + kIntRows - 1) / kIntRows);
        for (size_t t = 0; t < tokens; t += kIntRows) {
          const size_t n = least(kIntRows, tokens - t), entry = a.entry(b, begin + t);
          prefetcher.some();
          (four ? kScaled : kPlain).of[n - 1](panel, a.levels + entry * kLevelBytes, a.scales + entry, a.sums + entry,
                                              four ? kOffset4 : kOffset8, row_scales, c + t * kIntPanel);
        }
      }
      for (size_t t = 0; t < tokens; ++t) {
        finish_rows(job, begin + t, row, rows, c + t * kIntPanel, four ? nullptr : w.scales + row);
      }
    }
  }
}

static_assert(kPanelBytes + (kTokenChunk + 1) * kIntPanel * sizeof(float) <= kLinearScratch);

}  // namespace
}  // namespace axc
