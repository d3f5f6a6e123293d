// NEON with the 8-bit dot product of Armv8.2, as the Cortex-A55 has it. A 16-bit level is two signed bytes, so a product
// takes two dot products.
#include <arm_neon.h>
#include <sys/auxv.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 4, kVectors = 2, kFloatRows = 6;
constexpr int32_t kOffset8 = 0, kOffset4 = 0;
constexpr size_t kIntRows = 4, kIntPanel = 8, kPrefetched = 0;

}  // namespace
}  // namespace axc

#include "vectors.h"

namespace axc {
namespace {

// 128 high bytes, then 128 low ones; for 4-bit weights the even columns come first: they are the low halves of the bytes.
int32_t store_levels(const int16_t* levels, const Activations&, Arithmetic order, uint8_t* out) {
  for (size_t i = 0; i < kBlock; ++i) {
    const int16_t level = levels[order == Arithmetic::Int4 ? i % 64 * 2 + i / 64 : i];
    const int high = (level + 128) >> 8;
    out[i] = static_cast<uint8_t>(high);
    out[kBlock + i] = static_cast<uint8_t>(level - high * 256);
  }
  return 0;
}

// Panel: for every 4 columns 8 outputs x 4 bytes.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  if (rows < kIntPanel || columns < kBlock) std::memset(panel, 0, kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) panel[k / 4 * 32 + r * 4 + k % 4] = static_cast<uint8_t>(w[r * stride + k]);
  }
}

// Two's complement nibbles to bytes.
inline void nibbles(uint8x16_t bytes, int8x16_t& low, int8x16_t& high) {
  low = vshrq_n_s8(vreinterpretq_s8_u8(vshlq_n_u8(bytes, 4)), 4);
  high = vshrq_n_s8(vreinterpretq_s8_u8(bytes), 4);
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  if (rows < kIntPanel) std::memset(panel, 0, kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t i = 0; i < kBlock / 2; i += 16) {
      int8x16_t low, high;
      nibbles(vld1q_u8(w + r * stride + i), low, high);
      int8_t bytes[32];
      vst1q_s8(bytes, low), vst1q_s8(bytes + 16, high);
      for (size_t k = 0; k < 16; k += 4) {
        std::memcpy(panel + (i + k) / 4 * 32 + r * 4, bytes + k, 4);
        std::memcpy(panel + (kBlock / 2 + i + k) / 4 * 32 + r * 4, bytes + 16 + k, 4);
      }
    }
  }
}

template <size_t kRows, bool kScaled, Precision kPrecision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, int32_t, const float* row_scales,
              float* c) {
  int32x4_t high[kRows][2], low[kRows][2];
  repeat<kRows>([&](auto t) AXC_INLINE { high[t][0] = high[t][1] = low[t][0] = low[t][1] = vdupq_n_s32(0); });
  const int8_t* weights = reinterpret_cast<const int8_t*>(panel);
  const int8_t* x = reinterpret_cast<const int8_t*>(levels);
  for (size_t k = 0; k < kBlock; k += 16) {
    int8x16_t h[kRows], l[kRows];
    repeat<kRows>([&](auto t) AXC_INLINE {
      h[t] = vld1q_s8(x + t * kLevelBytes + k);
      l[t] = vld1q_s8(x + t * kLevelBytes + kBlock + k);
    });
    repeat<4>([&](auto lane) AXC_INLINE {
      const int8x16_t w0 = vld1q_s8(weights + k * 8 + lane * 32), w1 = vld1q_s8(weights + k * 8 + lane * 32 + 16);
      repeat<kRows>([&](auto t) AXC_INLINE {
        if (kPrecision == Precision::Bits16) {
          high[t][0] = vdotq_laneq_s32(high[t][0], w0, h[t], lane);
          high[t][1] = vdotq_laneq_s32(high[t][1], w1, h[t], lane);
        }
        low[t][0] = vdotq_laneq_s32(low[t][0], w0, l[t], lane);
        low[t][1] = vdotq_laneq_s32(low[t][1], w1, l[t], lane);
      });
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      float* at = c + t * kIntPanel + v * kWidth;
      float32x4_t factor = vdupq_n_f32(scales[t]);
      if (kScaled) factor = vmulq_f32(factor, vld1q_f32(row_scales + v * kWidth));
      const int32x4_t sum = vaddq_s32(vshlq_n_s32(high[t][v], 8), low[t][v]);
      vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(sum), factor));
    });
  });
}

