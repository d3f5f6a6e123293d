// NEON: whole rows of an integer weight, in place, with one token; and bytes of levels and weights. The file that
// includes this defines, before it uses dots:
//   kDotRows                      4 or 8
//   Sums<four, precision, span>   sums of products with these rows:
//     add(weights, levels, k)     adds the columns [k, k + 32) of the block whose levels are given
//     take(sums)                  the sums since the last call, of at most `span` columns; a lane for each row
//   value_of<four>                such sums as float32
// The order of a token's float sum is that of int_tile, of many tokens: see integer.h.
#pragma once

#include "scales.h"

namespace axc {
namespace {

constexpr size_t kStep = 32;

// 128 high bytes, then 128 low ones. For 4-bit weights the even columns of every 32 come first: the weights' low nibbles
// of 16 bytes.
inline void store_bytes(const int16_t* levels, Arithmetic order, uint8_t* out) {
  for (size_t i = 0; i < kBlock; ++i) {
    const int16_t level = levels[order == Arithmetic::Int4 ? i / 32 * 32 + i % 16 * 2 + i / 16 % 2 : i];
    const int high = (level + 128) >> 8;
    out[i] = static_cast<uint8_t>(high);
    out[kBlock + i] = static_cast<uint8_t>(level - high * 256);
  }
}

// The first `count` of kCount bytes, padded with zeros.
template <size_t kCount>
struct SomeBytes {
  uint8_t bytes[kCount] = {};
  SomeBytes(const void* from, size_t count) { std::memcpy(bytes, from, count); }
};

// Two's complement nibbles to bytes.
inline void nibbles(uint8x16_t bytes, int8x16_t& low, int8x16_t& high) {
  low = vshrq_n_s8(vreinterpretq_s8_u8(vshlq_n_u8(bytes, 4)), 4);
  high = vshrq_n_s8(vreinterpretq_s8_u8(bytes), 4);
}

// 4-bit rows as bytes: the even columns of every 32 first or, `in_order`, all in their order; padded to 32 columns.
template <bool kInOrder>
inline void widen_nibbles(const uint8_t* w, size_t stride, size_t rows, size_t columns, int8_t (*out)[kBlock]) {
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; k += 32) {
      const uint8_t* at = w + r * stride + k / 2;
      int8x16_t low, high;
      nibbles(vld1q_u8(columns - k < 32 ? SomeBytes<16>(at, (columns - k) / 2).bytes : at), low, high);
      vst1q_s8(out[r] + k, kInOrder ? vzip1q_s8(low, high) : low);
      vst1q_s8(out[r] + k + 16, kInOrder ? vzip2q_s8(low, high) : high);
    }
  }
}

inline void transpose_4(float32x4_t v[4]) {
  const float32x4_t a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
  const float32x4_t c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
  const auto halves = [](float32x4_t x, float32x4_t y, float32x4_t& first, float32x4_t& second) AXC_INLINE {
    first = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
    second = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y)));
  };
  halves(a, c, v[0], v[2]);
  halves(b, d, v[1], v[3]);
}

inline int8x16_t bytes_at(const uint8_t* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }

// c[t][o] += scales[t * stride] * total[t][o]: the end of an int_tile.
template <size_t kRows>
AXC_INLINE inline void add_tile(Vf (&total)[kRows][2], const float* scales, size_t stride, float* c) {
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<2>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  each([&](auto t, auto v) AXC_INLINE {
    total[t][v] = fma(total[t][v], scales[t * stride], load(c + t * kIntPanel + v * kWidth));
  });
  each([&](auto t, auto v) AXC_INLINE { store(c + t * kIntPanel + v * kWidth, total[t][v]); });
}

// The sums of the lanes of four vectors.
inline int32x4_t lane_sums(const int32x4_t v[4]) {
  return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
}

constexpr size_t kQuads = kDotRows / 4;  // vectors with a lane for each row
static_assert(kDotRows % 4 == 0);

template <bool kFour, Precision kPrecision, size_t kSpan>
struct Sums;

template <bool kFour>
Vf value_of(int32x4_t sum);

