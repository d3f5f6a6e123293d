// Operations on single rows of float32. See vectors.h for how it is included.
#pragma once

#include <cmath>

#include "vectors.h"

namespace axc {
namespace {

// y[i] = f(x[i]) or f(a[i], b[i]), vector by vector.
template <class Function>
inline void each(const float* a, const float* b, size_t count, float* y, Function f) {
  size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, f(load(a + i), load(b + i)));
  if (i < count) store_some(y + i, f(load_some(a + i, count - i), load_some(b + i, count - i)), count - i);
}

inline Vf logistic(Vf x) { return 1.0f / (1.0f + exponential(-x)); }

inline void swiglu(const float* gate, const float* up, size_t count, float* y) {
  each(gate, up, count, y, [](Vf g, Vf u) { return g * logistic(g) * u; });
}

inline void sigmoid(const float* x, size_t count, float* y) {
  each(x, x, count, y, [](Vf v, Vf) { return logistic(v); });
}

inline void rms_norm(const float* x, const float* scale, float epsilon, size_t width, float* y) {
  Vf squares{};
  size_t i = 0;
  for (; i + kWidth <= width; i += kWidth) squares += load(x + i) * load(x + i);
  if (i < width) {
    const Vf rest = load_some(x + i, width - i);
    squares += rest * rest;
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
  each(x, scale, width, y, [factor](Vf v, Vf s) { return v * factor * s; });
}

// The maximum subtracted, exponentials taken; returns 1 / their sum.
inline float exponentials(const float* x, size_t width, float* y) {
  constexpr float kLowest = -3.4e38f;
  Vf top = all(kLowest);
  size_t i = 0;
  for (; i + kWidth <= width; i += kWidth) top = larger(load(x + i), top);
  if (i < width) top = larger(load_some(x + i, width - i, kLowest), top);
  float peak = top[0];
  for (size_t lane = 1; lane < kWidth; ++lane) peak = top[lane] > peak ? top[lane] : peak;
  Vf total{};
  for (i = 0; i + kWidth <= width; i += kWidth) {
    const Vf e = exponential(load(x + i) - peak);
    total += e;
    store(y + i, e);
  }
  if (i < width) {
    const Vf e = exponential(load_some(x + i, width - i, -3.4e38f) - peak);
    store_some(y + i, e, width - i);
    total += load_some(y + i, width - i);
  }
  return 1.0f / sum(total);
}

inline void softmax(const float* x, size_t width, float* y) {
  const float factor = exponentials(x, width, y);
  each(y, y, width, y, [factor](Vf v, Vf) { return v * factor; });
}

// Rotates the halves of each head: https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html , not interleaved
inline void rotate(const float* x, const float* cos, const float* sin, size_t heads, size_t half, float* y) {
  for (size_t head = 0; head < heads; ++head, x += 2 * half, y += 2 * half) {
    size_t i = 0;
    for (; i + kWidth <= half; i += kWidth) {
      const Vf c = load(cos + i), s = load(sin + i), a = load(x + i), b = load(x + half + i);
      store(y + i, c * a - s * b);
      store(y + half + i, s * a + c * b);
    }
    if (i < half) {
      const size_t n = half - i;
      const Vf c = load_some(cos + i, n), s = load_some(sin + i, n);
      const Vf a = load_some(x + i, n), b = load_some(x + half + i, n);
      store_some(y + i, c * a - s * b, n);
      store_some(y + half + i, s * a + c * b, n);
    }
  }
}

}  // namespace
}  // namespace axc