// Both bytes of 16 levels, or the only one, with 16 weights.
template <Precision kPrecision>
inline void accumulate(int8x16_t w, const int8_t* levels, int32x4_t& high, int32x4_t& low) {
  if (kPrecision == Precision::Bits16) high = vdotq_s32(high, w, vld1q_s8(levels));
  low = vdotq_s32(low, w, vld1q_s8(levels + kBlock));
}

inline float32x4_t fold(int32x4_t high, int32x4_t low, float factor, float32x4_t total) {
  return vfmaq_n_f32(total, vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low)), factor);
}

template <Precision kPrecision>
float dot_int8(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const int8_t* weights = reinterpret_cast<const int8_t*>(w.data) + row * w.columns;
  float32x4_t total = vdupq_n_f32(0);
  for (size_t b = 0; b < a.blocks(); ++b) {
    const size_t entry = a.entry(b, token), count = least(kBlock, w.columns - b * kBlock);
    const int8_t *at = weights + b * kBlock, *levels = reinterpret_cast<const int8_t*>(a.levels + entry * kLevelBytes);
    int32x4_t high = vdupq_n_s32(0), low = high;
    size_t k = 0;
    for (; k + 16 <= count; k += 16) accumulate<kPrecision>(vld1q_s8(at + k), levels + k, high, low);
    if (k < count) {
      int8_t rest[16] = {};
      std::memcpy(rest, at + k, count - k);
      accumulate<kPrecision>(vld1q_s8(rest), levels + k, high, low);
    }
    total = fold(high, low, a.scales[entry], total);
  }
  return vaddvq_f32(total);
}

template <Precision kPrecision>
float dot_int4(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const size_t blocks = a.blocks();
  const uint8_t* weights = w.data + row * blocks * (kBlock / 2);
  float32x4_t total = vdupq_n_f32(0);
  for (size_t b = 0; b < blocks; ++b) {
    const size_t entry = a.entry(b, token);
    const int8_t* levels = reinterpret_cast<const int8_t*>(a.levels + entry * kLevelBytes);
    int32x4_t high = vdupq_n_s32(0), low = high;
    for (size_t k = 0; k < kBlock / 2; k += 16) {
      int8x16_t even, odd;
      nibbles(vld1q_u8(weights + b * (kBlock / 2) + k), even, odd);
      accumulate<kPrecision>(even, levels + k, high, low);
      accumulate<kPrecision>(odd, levels + kBlock / 2 + k, high, low);
    }
    total = fold(high, low, a.scales[entry] * w.scales[row * blocks + b], total);
  }
  return vaddvq_f32(total);
}

constexpr size_t kDotRows = 1;

template <Precision kPrecision>
float product(const Matrix& w, size_t row, const Activations& a, size_t token) {
  return (w.arithmetic == Arithmetic::Int4 ? dot_int4<kPrecision> : dot_int8<kPrecision>)(w, row, a, token);
}

void dots(const Matrix& w, size_t row, size_t, const Activations& a, size_t token, float* out) {
  *out = (a.precision == Precision::Bits8 ? product<Precision::Bits8> : product<Precision::Bits16>)(w, row, a, token);
}

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() {
  constexpr unsigned long kDotProduct = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct;
}

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kNeonDotprod = table("neon_dotprod", runs_here);
}
