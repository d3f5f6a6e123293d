// Plain NEON, for the Cortex-A53: products of 16 bits or, of 4-bit weights or 8-bit activations, of bytes.
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 4, kVectors = 2, kFloatRows = 6;
constexpr size_t kIntRows = 6, kIntPanel = 8, kDotRows = 4, kPrefetched = 0;

}  // namespace
}  // namespace axc

#include "neon_rows.h"

namespace axc {
namespace {

// Levels of 16 bits, or bytes where products are of bytes.
void store_levels(const int16_t* levels, const Activations& a, Arithmetic order, uint8_t* out, int32_t*) {
  const bool packed = a.rows > kTokensByDot, wide = order != Arithmetic::Int4 && a.precision == Precision::Bits16;
  if (packed || wide) {
    std::memcpy(out, levels, kLevelBytes);
  } else {
    store_bytes(levels, order, out);
  }
}

// Panel: for every column 8 outputs of 16 bits.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  for (size_t k = 0; k < columns; k += 8) {
    int16x8_t v[kIntPanel], turned[kIntPanel];
    for (size_t r = 0; r < kIntPanel; ++r) {
      const int8_t* at = w + r * stride + k;
      if (r >= rows) {
        v[r] = vdupq_n_s16(0);
      } else if (columns - k < 8) {
        v[r] = vmovl_s8(vreinterpret_s8_u8(vld1_u8(SomeBytes<8>(at, columns - k).bytes)));
      } else {
        v[r] = vmovl_s8(vld1_s8(at));
      }
    }
    for (size_t r = 0; r < 8; r += 2) turned[r] = vtrn1q_s16(v[r], v[r + 1]), turned[r + 1] = vtrn2q_s16(v[r], v[r + 1]);
    for (size_t half = 0; half < 2; ++half) {
      float32x4_t quad[4];
      for (size_t r = 0; r < 4; ++r) quad[r] = vreinterpretq_f32_s16(turned[2 * r + half]);
      transpose_4(quad);
      for (size_t i = 0; i < 4; ++i) vst1q_f32(reinterpret_cast<float*>(panel + 16 * (k + 2 * i + half)), quad[i]);
    }
  }
}

template <Precision kPrecision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  int8_t bytes[kIntPanel][kBlock];
  widen_nibbles<true>(w, stride, rows, columns, bytes);
  pack_int8<kPrecision>(bytes[0], kBlock, rows, columns, group, panel);
}

template <size_t kRows, size_t kGroup, Precision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
              size_t columns, float* c) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  Vf total[kRows][2];
  repeat<kRows>([&](auto t) AXC_INLINE { total[t][0] = total[t][1] = Vf{}; });
  columns = (columns + 7) / 8 * 8;  // packed
  for (size_t g = 0; g * kSpan < columns; ++g) {
    int32x4_t acc[kRows][2];
    repeat<kRows>([&](auto t) AXC_INLINE { acc[t][0] = acc[t][1] = vdupq_n_s32(0); });
    for (size_t k = g * kSpan, end = least(k + kSpan, columns); k < end; k += 8) {
      int16x8_t x[kRows];
      repeat<kRows>([&](auto t) AXC_INLINE {
        x[t] = vreinterpretq_s16_u8(vld1q_u8(levels + t * kLevelBytes + 2 * k));
      });
      repeat<8>([&](auto lane) AXC_INLINE {
        const int16x8_t w = vreinterpretq_s16_u8(vld1q_u8(panel + 16 * (k + lane)));
        repeat<kRows>([&](auto t) AXC_INLINE {
          acc[t][0] = vmlal_laneq_s16(acc[t][0], vget_low_s16(w), x[t], lane);
          acc[t][1] = vmlal_high_laneq_s16(acc[t][1], w, x[t], lane);
        });
      });
    }
    repeat<kRows>([&](auto t) AXC_INLINE {
      repeat<2>([&](auto v) AXC_INLINE {
        const Vf sum = Vf(vcvtq_f32_s32(acc[t][v]));
        total[t][v] = kGroup ? fma(sum, load(row_scales + g * kIntPanel + v * kWidth), total[t][v]) : sum;
      });
    });
  }
  add_tile(total, scales, kGroups, c);
}

// 8-bit weights, widened.
template <size_t kSpan>
struct Sums<false, Precision::Bits16, kSpan> {
  int32x4_t of[kDotRows][2] = {};

