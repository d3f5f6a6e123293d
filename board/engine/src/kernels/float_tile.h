// float32 products of a few rows with a packed panel of a weight or of keys.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

constexpr size_t kPanel = kVectors * kWidth;  // outputs of a panel

// c[t][o] += sum over k of a[t][k] panel[k][o]
template <size_t kRows>
void float_tile(const float* panel, size_t panel_stride, const float* a, size_t a_stride, size_t depth, float* c,
                size_t c_stride) {
  Vf acc[kRows][kVectors];
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<kVectors>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  each([&](auto t, auto v) AXC_INLINE { acc[t][v] = load(c + t * c_stride + v * kWidth); });
  for (size_t k = 0; k < depth; ++k) {
    Vf w[kVectors];
    repeat<kVectors>([&](auto v) AXC_INLINE { w[v] = load(panel + k * panel_stride + v * kWidth); });
    each([&](auto t, auto v) AXC_INLINE { acc[t][v] = fma(w[v], a[t * a_stride + k], acc[t][v]); });
  }
  each([&](auto t, auto v) AXC_INLINE { store(c + t * c_stride + v * kWidth, acc[t][v]); });
}

using FloatTile = void (*)(const float*, size_t, const float*, size_t, size_t, float*, size_t);

template <size_t... kRows>
constexpr ByCount<FloatTile, sizeof...(kRows)> float_tiles(std::index_sequence<kRows...>) {
  return {{float_tile<kRows + 1>...}};
}

// Any number of rows; calls `before` ahead of each tile.
template <class Before>
inline void float_rows(const float* panel, size_t panel_stride, const float* a, size_t a_stride, size_t rows, size_t depth,
                       float* c, size_t c_stride, Before before) {
  static constexpr auto kTiles = float_tiles(std::make_index_sequence<kFloatRows>());
  for (size_t t = 0; t < rows; t += kFloatRows) {
    const size_t n = least(kFloatRows, rows - t);
    before();
    kTiles.of[n - 1](panel, panel_stride, a + t * a_stride, a_stride, depth, c + t * c_stride, c_stride);
  }
}

// Transposes kPanel rows; at(row, column) loads a vector of a row.
template <class At>
inline void transpose_panel(size_t columns, float* panel, At at) {
  for (size_t i = 0; i < columns; i += kWidth) {
    for (size_t j = 0; j < kPanel; j += kWidth) {
      Vf square[kWidth];
      repeat<kWidth>([&](auto r) AXC_INLINE { square[r] = at(j + r, i); });
      transpose(square);
      repeat<kWidth>([&](auto r) AXC_INLINE { store(panel + (i + r) * kPanel + j, square[r]); });
    }
  }
}

}  // namespace
}  // namespace axc
