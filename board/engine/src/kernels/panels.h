// Products of many tokens, for any instruction set: packs a block of a weight's rows into a panel, one output a lane, and
// multiplies it with a few tokens at a time.
#pragma once

#include <utility>

#include "float_linear.h"

namespace axc {
namespace {

constexpr size_t kMostGroups = kBlock / kLeastGroup;
// 16-bit weights, and one number for each row and group
constexpr size_t kPanelBytes = (2 * kBlock + kMostGroups * sizeof(int32_t)) * kIntPanel;
constexpr size_t kScaleDepth = 64;  // groups of a row whose scales are transposed together
static_assert(kIntPanel == kPanel);

using IntTile = void (*)(const uint8_t*, const uint8_t*, const float*, const int32_t*, const float*, size_t, float*);

template <size_t kGroup, Precision kPrecision, size_t... kRows>
constexpr ByCount<IntTile, sizeof...(kRows)> int_tiles(std::index_sequence<kRows...>) {
  return {{int_tile<kRows + 1, kGroup, kPrecision>...}};
}

// Indexed by row; `group` columns share a scale, 0: the whole row.
template <Precision kPrecision>
inline const ByCount<IntTile, kIntRows>& tiles_of(size_t group) {
  constexpr auto kCounts = std::make_index_sequence<kIntRows>();
  static constexpr auto kNone = int_tiles<0, kPrecision>(kCounts), k32 = int_tiles<32, kPrecision>(kCounts),
                        k64 = int_tiles<64, kPrecision>(kCounts), k128 = int_tiles<128, kPrecision>(kCounts);
  return group == 0 ? kNone : group == 32 ? k32 : group == 64 ? k64 : k128;
}

// Transposes at(row, group) for rows [row, row + rows) and groups [first, first + count) to [count][kIntPanel].
template <class At>
inline void turn_scales(const Matrix& w, size_t row, size_t rows, size_t first, size_t count, float* out, At at) {
  const size_t end = least(first + count, w.blocks);
  transpose_panel((count + kWidth - 1) / kWidth * kWidth, out, [&](size_t r, size_t i) AXC_INLINE {
    return r < rows && first + i < end ? at(w, row + r, first + i, least(kWidth, end - first - i)) : Vf{};
  });
}

// Subtracts the contribution of zero points from c[t][o], for `tokens` tokens from `begin` on.
inline void subtract_zeros(const Matrix& w, const Activations& a, size_t row, size_t rows, size_t begin, size_t tokens,
                           float* zeros, float* c) {
  const size_t stride = a.blocks() * a.groups(), blocks = w.blocks;
  for (size_t first = 0; first < blocks; first += kScaleDepth) {
    const size_t count = least(kScaleDepth, blocks - first);
    turn_scales(w, row, rows, first, count, zeros, [](auto&&... where) AXC_INLINE { return -scales_at(where...) * zeros_at(where...); });
    float_rows(zeros, kPanel, a.totals + begin * stride + first, stride, tokens, count, c, kPanel, [] {});
  }
}

template <Precision kPrecision>
void panel_linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  const Matrix& w = *job.weight;
  const Activations& a = *job.levels;
  const bool four = w.arithmetic == Arithmetic::Int4, by_row = w.arithmetic == Arithmetic::Int8;
  const auto& tiles = tiles_of<kPrecision>(by_row ? 0 : a.group);
  const size_t blocks = a.blocks(), groups = a.groups();
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  float* c = reinterpret_cast<float*>(panel + kPanelBytes);
  float* scales = c + kTokenChunk * kIntPanel;
  float* zeros = scales + kScaleDepth * kIntPanel;
  for (size_t begin = 0; begin < job.tokens; begin += kTokenChunk) {
    const size_t tokens = least(kTokenChunk, job.tokens - begin);
    for (size_t row = first; row < last; row += kIntPanel) {
      const size_t rows = least(kIntPanel, last - row);
      std::memset(c, 0, tokens * kIntPanel * sizeof(float));
      if (w.zeros) subtract_zeros(w, a, row, rows, begin, tokens, zeros, c);
      for (size_t b = 0; b < blocks; ++b) {
        const size_t columns = least(kBlock, w.columns - b * kBlock), group = b * groups % kScaleDepth;
        const uint8_t* data = w.data + row * w.stride() + b * (four ? kBlock / 2 : kBlock);
        if (four) {
          pack_int4<kPrecision>(data, w.stride(), rows, columns, a.group, panel);
        } else {
          pack_int8<kPrecision>(reinterpret_cast<const int8_t*>(data), w.stride(), rows, columns, a.group, panel);
        }
        if (!by_row && !group) {
          turn_scales(w, row, rows, b * groups, least(kScaleDepth, (blocks - b) * groups), scales,
                      [](auto&&... where) AXC_INLINE { return scales_at(where...); });
        }
        Prefetcher prefetcher = behind(job, row, last, kIntPanel, b * kBlock, kBlock, (tokens + kIntRows - 1) / kIntRows);
        for (size_t t = 0; t < tokens; t += kIntRows) {
          const size_t n = least(kIntRows, tokens - t), entry = a.entry(b, begin + t);
          prefetcher.some();
          tiles.of[n - 1](panel, a.levels + entry * kLevelBytes, a.scales + entry * groups, a.sums + entry * groups,
                          scales + group * kIntPanel, columns, c + t * kIntPanel);
        }
      }
      if (by_row) widen(w.scale_type, static_cast<const uint8_t*>(w.scales) + row * w.scale_bytes(), rows, scales);
      for (size_t t = 0; t < tokens; ++t) finish_rows(job, begin + t, row, rows, c + t * kIntPanel, by_row ? scales : nullptr);
    }
  }
}

static_assert(kPanelBytes + (kTokenChunk + 2 * kScaleDepth) * kIntPanel * sizeof(float) <= kLinearScratch);

}  // namespace
}  // namespace axc
