// AVX-512 with VNNI: levels as bytes. A 16-bit level is two bytes, so a product takes two 8-bit dot products. VNNI wants
// one unsigned factor. For weights read once it is the weight, sum (w + 128) (256 high + low) - 128 sum (256 high + low);
// for packed weights it is the level, sum (256 high + low) w - 2^15 sum w.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu_x86.h"
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 16, kVectors = 2, kFloatRows = 12;
constexpr size_t kIntPanel = 32, kPrefetched = 16384;

}  // namespace
}  // namespace axc

#include "prefetch.h"
#include "scales.h"
#include "transpose_words.h"

namespace axc {
namespace {

// The sums of 128 levels by group of 32, 64 or 128 columns.
AXC_INLINE inline void store_sums(const __m512i of_32[4], size_t group, int32_t* sums) {
  for (size_t i = 0; i < 4; i += group / 32) {
    __m512i sum = of_32[i];
    for (size_t j = 1; j < group / 32; ++j) sum = _mm512_add_epi32(sum, of_32[i + j]);
    *sums++ = _mm512_reduce_add_epi32(sum);
  }
}

// For products of single tokens: 128 signed high bytes, then 128 low ones. For 4-bit weights the even columns come first:
// the weights' low nibbles. Also stores the sums of levels.
inline void store_bytes(const int16_t* levels, size_t group, Arithmetic order, uint8_t* out, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i words[4], of_32[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = _mm512_loadu_si512(levels + 32 * i);
    of_32[i] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), words[i], ones);
  }
  store_sums(of_32, group, sums);
  if (order == Arithmetic::Int4) {
    alignas(64) uint16_t even[32];
    for (int i = 0; i < 32; ++i) even[i] = static_cast<uint16_t>(2 * i);
    const __m512i low = _mm512_load_si512(even), high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
    const __m512i e0 = _mm512_permutex2var_epi16(words[0], low, words[1]), o0 = _mm512_permutex2var_epi16(words[0], high, words[1]);
    const __m512i e1 = _mm512_permutex2var_epi16(words[2], low, words[3]), o1 = _mm512_permutex2var_epi16(words[2], high, words[3]);
    words[0] = e0, words[1] = e1, words[2] = o0, words[3] = o1;
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(words[i], _mm512_set1_epi16(128)), 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), _mm512_cvtepi16_epi8(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kBlock + 32 * i), _mm512_cvtepi16_epi8(words[i]));
  }
}

// For products of many tokens: 128 unsigned high bytes of level + 2^15, then the low ones; 8-bit: one byte, level + 2^7.
// For 4-bit weights the even columns of every 8 come first: the weights' low nibbles of 4 bytes.
inline void store_unsigned(const int16_t* levels, Precision precision, Arithmetic order, uint8_t* out) {
  alignas(64) uint16_t places[32];
  for (int i = 0; i < 32; ++i) places[i] = static_cast<uint16_t>(order == Arithmetic::Int4 ? i / 8 * 8 + i % 4 * 2 + i / 4 % 2 : i);
  const __m512i from = _mm512_load_si512(places);
  const __m512i offset = _mm512_set1_epi16(precision == Precision::Bits8 ? 128 : -32768);
  for (int i = 0; i < 4; ++i) {
    const __m512i words = _mm512_add_epi16(_mm512_permutexvar_epi16(from, _mm512_loadu_si512(levels + 32 * i)), offset);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kBlock + 32 * i), _mm512_cvtepi16_epi8(words));
  }
}

