// Vectors as rows of four lanes. See vectors.h for how it is included.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

// Of each four lanes of two vectors: a0 b0 a1 b1 or, from the upper half, a2 b2 a3 b3.
template <size_t kHalf, size_t... kLane>
AXC_INLINE inline Vf interleaved(Vf a, Vf b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 4 * 4 + kHalf * 2 + kLane % 4 / 2 + kLane % 2 * kWidth)...);
}

// a0 a1 b0 b1, or a2 a3 b2 b3.
template <size_t kHalf, size_t... kLane>
AXC_INLINE inline Vf joined(Vf a, Vf b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 4 * 4 + kHalf * 2 + kLane % 2 + kLane % 4 / 2 * kWidth)...);
}

// Each four lanes of four vectors as a matrix: rows become columns.
AXC_INLINE inline void transpose_quads(Vf v[4]) {
  constexpr auto kAll = std::make_index_sequence<kWidth>();
  const Vf ab0 = interleaved<0>(v[0], v[1], kAll), ab1 = interleaved<1>(v[0], v[1], kAll);
  const Vf cd0 = interleaved<0>(v[2], v[3], kAll), cd1 = interleaved<1>(v[2], v[3], kAll);
  v[0] = joined<0>(ab0, cd0, kAll), v[1] = joined<1>(ab0, cd0, kAll);
  v[2] = joined<0>(ab1, cd1, kAll), v[3] = joined<1>(ab1, cd1, kAll);
}

// Of each four lanes of a, b, c and d the sums, in this order.
AXC_INLINE inline Vi quad_sums(Vi a, Vi b, Vi c, Vi d) {
  constexpr auto kAll = std::make_index_sequence<kWidth>();
  const auto halves = [=](Vi x, Vi y) AXC_INLINE {
    const Vf p = std::bit_cast<Vf>(x), q = std::bit_cast<Vf>(y);
    return std::bit_cast<Vi>(interleaved<0>(p, q, kAll)) + std::bit_cast<Vi>(interleaved<1>(p, q, kAll));
  };
  const Vf ab = std::bit_cast<Vf>(halves(a, b)), cd = std::bit_cast<Vf>(halves(c, d));
  return std::bit_cast<Vi>(joined<0>(ab, cd, kAll)) + std::bit_cast<Vi>(joined<1>(ab, cd, kAll));
}

// kGroups numbers of each block, block by block: four lanes a block.
template <size_t kGroups, size_t... kLane>
AXC_INLINE inline Vf by_block(Vf v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, (kLane / 4 * kGroups + kLane % kGroups)...);
}

template <size_t kGroups>
AXC_INLINE inline Vf by_block(Vf v) {
  return by_block<kGroups>(v, std::make_index_sequence<kWidth>());
}

// Of those, number kGroup of each block in all its lanes.
template <size_t kGroups, size_t kGroup, size_t... kLane>
AXC_INLINE inline Vi spread(Vi v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, (kLane / 4 * kGroups + kGroup)...);
}

template <size_t kGroups, size_t kGroup>
AXC_INLINE inline Vi spread(Vi v) {
  return spread<kGroups, kGroup>(v, std::make_index_sequence<kWidth>());
}

}  // namespace
}  // namespace axc
