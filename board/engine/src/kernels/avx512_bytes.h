// AVX-512 with VNNI: levels as bytes. A 16-bit level is two signed bytes, so a product takes two 8-bit dot products with
// unsigned weights: sum (w + 128) (256 high + low) - 128 sum (256 high + low).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu_x86.h"
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 16, kVectors = 2, kFloatRows = 12;
constexpr int32_t kOffset8 = 128, kOffset4 = 8;
constexpr size_t kIntPanel = 32, kPrefetched = 16384;

}  // namespace
}  // namespace axc

#include "prefetch.h"

namespace axc {
namespace {

// 64 high bytes, 64 high bytes, 64 low bytes, 64 low bytes. For 4-bit weights the even columns come first: they are the
// low halves of the bytes. Returns the levels' sum.
inline int32_t store_bytes(const int16_t* levels, Arithmetic order, uint8_t* out) {
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i words[4], sum = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    words[i] = _mm512_loadu_si512(levels + 32 * i);
    sum = _mm512_dpwssd_epi32(sum, words[i], ones);
  }
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
  return _mm512_reduce_add_epi32(sum);
}

inline __mmask64 first_bytes(size_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// 64 bytes of each of 16 rows, turned: r[i] has bytes 4 i to 4 i + 3 of every row. Rows 4 apart are put together as they
// are loaded, which spares half the shuffles.
AXC_INLINE inline void turned(const uint8_t* w, size_t stride, __m512i r[16]) {
  repeat<4>([&](auto chunk) AXC_INLINE {
    __m512i x[4];
    repeat<4>([&](auto i) AXC_INLINE {
      const auto quarter = [&](size_t row) AXC_INLINE {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + row * stride + 16 * chunk));
      };
      x[i] = _mm512_broadcast_i32x4(quarter(i));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00F0, quarter(i + 4));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0F00, quarter(i + 8));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xF000, quarter(i + 12));
    });
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    r[4 * chunk] = _mm512_unpacklo_epi64(a, c), r[4 * chunk + 1] = _mm512_unpackhi_epi64(a, c);
    r[4 * chunk + 2] = _mm512_unpacklo_epi64(b, d), r[4 * chunk + 3] = _mm512_unpackhi_epi64(b, d);
  });
}

// Calls store(group, half, r) for every 16 rows and 64 bytes of a block, turned. Missing rows and bytes are zeros.
template <size_t kBytes, class Store>
inline void each_turned(const uint8_t* w, size_t stride, size_t rows, size_t bytes, Store store) {
  for (size_t half = 0; half < kBytes / 64; ++half) {
    const size_t count = bytes > 64 * half ? least(64, bytes - 64 * half) : 0;
    for (size_t group = 0; group < kIntPanel / 16; ++group) {
      const size_t there = rows > group * 16 ? least(16, rows - group * 16) : 0;
      const uint8_t* from = w + group * 16 * stride + 64 * half;
      __m512i r[16];
      if (there == 16 && count == 64) {
        turned(from, stride, r);
      } else {
        uint8_t padded[16 * 64] = {};
        for (size_t row = 0; row < there; ++row) std::memcpy(padded + 64 * row, from + row * stride, count);
        turned(padded, 64, r);
      }
      store(group, half, r);
    }
  }
}

// Panel: for every 4 columns 32 outputs x 4 bytes.
inline void pack_bytes_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w);
  each_turned<kBlock>(bytes, stride, rows, columns, [&](size_t group, size_t half, const __m512i* r) AXC_INLINE {
    for (size_t i = 0; i < 16; ++i) {
      _mm512_store_si512(panel + (half * 16 + i) * 128 + group * 64, _mm512_xor_si512(r[i], flip));
    }
  });
}

inline void pack_bytes_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x88)), low = _mm512_set1_epi8(15);
  each_turned<kBlock / 2>(w, stride, rows, kBlock / 2, [&](size_t group, size_t, const __m512i* r) AXC_INLINE {
    for (size_t i = 0; i < 16; ++i) {
      const __m512i both = _mm512_xor_si512(r[i], flip);
      _mm512_store_si512(panel + i * 128 + group * 64, _mm512_and_si512(both, low));
      _mm512_store_si512(panel + (16 + i) * 128 + group * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
  });
}

inline int32_t dword(const uint8_t* at) {
  int32_t value;
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

// c += sums, times the scales.
template <bool kScaled>
AXC_INLINE inline void add_scaled(Vi sums, float scale, const float* row_scales, float* c) {
  Vf factor = all(scale);
  if (kScaled) factor *= load(row_scales);
  store(c, load(c) + __builtin_convertvector(sums, Vf) * factor);
}

template <size_t kRows, bool kScaled, Precision kPrecision>
void byte_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t* sums, int32_t offset,
              const float* row_scales, float* c) {
  Vi high[kRows][2], low[kRows][2];  // as __m512i GCC 12 would keep them in memory too
  repeat<kRows>([&](auto t) AXC_INLINE {
    high[t][0] = high[t][1] = Vi{};
    low[t][0] = low[t][1] = Vi{} - offset * sums[t];
  });
  for (size_t k = 0; k < kBlock; k += 4) {
    const __m512i w0 = _mm512_load_si512(panel + k * 32), w1 = _mm512_load_si512(panel + k * 32 + 64);
    repeat<kRows>([&](auto t) AXC_INLINE {
      const __m512i h = _mm512_set1_epi32(dword(levels + t * kLevelBytes + k));
      const __m512i l = _mm512_set1_epi32(dword(levels + t * kLevelBytes + kBlock + k));
      if (kPrecision == Precision::Bits16) {
        high[t][0] = Vi(_mm512_dpbusd_epi32(__m512i(high[t][0]), w0, h));
        high[t][1] = Vi(_mm512_dpbusd_epi32(__m512i(high[t][1]), w1, h));
      }
      low[t][0] = Vi(_mm512_dpbusd_epi32(__m512i(low[t][0]), w0, l));
      low[t][1] = Vi(_mm512_dpbusd_epi32(__m512i(low[t][1]), w1, l));
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      add_scaled<kScaled>((high[t][v] << 8) + low[t][v], scales[t], row_scales + 16 * v, c + t * kIntPanel + 16 * v);
    });
  });
}

