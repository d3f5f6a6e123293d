// Integer products of 16-bit levels with weights widened to 16 bits, for instruction sets without 8-bit dot products.
// How a tile and a row are multiplied is left to the compiler's vectors.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

using Vw = int16_t __attribute__((vector_size(kWidth * 2)));

inline int nibble_level(uint8_t byte, int which) { return ((byte >> 4 * which & 15) ^ 8) - 8; }

inline int32_t store_levels(const int16_t* levels, const Activations&, Arithmetic, uint8_t* out) {
  std::memcpy(out, levels, kLevelBytes);
  return 0;
}

// Panel: for every column kIntPanel outputs of 16 bits.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  int16_t* to = reinterpret_cast<int16_t*>(panel);
  if (rows < kIntPanel || columns < kBlock) std::memset(panel, 0, 2 * kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) to[k * kIntPanel + r] = w[r * stride + k];
  }
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  int16_t* to = reinterpret_cast<int16_t*>(panel);
  if (rows < kIntPanel) std::memset(panel, 0, 2 * kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < kBlock; ++k) {
      to[k * kIntPanel + r] = static_cast<int16_t>(nibble_level(w[r * stride + k / 2], k % 2));
    }
  }
}

template <size_t kRows, bool kScaled, Precision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, int32_t, const float* row_scales,
              float* c) {
  constexpr size_t kAcross = kIntPanel / kWidth;
  Vi acc[kRows][kAcross];
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<kAcross>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  each([&](auto t, auto v) AXC_INLINE { acc[t][v] = Vi{}; });
  for (size_t k = 0; k < kBlock; ++k) {
    Vi w[kAcross];
    repeat<kAcross>([&](auto v) AXC_INLINE {
      Vw narrow;
      std::memcpy(&narrow, panel + 2 * (k * kIntPanel + v * kWidth), sizeof narrow);
      w[v] = __builtin_convertvector(narrow, Vi);
    });
    each([&](auto t, auto v) AXC_INLINE {
      int16_t level;
      std::memcpy(&level, levels + t * kLevelBytes + 2 * k, sizeof level);
      acc[t][v] += w[v] * int32_t{level};
    });
  }
  each([&](auto t, auto v) AXC_INLINE {
    float* at = c + t * kIntPanel + v * kWidth;
    Vf factor = all(scales[t]);
    if (kScaled) factor *= load(row_scales + v * kWidth);
    store(at, load(at) + __builtin_convertvector(acc[t][v], Vf) * factor);
  });
}

inline float dot_int8(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const int8_t* weights = reinterpret_cast<const int8_t*>(w.data) + row * w.columns;
  float total = 0;
  for (size_t b = 0, k = 0; k < w.columns; ++b, k += kBlock) {
    const size_t entry = a.entry(b, token), count = least(kBlock, w.columns - k);
    const int16_t* levels = reinterpret_cast<const int16_t*>(a.levels + entry * kLevelBytes);
    int32_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += weights[k + i] * levels[i];
    total += static_cast<float>(sum) * a.scales[entry];
  }
  return total;
}

inline float dot_int4(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const size_t blocks = a.blocks();
  const uint8_t* weights = w.data + row * blocks * (kBlock / 2);
  float total = 0;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t entry = a.entry(b, token);
    const int16_t* levels = reinterpret_cast<const int16_t*>(a.levels + entry * kLevelBytes);
    int32_t sum = 0;
    for (size_t i = 0; i < kBlock / 2; ++i) {
      const uint8_t byte = weights[b * (kBlock / 2) + i];
      sum += nibble_level(byte, 0) * levels[2 * i] + nibble_level(byte, 1) * levels[2 * i + 1];
    }
    total += static_cast<float>(sum) * (a.scales[entry] * w.scales[row * blocks + b]);
  }
  return total;
}

constexpr size_t kDotRows = 1;

inline void dots(const Matrix& w, size_t row, size_t, const Activations& a, size_t token, float* out) {
  *out = w.arithmetic == Arithmetic::Int4 ? dot_int4(w, row, a, token) : dot_int8(w, row, a, token);
}

}  // namespace
}  // namespace axc
