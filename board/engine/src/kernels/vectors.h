// Vectors of an instruction set's width, by the compilers' vector extension. Each instruction set's file includes this
// once, after it defines kWidth. Everything has internal linkage, so that the linker cannot merge code compiled for
// different CPUs.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <bit>
#include <cstring>
#include <utility>

#include "kernels.h"

namespace axc {
namespace {

using Vf = float __attribute__((vector_size(kWidth * 4)));
using Vi = int32_t __attribute__((vector_size(kWidth * 4)));
using Vu = uint32_t __attribute__((vector_size(kWidth * 4)));
using Vh = uint16_t __attribute__((vector_size(kWidth * 2)));

constexpr size_t least(size_t a, size_t b) { return a < b ? a : b; }

#define AXC_INLINE __attribute__((always_inline))

// Calls f(0) .. f(kCount - 1), unrolled, so that arrays indexed by f stay in registers.
template <size_t kCount, class Function>
AXC_INLINE inline void repeat(Function f) {
  [&]<size_t... i>(std::index_sequence<i...>) AXC_INLINE { (f(std::integral_constant<size_t, i>()), ...); }
  (std::make_index_sequence<kCount>());
}

// A table of functions, indexed by a number from 1 on.
template <class Function, size_t kCount>
struct ByCount {
  Function of[kCount];
};

inline Vf load(const float* from) {
  Vf v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vf v) { std::memcpy(to, &v, sizeof v); }

// Not Vf{} + x, an addition that the compiler must keep: -0 + 0 is 0.
inline Vf all(float x) { return x - Vf{}; }

inline Vf larger(Vf a, Vf b) { return a > b ? a : b; }

template <size_t kCount>
struct Floats {
  typedef float Vector __attribute__((vector_size(kCount * 4)));
};
using V4 = Floats<4>::Vector;

// a b + c, rounded once. Without an instruction for it, calls the C library: slow, with the same bits.
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

#if defined(__AVX512F__)
inline Vf fma(Vf a, Vf b, Vf c) { return Vf(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
#elif defined(__FMA__)
inline Vf fma(Vf a, Vf b, Vf c) { return Vf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
#endif
#if defined(__FMA__)
inline V4 fma(V4 a, V4 b, V4 c) { return V4(_mm_fmadd_ps(__m128(a), __m128(b), __m128(c))); }
#elif defined(__aarch64__)
inline V4 fma(V4 a, V4 b, V4 c) { return V4(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
#else
inline V4 fma(V4 a, V4 b, V4 c) {
  for (size_t i = 0; i < 4; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
#endif
inline Vf fma(Vf a, float b, Vf c) { return fma(a, all(b), c); }

// The sum of the lanes, added by halves.
template <size_t kCount = kWidth>
inline float sum(typename Floats<kCount>::Vector v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    typename Floats<kCount / 2>::Vector halves[2];
    std::memcpy(halves, &v, sizeof v);
    return sum<kCount / 2>(halves[0] + halves[1]);
  }
}

// The lanes of a sum, equally many on every instruction set: element i is added to lane i % kLanes, and the lanes are
// added by halves at the end. The order does not depend on the vector width; padding with zeros changes nothing.
constexpr size_t kLanes = 16;

struct Lanes {
  Vf of[kLanes / kWidth]{};

  float sum() {
    for (size_t half = kLanes / kWidth / 2; half; half /= 2) {
      for (size_t i = 0; i < half; ++i) of[i] += of[i + half];
    }
    return axc::sum(of[0]);
  }
};

// Calls add(lanes, i, n) for the elements [i, i + n) of `count` and their lanes; n is kWidth, or less at the end.
template <class Add>
AXC_INLINE inline float sum_of(size_t count, Add add) {
  Lanes lanes;
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    repeat<kLanes / kWidth>([&](auto v) AXC_INLINE { add(lanes.of[v], i + v * kWidth, std::integral_constant<size_t, kWidth>()); });
  }
  for (size_t v = 0; i < count; i += kWidth, ++v) add(lanes.of[v], i, least(kWidth, count - i));
  return lanes.sum();
}

// Interleaves the lower or the upper halves of two vectors.
template <size_t kFrom, size_t... kLane>
AXC_INLINE inline Vf by_turns(Vf a, Vf b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kFrom + kLane / 2 + kLane % 2 * kWidth)...);
}

// Transposes in log2(width) rounds of shuffles.
AXC_INLINE inline void transpose(Vf rows[kWidth]) {
  constexpr auto kLanes = std::make_index_sequence<kWidth>();
  for (size_t bit = 1; bit < kWidth; bit *= 2) {
    Vf turned[kWidth];
    repeat<kWidth / 2>([&](auto i) AXC_INLINE {
      turned[2 * i] = by_turns<0>(rows[i], rows[i + kWidth / 2], kLanes);
      turned[2 * i + 1] = by_turns<kWidth / 2>(rows[i], rows[i + kWidth / 2], kLanes);
    });
    repeat<kWidth>([&](auto i) AXC_INLINE { rows[i] = turned[i]; });
  }
}

// The functions below load `count` elements at `from`; the other lanes keep the given values.
inline Vf load_some(const float* from, size_t count, float rest = 0) {
  Vf v = all(rest);
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store_some(float* to, Vf v, size_t count) { std::memcpy(to, &v, count * sizeof(float)); }

// exp to 1 ulp or two: 2^n e^r with r in +-ln 2 / 2, e^r by its Taylor series. Below -87 it is 0.
inline Vf exponential(Vf x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f, kRound = 12582912.0f;
  const Vf low = all(-87.0f), high = all(88.0f);
  const Vi vanishes = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vf shifted = fma(x, kLog2E, all(kRound));
  const Vf n = shifted - kRound;
  const Vf r = fma(n, -kLn2Low, fma(n, -kLn2High, x));
  Vf p = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, all(c));
  const Vi power = (std::bit_cast<Vi>(shifted) - std::bit_cast<int32_t>(kRound) + 127) << 23;
  const Vf e = p * std::bit_cast<Vf>(power);
  return vanishes ? Vf{} : e;
}

inline Vf bf16_to_float(Vh bits) { return std::bit_cast<Vf>(__builtin_convertvector(bits, Vu) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline Vh float_to_bf16(Vf x) {
  const Vu bits = std::bit_cast<Vu>(x);
  const Vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Vi nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return __builtin_convertvector(nan ? (bits >> 16) | 0x40 : rounded, Vh);
}

// Without an instruction for it, a multiplication adjusts the exponent, exact for subnormal halves too.
template <class Half>  // Vh; a template, so that only code for this width is compiled
inline Vf half_to_float(Half half) {
#if defined(__AVX512F__)
  if constexpr (sizeof half == sizeof(__m256i)) return Vf(_mm512_cvtph_ps(__m256i(half)));
#endif
#if defined(__F16C__)
  if constexpr (sizeof half == sizeof(__m128i)) return Vf(_mm256_cvtph_ps(__m128i(half)));
#endif
#if defined(__aarch64__)
  if constexpr (sizeof half == sizeof(uint16x4_t)) return Vf(vcvt_f32_f16(vreinterpret_f16_u16(uint16x4_t(half))));
#endif
  const Vu bits = __builtin_convertvector(half, Vu);
  const Vf magnitude = std::bit_cast<Vf>((bits & 0x7FFF) << 13) * 0x1p112f;
  const Vu finite = std::bit_cast<Vu>(magnitude);
  const Vi special = (bits & 0x7C00) == 0x7C00;
  return std::bit_cast<Vf>((special ? finite | 0x7F800000 : finite) | ((bits & 0x8000) << 16));
}

// Rounds to nearest, ties to even. For subnormal halves an addition makes the FPU round.
inline Vh float_to_half(Vf x) {
  const Vu sign = (std::bit_cast<Vu>(x) >> 16) & 0x8000;
  const Vu bits = std::bit_cast<Vu>(x) & 0x7FFFFFFF;
  const Vu normal = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  const Vu tiny = std::bit_cast<Vu>(std::bit_cast<Vf>(bits) + 0.5f) - 0x3F000000;
  const Vu infinite = bits > 0x7F800000 ? Vu{} + 0x7E00 : Vu{} + 0x7C00;
  Vu half = bits < (113u << 23) ? tiny : normal;
  half = bits >= 0x477FF000 ? infinite : half;  // 65520, the first that rounds to infinity
  return __builtin_convertvector(half | sign, Vh);
}

using Vb = uint8_t __attribute__((vector_size(kWidth)));

inline Vf float8_e4m3_to_float(Vb x) {
  const Vu bits = __builtin_convertvector(x, Vu), rest = bits & 0x7F;
  const Vu magnitude = std::bit_cast<Vu>(std::bit_cast<Vf>(rest << 20) * 0x1p120f);
  const Vu nan = Vu{} + 0x7FC00000;
  return std::bit_cast<Vf>((rest == 0x7F ? nan : magnitude) | (bits & 0x80) << 24);
}

inline Vf float8_e5m2_to_float(Vb x) {  // the upper byte of a half
  return half_to_float(__builtin_convertvector(x, Vh) << 8);
}

// Applies `one` to whole vectors of `count` elements, and to the padded rest.
template <class Source, class From, class To, class Function>
inline void convert(const From* from, To* to, size_t count, Function one) {
  size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    Source source;
    std::memcpy(&source, from + i, sizeof source);
    const auto result = one(source);
    std::memcpy(to + i, &result, sizeof result);
  }
  if (i < count) {
    Source source{};
    std::memcpy(&source, from + i, (count - i) * sizeof(From));
    const auto result = one(source);
    std::memcpy(to + i, &result, (count - i) * sizeof(To));
  }
}

inline void widen(Type type, const void* x, size_t count, float* y) {
  switch (type) {
    case Type::BFloat16: convert<Vh>(static_cast<const uint16_t*>(x), y, count, bf16_to_float); break;
    case Type::Float16: convert<Vh>(static_cast<const uint16_t*>(x), y, count, half_to_float<Vh>); break;
    case Type::Float8E4M3: convert<Vb>(static_cast<const uint8_t*>(x), y, count, float8_e4m3_to_float); break;
    case Type::Float8E5M2: convert<Vb>(static_cast<const uint8_t*>(x), y, count, float8_e5m2_to_float); break;
    default:
      if (x != y && count) std::memcpy(y, x, count * sizeof(float));
  }
}

inline void narrow(Type type, const float* x, size_t count, void* y) {
  switch (type) {
    case Type::BFloat16: convert<Vf>(x, static_cast<uint16_t*>(y), count, float_to_bf16); break;
    case Type::Float16: convert<Vf>(x, static_cast<uint16_t*>(y), count, float_to_half); break;
    default:
      if (x != y && count) std::memcpy(y, x, count * sizeof(float));
  }
}

}  // namespace
}  // namespace axc