constexpr size_t kGroup = 16;      // blocks whose scales fill a vector
constexpr size_t kDotRows = 4;

// The sum over a block of unsigned weights times levels, in float32 lanes: 256 high + low, by one chain of sums.
template <Precision kPrecision>
AXC_INLINE inline Vf block_product(__m512i w0, __m512i w1, const __m512i levels[4]) {
  __m512i sum = _mm512_setzero_si512();
  if (kPrecision == Precision::Bits16) {
    sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w0, levels[0]), w1, levels[1]);
    sum = _mm512_slli_epi32(sum, 8);
  }
  return __builtin_convertvector(Vi(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w0, levels[2]), w1, levels[3])), Vf);
}

// A block of a row as unsigned bytes, `columns` of it.
template <bool kFour>
AXC_INLINE inline void unsigned_bytes(const uint8_t* at, size_t columns, __m512i& w0, __m512i& w1) {
  if (kFour) {
    constexpr int kFlipped = 0x28;  // as ternary logic: (weights ^ flip) & nibble
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x88)), nibble = _mm512_set1_epi8(15);
    const __m512i bytes = _mm512_loadu_si512(at);
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

// kRows rows of a weight with one token. Out of the loop that calls it: inlined it runs short of registers.
template <bool kFour, Precision kPrecision, size_t kRows>
[[gnu::noinline]] void dot_rows(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  constexpr size_t kBytes = kFour ? kBlock / 2 : kBlock;
  const size_t blocks = a.blocks(), stride = kFour ? blocks * kBytes : w.columns;
  const uint8_t *weights = w.data + row * stride, *ahead = weights + kPrefetched;
  Vf total[kRows], offset[kRows];
  repeat<kRows>([&](auto r) AXC_INLINE { total[r] = offset[r] = Vf{}; });
  for (size_t first = 0; first < blocks; first += kGroup) {
    const size_t entry = a.entry(first, token), count = least(kGroup, blocks - first);
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    const Vf scales = Vf(_mm512_maskz_loadu_ps(there, a.scales + entry));
    const Vf sums = __builtin_convertvector(Vi(_mm512_maskz_loadu_epi32(there, a.sums + entry)), Vf) * scales;
    alignas(64) float factors[kRows][kGroup];
    repeat<kRows>([&](auto r) AXC_INLINE {
      const Vf own = kFour ? Vf(_mm512_maskz_loadu_ps(there, w.scales + (row + r) * blocks + first)) : all(1.0f);
      if (kFour || r == 0) store(factors[r], scales * own), offset[r] += sums * own;
    });
    for (size_t b = 0; b < count; ++b) {
      const uint8_t *at = weights + (first + b) * kBytes, *of = a.levels + (entry + b) * kLevelBytes;
      const size_t columns = least(kBlock, w.columns - (first + b) * kBlock);
      __m512i levels[4];
      for (size_t i = 0; i < 4; ++i) levels[i] = _mm512_loadu_si512(of + 64 * i);
      fetch(ahead, kRows * kBytes);
      ahead += kRows * kBytes;
      repeat<kRows>([&](auto r) AXC_INLINE {
        __m512i w0, w1;
        unsigned_bytes<kFour>(at + r * stride, columns, w0, w1);
        total[r] += block_product<kPrecision>(w0, w1, levels) * factors[kFour ? r : 0][b];
      });
    }
  }
  repeat<kRows>([&](auto r) AXC_INLINE {
    out[r] = sum(total[r] - offset[kFour ? r : 0] * float{kFour ? kOffset4 : kOffset8});
  });
}

template <bool kFour, Precision kPrecision>
void dots_of(const Matrix& w, size_t row, size_t rows, const Activations& a, size_t token, float* out) {
  constexpr size_t kTogether = kFour ? 4 : 2;  // what measured fastest
  size_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) dot_rows<kFour, kPrecision, kTogether>(w, row + r, a, token, out + r);
  for (; r < rows; ++r) dot_rows<kFour, kPrecision, 1>(w, row + r, a, token, out + r);
}

void dots(const Matrix& w, size_t row, size_t rows, const Activations& a, size_t token, float* out) {
  const bool four = w.arithmetic == Arithmetic::Int4;
  if (a.precision == Precision::Bits8) {
    (four ? dots_of<true, Precision::Bits8> : dots_of<false, Precision::Bits8>)(w, row, rows, a, token, out);
  } else {
    (four ? dots_of<true, Precision::Bits16> : dots_of<false, Precision::Bits16>)(w, row, rows, a, token, out);
  }
}

inline bool has_avx512() { return cpu_has({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}); }

}  // namespace
}  // namespace axc
