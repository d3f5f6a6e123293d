// Integer products of 16-bit levels with weights widened to 16 bits, for instruction sets without 8-bit dot products.
// The compiler vectorises the loops.
#pragma once

#include "scales.h"

namespace axc {
namespace {

using Vw = int16_t __attribute__((vector_size(kWidth * 2)));

inline int nibble_level(uint8_t byte, int which) { return ((byte >> 4 * which & 15) ^ 8) - 8; }

inline void store_levels(const int16_t* levels, const Activations&, Arithmetic, uint8_t* out, int32_t*) {
  std::memcpy(out, levels, kLevelBytes);
}

// Panel: for every column kIntPanel outputs of 16 bits.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  int16_t* to = reinterpret_cast<int16_t*>(panel);
  if (rows < kIntPanel) std::memset(panel, 0, 2 * kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) to[k * kIntPanel + r] = w[r * stride + k];
  }
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  int16_t* to = reinterpret_cast<int16_t*>(panel);
  if (rows < kIntPanel) std::memset(panel, 0, 2 * kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) {
      to[k * kIntPanel + r] = static_cast<int16_t>(nibble_level(w[r * stride + k / 2], k % 2));
    }
  }
}

template <size_t kRows, size_t kGroup, Precision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
              size_t columns, float* c) {
  constexpr size_t kAcross = kIntPanel / kWidth, kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<kAcross>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  Vf total[kRows][kAcross];
  each([&](auto t, auto v) AXC_INLINE { total[t][v] = Vf{}; });
  for (size_t g = 0; g * kSpan < columns; ++g) {
    Vi acc[kRows][kAcross];
    each([&](auto t, auto v) AXC_INLINE { acc[t][v] = Vi{}; });
    for (size_t k = g * kSpan, end = least(k + kSpan, columns); k < end; ++k) {
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
      const Vf sum = __builtin_convertvector(acc[t][v], Vf);
      total[t][v] = kGroup ? fma(sum, load(row_scales + g * kIntPanel + v * kWidth), total[t][v]) : sum;
    });
  }
  each([&](auto t, auto v) AXC_INLINE {
    float* at = c + t * kIntPanel + v * kWidth;
    store(at, fma(total[t][v], scales[t * kGroups], load(at)));
  });
}

// kGroup 0: unscaled, since the row has one scale. Adds to `out`.
template <bool kFour, size_t kGroup>
void dot_row(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan, kBytes = kFour ? kSpan / 2 : kSpan;
  const uint8_t* weights = w.data + row * w.stride();
  const size_t entry = a.entry(0, token), groups = (w.columns + kSpan - 1) / kSpan;
  const int16_t* levels = reinterpret_cast<const int16_t*>(a.levels + entry * kLevelBytes);
  float total = *out, of_block = 0;
  for (size_t g = 0; g < groups; ++g, weights += kBytes, levels += kSpan) {
    const auto sum_of = [&](size_t count) AXC_INLINE {
      int32_t sum = 0;
      if constexpr (kFour) {
        for (size_t i = 0; i < count / 2; ++i) {
          sum += nibble_level(weights[i], 0) * levels[2 * i] + nibble_level(weights[i], 1) * levels[2 * i + 1];
        }
      } else {
        for (size_t i = 0; i < count; ++i) sum += static_cast<int8_t>(weights[i]) * levels[i];
      }
      return static_cast<float>(sum);
    };
    const size_t left = w.columns - g * kSpan;
    const float sum = left < kSpan ? sum_of(left) : sum_of(kSpan);
    of_block = kGroup ? fma(sum, scale_at(w, row * groups + g), of_block) : sum;
    if ((g + 1) % kGroups && g + 1 < groups) continue;
    total = fma(of_block, a.scales[entry * kGroups + g], total);
    of_block = 0;
  }
  *out = total;
}

constexpr size_t kDotRows = 1;

inline void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  const bool four = w.arithmetic == Arithmetic::Int4;
  by_group(w, a, [&](auto group) { (four ? dot_row<true, group> : dot_row<false, group>)(w, row, a, token, out); });
}

}  // namespace
}  // namespace axc
