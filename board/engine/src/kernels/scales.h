// Scales and zero points of a weight as vectors of float32. vectors.h explains how it is included.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

// Sets the lanes from `count` on to zero.
inline Vf first_lanes(Vf v, size_t count) {
  static constexpr auto kLanes = [] {
    struct { int32_t of[kWidth]; } lanes{};
    for (size_t i = 0; i < kWidth; ++i) lanes.of[i] = static_cast<int32_t>(i);
    return lanes;
  }();
  Vi lanes;
  std::memcpy(&lanes, kLanes.of, sizeof lanes);
  return lanes < static_cast<int32_t>(count) ? v : Vf{};
}

// `count` elements at `from`, padded with zeros; the array ends `left` elements after `from`.
template <class Vector, class Element>
inline Vector some_of(const Element* from, size_t count, size_t left) {
  Vector v{};
  if (left >= kWidth) {
    std::memcpy(&v, from, sizeof v);
  } else {
    std::memcpy(&v, from, count * sizeof(Element));
  }
  return v;
}

// Scales of the groups [first, first + count) of a row, at most a vector, padded with zeros.
inline Vf scales_at(const Matrix& w, size_t row, size_t first, size_t count) {
  const size_t at = row * w.blocks + first, left = w.rows * w.blocks - at;
#ifdef __AVX512F__
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  if (w.scale_type == Type::Float16) {
    return Vf(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(w.scales) + at)));
  }
  return Vf(_mm512_maskz_loadu_ps(there, static_cast<const float*>(w.scales) + at));
#endif
  Vf v;
  if (w.scale_type == Type::Float16) {
    v = half_to_float(some_of<Vh>(static_cast<const uint16_t*>(w.scales) + at, count, left));
  } else {
    v = some_of<Vf>(static_cast<const float*>(w.scales) + at, count, left);
  }
  return count < kWidth ? first_lanes(v, count) : v;
}

// Their zero points; lanes from `count` on are finite but arbitrary.
inline Vf zeros_at(const Matrix& w, size_t row, size_t first, size_t count) {
  using Bytes = int8_t __attribute__((vector_size(kWidth)));
  const size_t at = row * w.blocks + first, left = w.rows * w.blocks - at;
  return __builtin_convertvector(some_of<Bytes>(w.zeros + at, count, left), Vf);
}

// A scale of one.
inline float scale_at(const Matrix& w, size_t index) {
  if (w.scale_type == Type::Float) return static_cast<const float*>(w.scales)[index];
  Vh half{};
  half[0] = static_cast<const uint16_t*>(w.scales)[index];
  return half_to_float(half)[0];
}

// The sums of levels of each group of a block.
inline void store_sums(const int16_t* levels, size_t group, int32_t* sums) {
  for (size_t begin = 0; begin < kBlock; begin += group) {
    int32_t sum = 0;
    for (size_t i = begin; i < begin + group; ++i) sum += levels[i];
    *sums++ = sum;
  }
}

// kWidth groups of activations; the array is padded with arbitrary values.
inline Vf scales_at(const Activations& a, size_t group) { return load(a.scales + group); }

inline Vf sums_at(const Activations& a, size_t group) {
  Vi sums;
  std::memcpy(&sums, a.sums + group, sizeof sums);
  return __builtin_convertvector(sums, Vf);
}

// Calls f with the number of columns that share a scale as a constant; 0: the whole row.
template <class Function>
AXC_INLINE inline auto by_group(const Matrix& w, const Activations& a, Function f) {
  if (w.arithmetic == Arithmetic::Int8) return f(std::integral_constant<size_t, 0>());
  if (a.group == 32) return f(std::integral_constant<size_t, 32>());
  if (a.group == 64) return f(std::integral_constant<size_t, 64>());
  return f(std::integral_constant<size_t, 128>());
}

}  // namespace
}  // namespace axc