inline __mmask64 first_bytes(size_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// Calls store(half, part, r) for each half of 16 rows of a panel, as a constant, and each part of 64 bytes of a block,
// transposed. Missing rows and bytes are zeros.
template <size_t kBytes, class Store>
AXC_INLINE inline void each_transposed(const uint8_t* w, size_t stride, size_t rows, size_t bytes, Store store) {
  repeat<kIntPanel / 16>([&](auto half) AXC_INLINE {
    const size_t there = rows > half * 16 ? least(16, rows - half * 16) : 0;
    repeat<kBytes / 64>([&](auto part) AXC_INLINE {
      const size_t count = bytes > 64 * part ? least(64, bytes - 64 * part) : 0;
      const uint8_t* from = w + half * 16 * stride + 64 * part;
      Vf words[16];
      if (there == 16 && count == 64) {
        transpose_words([=](size_t row) AXC_INLINE { return from + row * stride; }, words);
      } else {
        uint8_t padded[16 * 64] = {};
        for (size_t row = 0; row < there; ++row) std::memcpy(padded + 64 * row, from + row * stride, count);
        transpose_words([&](size_t row) AXC_INLINE { return padded + 64 * row; }, words);
      }
      __m512i r[16];
      repeat<16>([&](auto i) AXC_INLINE { r[i] = __m512i(words[i]); });
      store(half, part, r);
    });
  });
}

// Sums over groups of columns for each output. Of every 32 columns first, so that each has a register.
class GroupSums {
 public:
  // Adds 4 columns, with more(sum). kStep: their number in the block.
  template <size_t kStep, size_t kHalf, class More>
  AXC_INLINE void add(const More& more) {
    __m512i& sum = of_32_[kHalf][kStep / 8];
    sum = more(sum);
  }

  // Stores the negative sums of groups of 32, 64 or 128 columns.
  AXC_INLINE void store(size_t group, uint8_t* at) const {
    for (size_t i = 0; i < 4; i += group / 32) {
      repeat<kIntPanel / 16>([&](auto half) AXC_INLINE {
        __m512i sum = _mm512_setzero_si512();
        for (size_t j = i; j < i + group / 32; ++j) sum = _mm512_sub_epi32(sum, of_32_[half][j]);
        _mm512_store_si512(at + half * 64, sum);
      });
      at += kIntPanel * 4;
    }
  }

 private:
  __m512i of_32_[kIntPanel / 16][4] = {};
};

constexpr size_t kBytePanel = kIntPanel * kBlock;

// Panel: for every 4 columns 32 outputs x 4 bytes; then for each group of columns the correction for unsigned levels:
// -2^7 times the sum of the weights.
class BytePanel {
 public:
  explicit BytePanel(uint8_t* at) : at_(at) {}

  template <size_t kStep, size_t kHalf>
  AXC_INLINE void put(__m512i w) {
    _mm512_store_si512(at_ + (kStep * 2 + kHalf) * 64, w);
    sums_.add<kStep, kHalf>([&](__m512i sum) AXC_INLINE { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), w); });
  }

  AXC_INLINE void finish(size_t group) const { sums_.store(group, at_ + kBytePanel); }

 private:
  uint8_t* at_;
  GroupSums sums_;
};

inline void pack_bytes_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  BytePanel to(panel);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w);
  each_transposed<kBlock>(bytes, stride, rows, columns, [&](auto half, auto part, const __m512i* r) AXC_INLINE {
    repeat<16>([&](auto i) AXC_INLINE { to.put<part * 16 + i, half>(r[i]); });
  });
  to.finish(group);
}

inline void pack_bytes_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  BytePanel to(panel);
  const __m512i eight = _mm512_set1_epi8(8), nibble = _mm512_set1_epi8(15);
  const auto level = [&](__m512i bytes) AXC_INLINE {
    constexpr int kFlipped = 0x28;  // as ternary logic: (bytes ^ eight) & nibble
    return _mm512_sub_epi8(_mm512_ternarylogic_epi32(bytes, eight, nibble, kFlipped), eight);
  };
  each_transposed<kBlock / 2>(w, stride, rows, columns / 2, [&](auto half, auto, const __m512i* r) AXC_INLINE {
    repeat<16>([&](auto i) AXC_INLINE {
      to.put<2 * i, half>(level(r[i]));
      to.put<2 * i + 1, half>(level(_mm512_srli_epi16(r[i], 4)));
    });
  });
  to.finish(group);
}

