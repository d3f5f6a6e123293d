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
constexpr size_t kIntRows = 4, kIntPanel = 8, kDotRows = 8, kPrefetched = 0;

}  // namespace
}  // namespace axc

#include "neon_rows.h"

namespace axc {
namespace {

void store_levels(const int16_t* levels, const Activations&, Arithmetic order, uint8_t* out, int32_t*) {
  store_bytes(levels, order, out);
}

// Panel: for every 4 columns 8 outputs x 4 bytes.
template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  for (size_t k = 0; k < columns; k += 16) {
    for (size_t first = 0; first < kIntPanel; first += 4) {
      float32x4_t quad[4];  // of bytes
      for (size_t i = 0; i < 4; ++i) {
        const int8_t* at = w + (first + i) * stride + k;
        if (first + i >= rows) {
          quad[i] = vdupq_n_f32(0);
        } else if (columns - k < 16) {
          quad[i] = vreinterpretq_f32_u8(vld1q_u8(SomeBytes<16>(at, columns - k).bytes));
        } else {
          quad[i] = vreinterpretq_f32_s8(vld1q_s8(at));
        }
      }
      transpose_4(quad);
      for (size_t i = 0; i < 4; ++i) vst1q_u8(panel + 8 * k + 32 * i + 4 * first, vreinterpretq_u8_f32(quad[i]));
    }
  }
}

template <Precision kPrecision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  int8_t bytes[kIntPanel][kBlock];
  widen_nibbles<false>(w, stride, rows, columns, bytes);
  pack_int8<kPrecision>(bytes[0], kBlock, rows, (columns + 31) / 32 * 32, group, panel);
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
    // Not unrolled: the compiler would load ahead more levels than it has registers for.
#pragma clang loop unroll(disable)
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
  add_tile(total, scales, kGroups, c);
}

// Of 4-bit weights 16 times the sum: that spares the shift of the low nibbles. Sums are of the whole row so far, modulo
// 2^32: their differences are those of a group, and nothing is set to zero between. Groups of one step take half the
// registers instead: low follows high in the same ones.
template <bool kFour, Precision kPrecision, size_t kSpan>
struct Sums {
  static constexpr bool kHigh = kPrecision == Precision::Bits16, kOne = kHigh && kSpan == kStep;
  int32x4_t high[kDotRows] = {}, low[kDotRows] = {};
  int32x4_t before[kQuads] = {};
  uint8x16_t mask = vdupq_n_u8(0xF0);

  Sums() { asm("" : "+w"(mask)); }  // else the compiler makes it anew for each row

  AXC_INLINE inline void add(const uint8_t* const weights[kDotRows], const uint8_t* levels, size_t k) {
    const int8x16_t x[2][2] = {{bytes_at(levels + k), bytes_at(levels + k + 16)},
                               {bytes_at(levels + kBlock + k), bytes_at(levels + kBlock + k + 16)}};
    repeat<kQuads>([&](auto q) AXC_INLINE {
      int8x16_t w[2][4];
      repeat<4>([&](auto r) AXC_INLINE {
        const uint8_t* at = weights[4 * q + r];
        const uint8x16_t bytes = vld1q_u8(at);
        w[0][r] = vreinterpretq_s8_u8(kFour ? vshlq_n_u8(bytes, 4) : bytes);
        w[1][r] = kFour ? vreinterpretq_s8_u8(vandq_u8(bytes, mask)) : bytes_at(at + 16);
      });
      const auto dot = [&](int32x4_t* to, int which, int i) AXC_INLINE {
        repeat<4>([&](auto r) AXC_INLINE { to[4 * q + r] = vdotq_s32(to[4 * q + r], w[i][r], x[which][i]); });
      };
      if constexpr (kOne) {
        dot(low, 0, 0), dot(low, 0, 1);
        repeat<4>([&](auto r) AXC_INLINE { low[4 * q + r] = vshlq_n_s32(low[4 * q + r], 8); });
        dot(low, 1, 0), dot(low, 1, 1);
      } else {
        repeat<2>([&](auto i) AXC_INLINE {
          if constexpr (kHigh) dot(high, 0, i);
          dot(low, 1, i);
        });
      }
    });
    if (kFour) asm volatile("" ::: "memory");  // else the compiler loads ahead more than it has registers for
  }

  AXC_INLINE inline void take(int32x4_t sums[kQuads]) {
    repeat<kQuads>([&](auto q) AXC_INLINE {
      const int32x4_t sum = lane_sums(low + 4 * q);
      if constexpr (kOne) {
        sums[q] = sum;
        repeat<4>([&](auto r) AXC_INLINE { low[4 * q + r] = vdupq_n_s32(0); });
      } else {
        const int32x4_t now = kHigh ? vaddq_s32(vshlq_n_s32(lane_sums(high + 4 * q), 8), sum) : sum;
        sums[q] = vsubq_s32(now, before[q]);
        before[q] = now;
      }
    });
  }
};

template <bool kFour>
inline Vf value_of(int32x4_t sum) {
  return Vf(kFour ? vcvtq_n_f32_s32(sum, 4) : vcvtq_f32_s32(sum));
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
