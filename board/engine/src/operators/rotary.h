// Rotary embedding of the heads of one token.
#pragma once

#include <cstring>

#include "../failure.h"
#include "../kernels/kernels.h"

namespace axc {

struct Rotation {
  size_t heads, head_dim, half;  // 2 * half elements of each head are rotated, the others copied
  bool interleaved;              // pairs are adjacent elements; otherwise element i and i + half
};

// x, y: [heads, head_dim]; cos, sin: [half]
inline void rotate(const Kernels& kernels, const Rotation& r, const float* x, const float* cos, const float* sin, float* y) {
  if (!r.interleaved && 2 * r.half == r.head_dim) return kernels.rotate(x, cos, sin, r.heads, r.half, y);
  const size_t rotated = 2 * r.half;
  for (size_t head = 0; head < r.heads; ++head, x += r.head_dim, y += r.head_dim) {
    if (!r.interleaved) {
      kernels.rotate(x, cos, sin, 1, r.half, y);
    } else {
      for (size_t i = 0; i < r.half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = cos[i] * a - sin[i] * b;
        y[2 * i + 1] = sin[i] * a + cos[i] * b;
      }
    }
    if (rotated < r.head_dim) std::memcpy(y + rotated, x + rotated, (r.head_dim - rotated) * sizeof(float));
  }
}

// Cosines and sines of angles: one row, or tables of rows.
struct Turns {
  const float *cos, *sin;

  Turns row(size_t row, size_t half) const { return {cos + row * half, sin + row * half}; }
};

// Cosines and sines of the sums of two rows of angles, rounded like the separate operators on every machine.
inline void add_angles(Turns a, Turns b, size_t half, float* __restrict cos, float* __restrict sin) {
  for (size_t i = 0; i < half; ++i) {
    cos[i] = a.cos[i] * b.cos[i] - a.sin[i] * b.sin[i];
    sin[i] = a.sin[i] * b.cos[i] + a.cos[i] * b.sin[i];
  }
}

inline void check_position(uint64_t position, size_t positions) {
  if (position < positions) return;
  illegal("position " + std::to_string(position) + " is outside the " + std::to_string(positions) + " of the rotary tables");
}

}  // namespace axc