// Four groups at a time, of one, two or four blocks: a vector of scales for each row.
template <bool kFour, size_t kGroup, Precision kPrecision>
[[gnu::noinline]] void dot_rows(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan, kBlocks = 4 / kGroups;
  constexpr size_t kPerByte = kFour ? 2 : 1;
  const size_t stride = w.stride(), scale_bytes = w.scale_bytes();
  size_t index[kDotRows];
  const uint8_t *rows[kDotRows], *row_scales[kDotRows];
  for (size_t r = 0; r < kDotRows; ++r) {
    index[r] = least(row + r, w.rows - 1);
    rows[r] = w.data + index[r] * stride;
    row_scales[r] = static_cast<const uint8_t*>(w.scales) + index[r] * w.blocks * scale_bytes;
  }
  const uint8_t* levels = a.levels + a.entry(0, token) * kLevelBytes;
  const float* level_scales = a.scales + a.entry(0, token) * kGroups;
  Vf total[kQuads];
  repeat<kQuads>([&](auto q) AXC_INLINE { total[q] = load(out + 4 * q); });
  Sums<kFour, kPrecision, kSpan> sums;
  const auto add_scaled = [&](const int32x4_t sum[4][kQuads], float32x4_t scales[kDotRows], size_t blocks) AXC_INLINE {
    repeat<kQuads>([&](auto q) AXC_INLINE {
      Vf values[4];
      repeat<4>([&](auto g) AXC_INLINE { values[g] = value_of<kFour>(sum[g][q]); });
      if constexpr (kGroup != 0) {
        transpose_4(scales + 4 * q);
        repeat<kBlocks>([&](auto b) AXC_INLINE {
          Vf scaled{};
          repeat<kGroups>([&](auto g) AXC_INLINE {
            scaled = fma(values[b * kGroups + g], Vf(scales[4 * q + b * kGroups + g]), scaled);
          });
          values[b] = scaled;
        });
      }
      repeat<kBlocks>([&](auto b) AXC_INLINE {
        if (b < blocks) total[q] = fma(values[b], level_scales[b * kGroups] - Vf{}, total[q]);
      });
    });
  };
  size_t column = 0, group = 0;
  for (; column + 4 * kSpan <= w.columns; column += 4 * kSpan, group += 4) {
    int32x4_t of_group[4][kQuads];
    // A loop over blocks: the compiler would delay the ends of all sums, and have no registers for them.
#pragma clang loop unroll(disable)
    for (size_t b = 0; b < kBlocks; ++b, levels += kLevelBytes) {
      repeat<kGroups>([&](auto g) AXC_INLINE {
        repeat<kSpan / kStep>([&](auto i) AXC_INLINE {
          const size_t k = g * kSpan + i * kStep, at = (column + b * kBlock + k) / kPerByte;
          const uint8_t* there[kDotRows];
          repeat<kDotRows>([&](auto r) AXC_INLINE { there[r] = rows[r] + at; });
          sums.add(there, levels, k);
        });
        sums.take(of_group[b * kGroups + g]);
      });
    }
    float32x4_t scales[kDotRows];
    if constexpr (kGroup != 0) {
      repeat<kDotRows>([&](auto r) AXC_INLINE {
        const uint8_t* at = row_scales[r] + group * scale_bytes;
        scales[r] = w.scale_type == Type::Float16 ? vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(at)))
                                                  : vld1q_f32(reinterpret_cast<const float*>(at));
      });
    }
    add_scaled(of_group, scales, kBlocks);
    level_scales += 4;
  }
  if (const size_t left = w.columns - column) {
    int32x4_t of_group[4][kQuads];
    for (size_t g = 0; g < 4; ++g) {
      for (size_t k = g * kSpan; k < least(left, (g + 1) * kSpan); k += kStep) {
        const size_t bytes = least(kStep, left - k) / kPerByte;
        uint8_t padded[kDotRows][kStep] = {};
        const uint8_t* at[kDotRows];
        for (size_t r = 0; r < kDotRows; ++r) {
          at[r] = padded[r];
          std::memcpy(padded[r], rows[r] + (column + k) / kPerByte, bytes);
        }
        sums.add(at, levels + k / kBlock * kLevelBytes, k % kBlock);
      }
      sums.take(of_group[g]);
    }
    float32x4_t scales[kDotRows];
    if constexpr (kGroup != 0) {
      const size_t count = least(4, (left + kSpan - 1) / kSpan);
      for (size_t r = 0; r < kDotRows; ++r) scales[r] = float32x4_t(scales_at(w, index[r], group, count));
    }
    add_scaled(of_group, scales, (left + kBlock - 1) / kBlock);
  }
  repeat<kQuads>([&](auto q) AXC_INLINE { store(out + 4 * q, total[q]); });
}

template <Precision kPrecision>
inline void dots_in(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  const bool four = w.arithmetic == Arithmetic::Int4;
  by_group(w, a, [&](auto group) {
    (four ? dot_rows<true, group, kPrecision> : dot_rows<false, group, kPrecision>)(w, row, a, token, out);
  });
}

inline void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  (a.precision == Precision::Bits8 ? dots_in<Precision::Bits8> : dots_in<Precision::Bits16>)(w, row, a, token, out);
}

}  // namespace
}  // namespace axc
