// NEON with the 8-bit dot product of Armv8.2, for the Cortex-A55. A 16-bit level is two signed bytes, so a product takes
// two dot products.
#include <arm_neon.h>
#include <sys/auxv.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 4, kVectors = 2, kFloatRows = 6;
constexpr size_t kIntRows = 4, kIntPanel = 8, kPrefetched = 0;

}  // namespace
}  // namespace axc

#include "quads.h"
#include "scales.h"

namespace axc {
namespace {

// 128 high bytes, then 128 low ones. For 4-bit weights the even columns of every 32 come first: the weights' low nibbles
// of 16 bytes.
void store_levels(const int16_t* levels, const Activations&, Arithmetic order, uint8_t* out, int32_t*) {
  for (size_t i = 0; i < kBlock; ++i) {
    const int16_t level = levels[order == Arithmetic::Int4 ? i / 32 * 32 + i % 16 * 2 + i / 16 % 2 : i];
    const int high = (level + 128) >> 8;
    out[i] = static_cast<uint8_t>(high);
    out[kBlock + i] = static_cast<uint8_t>(level - high * 256);
  }
}

// Panel: for every 4 columns 8 outputs x 4 bytes.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  if (rows < kIntPanel || columns < kBlock) std::memset(panel, 0, kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) panel[k / 4 * 32 + r * 4 + k % 4] = static_cast<uint8_t>(w[r * stride + k]);
  }
}

// The first `count` of 16 bytes, padded with zeros.
inline uint8x16_t some_bytes(const void* from, size_t count) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, from, count);
  return vld1q_u8(bytes);
}

// Two's complement nibbles to bytes.
inline void nibbles(uint8x16_t bytes, int8x16_t& low, int8x16_t& high) {
  low = vshrq_n_s8(vreinterpretq_s8_u8(vshlq_n_u8(bytes, 4)), 4);
  high = vshrq_n_s8(vreinterpretq_s8_u8(bytes), 4);
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  if (rows < kIntPanel || columns < kBlock) std::memset(panel, 0, kIntPanel * kBlock);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; k += 32) {
      const uint8_t* at = w + r * stride + k / 2;
      int8x16_t low, high;
      nibbles(columns - k < 32 ? some_bytes(at, (columns - k) / 2) : vld1q_u8(at), low, high);
      int8_t bytes[32];
      vst1q_s8(bytes, low), vst1q_s8(bytes + 16, high);
      for (size_t i = 0; i < 32; i += 4) std::memcpy(panel + (k + i) / 4 * 32 + r * 4, bytes + i, 4);
    }
  }
}

template <size_t kRows, size_t kGroup, Precision kPrecision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
              size_t columns, float* c) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  columns = (columns + 31) / 32 * 32;  // packed
  const int8_t* weights = reinterpret_cast<const int8_t*>(panel);
  const int8_t* x = reinterpret_cast<const int8_t*>(levels);
  Vf total[kRows][2];
  repeat<kRows>([&](auto t) AXC_INLINE { total[t][0] = total[t][1] = Vf{}; });
  for (size_t g = 0; g * kSpan < columns; ++g) {
    int32x4_t high[kRows][2], low[kRows][2];
    repeat<kRows>([&](auto t) AXC_INLINE { high[t][0] = high[t][1] = low[t][0] = low[t][1] = vdupq_n_s32(0); });
    for (size_t k = g * kSpan, end = least(k + kSpan, columns); k < end; k += 16) {
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
        const Vf sum = Vf(vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high[t][v], 8), low[t][v])));
        total[t][v] = kGroup ? fma(sum, load(row_scales + g * kIntPanel + v * kWidth), total[t][v]) : sum;
      });
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      float* at = c + t * kIntPanel + v * kWidth;
      store(at, fma(total[t][v], scales[t * kGroups], load(at)));
    });
  });
}

// Products of 16 weights with both bytes of 16 levels, or with the only one.
template <Precision kPrecision>
inline void accumulate(int8x16_t w, const int8_t* levels, int32x4_t& high, int32x4_t& low) {
  if (kPrecision == Precision::Bits16) high = vdotq_s32(high, w, vld1q_s8(levels));
  low = vdotq_s32(low, w, vld1q_s8(levels + kBlock));
}

// Products of a group of columns with their levels.
template <bool kFour, Precision kPrecision>
AXC_INLINE inline int32x4_t products(const uint8_t* weights, const int8_t* levels, size_t columns) {
  int32x4_t high = vdupq_n_s32(0), low = high;
  const auto add = [&](uint8x16_t bytes, size_t k) AXC_INLINE {
    if (kFour) {
      int8x16_t even, odd;
      nibbles(bytes, even, odd);
      accumulate<kPrecision>(even, levels + k, high, low);
      accumulate<kPrecision>(odd, levels + k + 16, high, low);
    } else {
      accumulate<kPrecision>(vreinterpretq_s8_u8(bytes), levels + k, high, low);
    }
  };
  constexpr size_t kStep = kFour ? 32 : 16;
  size_t k = 0;
  for (; k + kStep <= columns; k += kStep) add(vld1q_u8(weights + k * 16 / kStep), k);
  if (k < columns) add(some_bytes(weights + k * 16 / kStep, (columns - k) * 16 / kStep), k);
  return vaddq_s32(vshlq_n_s32(high, 8), low);
}

template <bool>
constexpr int32_t kOffset = 0;

template <bool kFour, size_t kGroup, Precision kPrecision>
AXC_INLINE inline void group_sums(const uint8_t* const rows[4], size_t block, size_t, size_t columns, const uint8_t* levels,
                                  const uint8_t*, Vi* sums) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan, kBytes = kFour ? kSpan / 2 : kSpan;
  repeat<kGroups>([&](auto g) AXC_INLINE {
    const size_t group = block * kGroups + g, left = columns > group * kSpan ? columns - group * kSpan : 0;
    const int8_t* of = reinterpret_cast<const int8_t*>(levels) + g * kSpan;
    int32x4_t p[4];
    repeat<4>([&](auto r) AXC_INLINE {
      const uint8_t* at = rows[r] + group * kBytes;
      p[r] = left < kSpan ? products<kFour, kPrecision>(at, of, left) : products<kFour, kPrecision>(at, of, kSpan);
    });
    sums[g] = Vi(vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3])));
  });
}

}  // namespace
}  // namespace axc

#include "integer_rows.h"

namespace axc {
namespace {

void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  (a.precision == Precision::Bits8 ? dots_in<Precision::Bits8> : dots_in<Precision::Bits16>)(w, row, a, token, out);
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