inline int32_t dword(const uint8_t* at) {
  int32_t value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

// c += sums of a block x scales
template <bool kScaled>
AXC_INLINE inline void add_scaled(Vi sums, float scale, const float* row_scales, float* c) {
  Vf values = __builtin_convertvector(sums, Vf);
  if (kScaled) values *= load(row_scales);
  store(c, fma(values, scale, load(c)));
}

// One group a block: separate sums for high and low bytes.
template <size_t kRows, bool kScaled, Precision kPrecision>
void byte_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
               size_t columns, float* c) {
  Vi high[kRows][2], low[kRows][2];  // not __m512i, which GCC 12 would spill
  repeat<2>([&](auto v) AXC_INLINE {
    const Vi offset = Vi(_mm512_load_si512(panel + kBytePanel + 64 * v));
    repeat<kRows>([&](auto t) AXC_INLINE {
      high[t][v] = kPrecision == Precision::Bits16 ? offset : Vi{};
      low[t][v] = kPrecision == Precision::Bits16 ? Vi{} : offset;
    });
  });
  columns = (columns + 7) / 8 * 8;  // the panel permutes columns in groups of 8
  for (size_t k = 0; k < columns; k += 4) {
    const __m512i w0 = _mm512_load_si512(panel + k * 32), w1 = _mm512_load_si512(panel + k * 32 + 64);
    repeat<kRows>([&](auto t) AXC_INLINE {
      const __m512i h = _mm512_set1_epi32(dword(levels + t * kLevelBytes + k));
      const __m512i l = _mm512_set1_epi32(dword(levels + t * kLevelBytes + kBlock + k));
      if (kPrecision == Precision::Bits16) {
        high[t][0] = Vi(_mm512_dpbusd_epi32(__m512i(high[t][0]), h, w0));
        high[t][1] = Vi(_mm512_dpbusd_epi32(__m512i(high[t][1]), h, w1));
      }
      low[t][0] = Vi(_mm512_dpbusd_epi32(__m512i(low[t][0]), l, w0));
      low[t][1] = Vi(_mm512_dpbusd_epi32(__m512i(low[t][1]), l, w1));
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      add_scaled<kScaled>((high[t][v] << 8) + low[t][v], scales[t], row_scales + 16 * v, c + t * kIntPanel + 16 * v);
    });
  });
}

// Several groups a block: one sum a group, high bytes before low ones, which leaves registers for the block's total.
template <size_t kRows, size_t kGroup, Precision kPrecision>
void group_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
                size_t columns, float* c) {
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<2>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  Vf total[kRows][2];
  each([&](auto t, auto v) AXC_INLINE { total[t][v] = Vf{}; });
  for (size_t g = 0; g * kGroup < columns; ++g) {
    Vi acc[kRows][2];
    each([&](auto t, auto v) AXC_INLINE { acc[t][v] = Vi(_mm512_load_si512(panel + kBytePanel + (g * 2 + v) * 64)); });
    const auto add = [&](const uint8_t* bytes) AXC_INLINE {
      for (size_t k = g * kGroup; k < (g + 1) * kGroup; k += 4) {
        const __m512i w0 = _mm512_load_si512(panel + k * 32), w1 = _mm512_load_si512(panel + k * 32 + 64);
        repeat<kRows>([&](auto t) AXC_INLINE {
          const __m512i x = _mm512_set1_epi32(dword(bytes + t * kLevelBytes + k));
          acc[t][0] = Vi(_mm512_dpbusd_epi32(__m512i(acc[t][0]), x, w0));
          acc[t][1] = Vi(_mm512_dpbusd_epi32(__m512i(acc[t][1]), x, w1));
        });
      }
    };
    if (kPrecision == Precision::Bits16) {
      add(levels);
      each([&](auto t, auto v) AXC_INLINE { acc[t][v] <<= 8; });
    }
    add(levels + kBlock);
    each([&](auto t, auto v) AXC_INLINE {
      total[t][v] = fma(__builtin_convertvector(acc[t][v], Vf), load(row_scales + g * kIntPanel + 16 * v), total[t][v]);
    });
  }
  each([&](auto t, auto v) AXC_INLINE {
    float* at = c + t * kIntPanel + 16 * v;
    store(at, fma(total[t][v], scales[t * (kBlock / kGroup)], load(at)));
  });
}

template <size_t kRows, size_t kGroup, Precision kPrecision>
constexpr auto bytes_tile = [] {
  if constexpr (kGroup == 0 || kGroup == kBlock) {
    return byte_tile<kRows, kGroup != 0, kPrecision>;
  } else {
    return group_tile<kRows, kGroup, kPrecision>;
  }
}();

// Unsigned weights times levels in each lane, 256 high + low, in one accumulator.
template <Precision kPrecision, class... Weights>
AXC_INLINE inline Vi lane_products(const __m512i* high, const __m512i* low, Weights... w) {
  __m512i sum = _mm512_setzero_si512();
  if (kPrecision == Precision::Bits16) {
    ((sum = _mm512_dpbusd_epi32(sum, w, *high++)), ...);
    sum = _mm512_slli_epi32(sum, 8);
  }
  ((sum = _mm512_dpbusd_epi32(sum, w, *low++)), ...);
  return Vi(sum);
}