  AXC_INLINE inline void add(const uint8_t* const weights[kDotRows], const uint8_t* levels, size_t k) {
    repeat<kStep / 16>([&](auto i) AXC_INLINE {
      const int16x8_t x0 = vreinterpretq_s16_u8(vld1q_u8(levels + 2 * k + 32 * i));
      const int16x8_t x1 = vreinterpretq_s16_u8(vld1q_u8(levels + 2 * k + 32 * i + 16));
      int16x8_t w0[kDotRows], w1[kDotRows];
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        const int8x16_t w = bytes_at(weights[r] + 16 * i);
        w0[r] = vmovl_s8(vget_low_s8(w)), w1[r] = vmovl_high_s8(w);
      });
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        of[r][0] = vmlal_s16(of[r][0], vget_low_s16(w0[r]), vget_low_s16(x0));
        of[r][1] = vmlal_high_s16(of[r][1], w0[r], x0);
      });
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        of[r][0] = vmlal_s16(of[r][0], vget_low_s16(w1[r]), vget_low_s16(x1));
        of[r][1] = vmlal_high_s16(of[r][1], w1[r], x1);
      });
    });
  }

  AXC_INLINE inline void take(int32x4_t out[kQuads]) {
    int32x4_t sums[kDotRows];
    repeat<kDotRows>([&](auto r) AXC_INLINE { sums[r] = vaddq_s32(of[r][0], of[r][1]); });
    out[0] = lane_sums(sums);
    *this = {};
  }
};

// 8-bit weights and levels: two products fit into 16 bits, since no level is -128.
template <size_t kSpan>
struct Sums<false, Precision::Bits8, kSpan> {
  int32x4_t of[kDotRows][2] = {};

  AXC_INLINE inline void add(const uint8_t* const weights[kDotRows], const uint8_t* levels, size_t k) {
    int16x8_t two[kDotRows][2];
    repeat<2>([&](auto i) AXC_INLINE {
      const int8x16_t x = bytes_at(levels + kBlock + k + 16 * i);
      int8x16_t w[kDotRows];
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        w[r] = bytes_at(weights[r] + 16 * i);
        two[r][i] = vmull_s8(vget_low_s8(w[r]), vget_low_s8(x));
      });
      repeat<kDotRows>([&](auto r) AXC_INLINE { two[r][i] = vmlal_high_s8(two[r][i], w[r], x); });
    });
    repeat<2>([&](auto i) AXC_INLINE {
      repeat<kDotRows>([&](auto r) AXC_INLINE { of[r][i] = vpadalq_s16(of[r][i], two[r][i]); });
    });
  }

  AXC_INLINE inline void take(int32x4_t out[kQuads]) {
    int32x4_t sums[kDotRows];
    repeat<kDotRows>([&](auto r) AXC_INLINE { sums[r] = vaddq_s32(of[r][0], of[r][1]); });
    out[0] = lane_sums(sums);
    *this = {};
  }
};

// 4-bit weights with both bytes of levels: the 16 products that a lane has of a block fit into 16 bits.
template <Precision kPrecision, size_t kSpan>
struct Sums<true, kPrecision, kSpan> {
  static constexpr bool kHigh = kPrecision == Precision::Bits16;
  static_assert(kBlock / 8 * 8 * 128 <= 32767);
  int16x8_t high[kDotRows] = {}, low[kDotRows] = {};

  AXC_INLINE inline void add(const uint8_t* const weights[kDotRows], const uint8_t* levels, size_t k) {
    int8x16_t w[2][kDotRows];
    repeat<kDotRows>([&](auto r) AXC_INLINE { nibbles(vld1q_u8(weights[r]), w[0][r], w[1][r]); });
    repeat<2>([&](auto i) AXC_INLINE {
      const int8x16_t h = bytes_at(levels + k + 16 * i), l = bytes_at(levels + kBlock + k + 16 * i);
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        if (kHigh) high[r] = vmlal_s8(high[r], vget_low_s8(w[i][r]), vget_low_s8(h));
        low[r] = vmlal_s8(low[r], vget_low_s8(w[i][r]), vget_low_s8(l));
      });
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        if (kHigh) high[r] = vmlal_high_s8(high[r], w[i][r], h);
        low[r] = vmlal_high_s8(low[r], w[i][r], l);
      });
    });
  }

  AXC_INLINE inline void take(int32x4_t out[kQuads]) {
    // 16 bits hold 31 products.
    const auto sums = [](const int16x8_t v[kDotRows]) AXC_INLINE {
      if constexpr (kSpan == 32) {
        return vpaddlq_s16(vpaddq_s16(vpaddq_s16(v[0], v[1]), vpaddq_s16(v[2], v[3])));
      } else if constexpr (kSpan == 64) {
        return vpaddq_s32(vpaddlq_s16(vpaddq_s16(v[0], v[1])), vpaddlq_s16(vpaddq_s16(v[2], v[3])));
      } else {
        const int32x4_t wide[kDotRows] = {vpaddlq_s16(v[0]), vpaddlq_s16(v[1]), vpaddlq_s16(v[2]), vpaddlq_s16(v[3])};
        return lane_sums(wide);
      }
    };
    out[0] = kHigh ? vaddq_s32(vshlq_n_s32(sums(high), 8), sums(low)) : sums(low);
    *this = {};
  }
};

template <bool>
inline Vf value_of(int32x4_t sum) {
  return Vf(vcvtq_f32_s32(sum));
}

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() { return true; }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kNeon = table("neon", runs_here);
}
