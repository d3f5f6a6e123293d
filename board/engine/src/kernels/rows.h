// Operations on single rows of float32. vectors.h explains how it is included.
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

// A series near 0, where 1 - 2 / (e^2x + 1) loses precision.
inline Vf hyperbolic_tangent(Vf x) {
  const Vf square = x * x;
  Vf series = all(-1382.0f / 155925);
  for (const float c : {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3}) series = fma(series, square, all(c));
  const Vf near = fma(x * square, series, x), far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  const Vf bound = all(0.0625f);
  return square < bound ? near : far;
}

// https://arxiv.org/abs/1606.08415 , section 2
inline Vf gelu(Vf x) {
  constexpr float kRoot = 0.7978845608f;  // sqrt(2 / pi)
  return 0.5f * x * (1.0f + hyperbolic_tangent(kRoot * fma(0.044715f * x * x, x, x)));
}

inline void gated(Activation activation, const float* gate, const float* up, size_t count, float* y) {
  switch (activation) {
    case Activation::Silu: return each(gate, up, count, y, [](Vf g, Vf u) { return g * logistic(g) * u; });
    case Activation::GeluTanh: return each(gate, up, count, y, [](Vf g, Vf u) { return gelu(g) * u; });
  }
}

inline void tanh_of(const float* x, size_t count, float* y) {
  each(x, x, count, y, [](Vf v, Vf) { return hyperbolic_tangent(v); });
}

inline void gelu_tanh(const float* x, size_t count, float* y) {
  each(x, x, count, y, [](Vf v, Vf) { return gelu(v); });
}

inline void sigmoid(const float* x, size_t count, float* y) {
  each(x, x, count, y, [](Vf v, Vf) { return logistic(v); });
}

inline void rms_norm(const float* x, const float* scale, float epsilon, size_t width, float* y) {
  const float squares = sum_of(width, [x](Vf& lanes, size_t i, size_t n) AXC_INLINE {
    const Vf v = n == kWidth ? load(x + i) : load_some(x + i, n);
    lanes = fma(v, v, lanes);
  });
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
  each(x, scale, width, y, [factor](Vf v, Vf s) { return v * factor * s; });
}

// Moments from float32 sums; squares are of differences from the mean.
inline void layer_norm(const float* x, const float* scale, const float* bias, float epsilon, size_t width, float* y,
                       float* moments) {
  const float count = static_cast<float>(width);
  const float mean = sum_of(width, [x](Vf& lanes, size_t i, size_t n) AXC_INLINE { lanes += load_some(x + i, n); }) / count;
  const float squares = sum_of(width, [=](Vf& lanes, size_t i, size_t n) AXC_INLINE {
    const Vf v = load_some(x + i, n, mean) - mean;
    lanes = fma(v, v, lanes);
  });
  const float factor = 1.0f / std::sqrt(squares / count + epsilon);
  each(x, x, width, y, [=](Vf v, Vf) { return (v - mean) * factor; });
  if (scale) each(y, scale, width, y, [](Vf v, Vf s) { return v * s; });
  if (bias) each(y, bias, width, y, [](Vf v, Vf b) { return v + b; });
  moments[0] = mean, moments[1] = factor;
}

// Exponentials of x - maximum; returns 1 / their sum.
inline float exponentials(const float* x, size_t width, float* y) {
  constexpr float kLowest = -3.4e38f;
  Vf top = all(kLowest);
  size_t i = 0;
  for (; i + kWidth <= width; i += kWidth) top = larger(load(x + i), top);
  if (i < width) top = larger(load_some(x + i, width - i, kLowest), top);
  float peak = top[0];
  for (size_t lane = 1; lane < kWidth; ++lane) peak = top[lane] > peak ? top[lane] : peak;
  return 1.0f / sum_of(width, [=](Vf& lanes, size_t i, size_t n) AXC_INLINE {
    const Vf e = exponential((n == kWidth ? load(x + i) : load_some(x + i, n, kLowest)) - peak);
    store_some(y + i, e, n);
    lanes += n == kWidth ? e : load_some(y + i, n);
  });
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
      store(y + i, fma(c, a, -(s * b)));
      store(y + half + i, fma(s, a, c * b));
    }
    if (i < half) {
      const size_t n = half - i;
      const Vf c = load_some(cos + i, n), s = load_some(sin + i, n);
      const Vf a = load_some(x + i, n), b = load_some(x + half + i, n);
      store_some(y + i, fma(c, a, -(s * b)), n);
      store_some(y + half + i, fma(s, a, c * b), n);
    }
  }
}

}  // namespace
}  // namespace axc