// The first `columns` of a block of a row, as unsigned bytes.
template <bool kFour>
AXC_INLINE inline void unsigned_bytes(const uint8_t* at, size_t columns, __m512i& w0, __m512i& w1) {
  if (kFour) {
    constexpr int kFlipped = 0x28;  // as ternary logic: (weights ^ flip) & nibble
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x88)), nibble = _mm512_set1_epi8(15);
    const __m512i bytes = columns == kBlock ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(first_bytes(columns / 2), at);
    w0 = _mm512_ternarylogic_epi32(bytes, flip, nibble, kFlipped);
    w1 = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), flip, nibble, kFlipped);
  } else {
    const __m512i flip = _mm512_set1_epi8(-128);
    if (columns == kBlock) {
      w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
    } else {
      w0 = _mm512_maskz_loadu_epi8(first_bytes(columns), at);
      w1 = _mm512_maskz_loadu_epi8(first_bytes(columns > 64 ? columns - 64 : 0), at + 64);
    }
    w0 = _mm512_xor_si512(w0, flip), w1 = _mm512_xor_si512(w1, flip);
  }
}

template <bool kFour>
constexpr int32_t kOffset = kFour ? 8 : 128;

// Transposes the quarters of four vectors.
AXC_INLINE inline void transpose_quarters(Vi v[4]) {
  const auto taken = [](Vi a, Vi b, auto which) AXC_INLINE { return Vi(_mm512_shuffle_i32x4(__m512i(a), __m512i(b), which)); };
  constexpr std::integral_constant<int, 0x44> kLower;
  constexpr std::integral_constant<int, 0xEE> kUpper;
  constexpr std::integral_constant<int, 0x88> kEven;
  constexpr std::integral_constant<int, 0xDD> kOdd;
  const Vi a = taken(v[0], v[1], kLower), b = taken(v[0], v[1], kUpper), c = taken(v[2], v[3], kLower), d = taken(v[2], v[3], kUpper);
  v[0] = taken(a, c, kEven), v[1] = taken(a, c, kOdd), v[2] = taken(b, d, kEven), v[3] = taken(b, d, kOdd);
}

// A lane holds products of 4 columns, or of 8 adjacent ones with 4-bit weights: quarter j of a vector covers the columns
// [32 j, 32 j + 32) of a block, or [16 j, 16 j + 16) of each half of it.
template <bool kFour, size_t kGroup, Precision kPrecision>
AXC_INLINE inline void group_sums(const uint8_t* const rows[4], size_t first, size_t count, size_t columns,
                                  const uint8_t* levels, const uint8_t* ahead, Vi* sums) {
  constexpr size_t kBytes = kFour ? kBlock / 2 : kBlock, kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  constexpr size_t kHalves = !kFour && kGroups > 1 ? 2 : 1;
  Vi quads[kHalves][4] = {};  // for each block; lane 4 j + r: quarter j of row r
  for (size_t b = 0; b < count; ++b, levels += kLevelBytes, ahead += 4 * kBytes) {
    const size_t left = least(kBlock, columns - (first + b) * kBlock);
    __m512i x[4];
    repeat<4>([&](auto i) AXC_INLINE { x[i] = _mm512_loadu_si512(levels + 64 * i); });
    fetch(ahead, 4 * kBytes);
    Vi products[kHalves][4];
    repeat<4>([&](auto r) AXC_INLINE {
      __m512i w0, w1;
      unsigned_bytes<kFour>(rows[r] + (first + b) * kBytes, left, w0, w1);
      if constexpr (kHalves == 1) {
        products[0][r] = lane_products<kPrecision>(x, x + 2, w0, w1);
      } else {
        products[0][r] = lane_products<kPrecision>(x, x + 2, w0);
        products[1][r] = lane_products<kPrecision>(x + 1, x + 3, w1);
      }
    });
    repeat<kHalves>([&](auto h) AXC_INLINE {
      quads[h][b] = quad_sums(products[h][0], products[h][1], products[h][2], products[h][3]);
    });
  }
  repeat<kGroups>([&](auto g) AXC_INLINE { sums[g] = Vi{}; });
  repeat<kHalves>([&](auto h) AXC_INLINE {
    transpose_quarters(quads[h]);
    repeat<4>([&](auto j) AXC_INLINE { sums[kHalves == 2 ? (64 * h + 16 * j) / kSpan : 32 * j / kSpan] += quads[h][j]; });
  });
}

inline bool has_avx512() { return cpu_has({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}); }

}  // namespace
}  // namespace axc
