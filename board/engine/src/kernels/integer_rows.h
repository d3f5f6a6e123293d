// Four whole rows of an integer weight, in place, with one token. Its file brings, before it includes this:
//   kOffset<four>   what levels of a weight are raised by, to be unsigned
//   group_sums      <four, group, precision>: exact sums of products of kTogether blocks and four rows
// The order of a token's float sum is that of int_tile, of many tokens: see integer.h.
#pragma once

#include "quads.h"
#include "scales.h"

namespace axc {
namespace {

constexpr size_t kDotRows = 4, kTogether = kWidth / kDotRows;  // blocks: a vector has a lane for each of them and each row
static_assert(kWidth % kDotRows == 0);

// Transposes [row][block] to [block][row].
template <size_t... kLane>
AXC_INLINE inline Vh by_block_halves(Vh v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, (kLane % kDotRows * kTogether + kLane / kDotRows)...);
}

// Scales of `count` blocks from `first` on, one a block: lane 4 b + r has that of block b of row r.
inline Vf block_scales(const Matrix& w, const size_t index[kDotRows], size_t first, size_t count) {
  if (w.scale_type == Type::Float16 && index[kDotRows - 1] * w.blocks + first + kTogether <= w.rows * w.blocks) {
    uint16_t halves[kDotRows][kTogether];
    for (size_t r = 0; r < kDotRows; ++r) {
      std::memcpy(halves[r], static_cast<const uint16_t*>(w.scales) + index[r] * w.blocks + first, sizeof halves[r]);
    }
    return half_to_float(by_block_halves(std::bit_cast<Vh>(halves), std::make_index_sequence<kWidth>()));
  }
  Vf scales[kDotRows];
  repeat<kDotRows>([&](auto r) AXC_INLINE { scales[r] = by_block<1>(scales_at(w, index[r], first, count)); });
  transpose_quads(scales);
  return scales[0];
}

template <bool kFour, size_t kGroup, Precision kPrecision>
[[gnu::noinline]] void dot_rows(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan, kBytes = kFour ? kBlock / 2 : kBlock;
  const size_t blocks = a.blocks(), groups = (w.columns + kSpan - 1) / kSpan;
  size_t index[kDotRows];
  const uint8_t* rows[kDotRows];
  for (size_t r = 0; r < kDotRows; ++r) {
    index[r] = least(row + r, w.rows - 1);
    rows[r] = w.data + index[r] * w.stride();
  }
  const uint8_t* ahead = rows[0] + kPrefetched;
  V4 total;
  std::memcpy(&total, out, sizeof total);
  for (size_t first = 0; first < blocks; first += kTogether, ahead += kTogether * kDotRows * kBytes) {
    const size_t count = least(kTogether, blocks - first), entry = a.entry(first, token), group = first * kGroups;
    Vi sums[kGroups];  // lane 4 b + r: of block b with row r
    group_sums<kFour, kGroup, kPrecision>(rows, first, count, w.columns, a.levels + entry * kLevelBytes, ahead, sums);
    Vi raised;
    std::memcpy(&raised, a.sums + entry * kGroups, sizeof raised);
    repeat<kGroups>([&](auto g) AXC_INLINE {
      if (kOffset<kFour>) sums[g] -= spread<kGroups, g>(raised) * kOffset<kFour>;
    });
    Vf values;
    if constexpr (kGroup == 0) {
      values = __builtin_convertvector(sums[0], Vf);
    } else if constexpr (kGroups == 1) {
      values = fma(__builtin_convertvector(sums[0], Vf), block_scales(w, index, first, count), Vf{});
    } else {
      Vf scales[kDotRows];
      const size_t there = least(kTogether * kGroups, groups - group);
      repeat<kDotRows>([&](auto r) AXC_INLINE { scales[r] = by_block<kGroups>(scales_at(w, index[r], group, there)); });
      transpose_quads(scales);
      values = Vf{};
      repeat<kGroups>([&](auto g) AXC_INLINE { values = fma(__builtin_convertvector(sums[g], Vf), scales[g], values); });
    }
    V4 of_block[kTogether];
    std::memcpy(of_block, &values, sizeof of_block);
    repeat<kTogether>([&](auto b) AXC_INLINE {
      if (b < count) total = fma(of_block[b], a.scales[(entry + b) * kGroups] - V4{}, total);
    });
  }
  std::memcpy(out, &total, sizeof total);
}

template <Precision kPrecision>
inline void dots_in(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  const bool four = w.arithmetic == Arithmetic::Int4;
  by_group(w, a, [&](auto group) {
    (four ? dot_rows<true, group, kPrecision> : dot_rows<false, group, kPrecision>)(w, row, a, token, out);
  });
}

}  // namespace
}  // namespace axc
