// AVX2 with FMA and conversion of halves: 256-bit vectors; integer products in 16 bits, pairs of columns at a time (vpmaddwd),
// and of 4-bit weights that are read once in bytes (vpmaddubsw).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu_x86.h"
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 8, kVectors = 2, kFloatRows = 5;
constexpr size_t kIntRows = 5, kIntPanel = 16, kPrefetched = 16384;

}  // namespace
}  // namespace axc

#include "prefetch.h"
#include "quads.h"
#include "scales.h"

namespace axc {
namespace {

// Levels as signed bytes, for 4-bit weights that are read in place. Every 64 columns: the high bytes of the even columns, of
// the odd ones, then the low bytes of both. The even columns are the weights' low nibbles of 32 bytes.
void store_bytes(const int16_t* levels, uint8_t* out) {
  for (size_t i = 0; i < kBlock; ++i) {
    const int high = (levels[i] + 128) >> 8;
    uint8_t* to = out + i / 64 * 128 + i % 2 * 32 + i % 64 / 2;
    to[0] = static_cast<uint8_t>(high);
    to[64] = static_cast<uint8_t>(levels[i] - high * 256);
  }
}

// 16-bit levels. For packed 4-bit weights the even columns of every 32 come first: the weights' low nibbles of 16 bytes.
void store_levels(const int16_t* levels, const Activations& of, Arithmetic order, uint8_t* out, int32_t* sums) {
  const bool four = order == Arithmetic::Int4;
  store_sums(levels, of.group, sums);
  if (four && of.rows <= kTokensByDot) return store_bytes(levels, out);
  int16_t sorted[kBlock];
  for (size_t i = 0; i < kBlock; ++i) sorted[i] = levels[four ? i / 32 * 32 + i % 16 * 2 + i / 16 % 2 : i];
  std::memcpy(out, sorted, sizeof sorted);
}

inline __m256i words_at(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// The nibbles of 16 bytes as unsigned 16-bit numbers, level + 8.
struct Nibbles {
  __m256i even, odd;

  explicit Nibbles(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x88))));
    even = _mm256_and_si256(wide, _mm256_set1_epi16(15));
    odd = _mm256_srli_epi16(wide, 4);
  }
};

// Panel: for every 2 columns 16 outputs x 2 levels of 16 bits. `columns(row)` returns 16 columns of one of 8 rows.
template <class Columns>
inline void pack_columns(uint8_t* panel, size_t k, size_t group, Columns columns) {
  Vf rows[kWidth];
  repeat<kWidth>([&](auto r) AXC_INLINE { rows[r] = Vf(columns(r)); });
  transpose(rows);
  repeat<kWidth>([&](auto i) AXC_INLINE { std::memcpy(panel + ((k / 2 + i) * kIntPanel + group) * 4, &rows[i], sizeof(Vf)); });
}

// The first `count` of 16 bytes, padded with zeros.
inline __m128i some_bytes(const void* from, size_t count) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, from, count);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

inline __m128i bytes_at(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  for (size_t group = 0; group < kIntPanel; group += kWidth) {
    for (size_t k = 0; k < columns; k += 16) {
      const size_t count = least(16, columns - k);
      pack_columns(panel, k, group, [&](size_t r) AXC_INLINE {
        const int8_t* at = w + (group + r) * stride + k;
        if (group + r >= rows) return _mm256_setzero_si256();
        return _mm256_cvtepi8_epi16(count < 16 ? some_bytes(at, count) : bytes_at(at));
      });
    }
  }
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t, uint8_t* panel) {
  const __m256i eight = _mm256_set1_epi16(8), zero = _mm256_setzero_si256();
  for (size_t group = 0; group < kIntPanel; group += kWidth) {
    for (size_t k = 0; k < columns; k += 32) {
      const size_t count = least(16, (columns - k) / 2);
      const auto nibbles = [&](size_t r) AXC_INLINE {
        const uint8_t* at = w + (group + r) * stride + k / 2;
        return Nibbles(count < 16 ? some_bytes(at, count) : bytes_at(at));
      };
      pack_columns(panel, k, group, [&](size_t r) AXC_INLINE {
        return group + r < rows ? _mm256_sub_epi16(nibbles(r).even, eight) : zero;
      });
      pack_columns(panel, k + 16, group, [&](size_t r) AXC_INLINE {
        return group + r < rows ? _mm256_sub_epi16(nibbles(r).odd, eight) : zero;
      });
    }
  }
}

template <size_t kRows, size_t kGroup, Precision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, const float* row_scales,
              size_t columns, float* c) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<2>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  columns = (columns + 31) / 32 * 32;  // packed
  Vf total[kRows][2];
  each([&](auto t, auto v) AXC_INLINE { total[t][v] = Vf{}; });
  for (size_t g = 0; g * kSpan < columns; ++g) {
    Vi acc[kRows][2];
    each([&](auto t, auto v) AXC_INLINE { acc[t][v] = Vi{}; });
    for (size_t k = g * kSpan, end = least(k + kSpan, columns); k < end; k += 2) {
      const __m256i w0 = words_at(panel + k * 32), w1 = words_at(panel + k * 32 + 32);
      repeat<kRows>([&](auto t) AXC_INLINE {
        int32_t pair;
        std::memcpy(&pair, levels + t * kLevelBytes + 2 * k, sizeof pair);
        const __m256i both = _mm256_set1_epi32(pair);
        acc[t][0] += Vi(_mm256_madd_epi16(w0, both));
        acc[t][1] += Vi(_mm256_madd_epi16(w1, both));
      });
    }
    each([&](auto t, auto v) AXC_INLINE {
      const Vf sum = __builtin_convertvector(acc[t][v], Vf);
      total[t][v] = kGroup ? fma(sum, load(row_scales + g * kIntPanel + v * kWidth), total[t][v]) : sum;
    });
  }
  each([&](auto t, auto v) AXC_INLINE {
    float* at = c + t * kIntPanel + v * kWidth;
    store(at, fma(total[t][v], scales[t * kGroups], load(at)));
  });
}

// Products of a group of columns with their activations, as bytes and 16-bit levels.
AXC_INLINE inline Vi products(const uint8_t* weights, const uint8_t* levels, size_t columns) {
  Vi acc{};
  const auto add = [&](__m128i bytes, size_t k) AXC_INLINE {
    acc += Vi(_mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), words_at(levels + 2 * k)));
  };
  size_t k = 0;
  for (; k + 16 <= columns; k += 16) add(bytes_at(weights + k), k);
  if (k < columns) add(some_bytes(weights + k, columns - k), k);
  return acc;
}

// Sums of products of nibbles with bytes. They fit 16 bits: in a block a lane adds at most 8 products of 15 * 128.
struct ByteSums {
  __m256i high = _mm256_setzero_si256(), low = _mm256_setzero_si256();

  // Adds 64 columns of a row, of which `left` exist.
  AXC_INLINE void add(const uint8_t* weights, size_t left, const __m256i x[4]) {
    const __m256i nibble = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(static_cast<char>(0x88));
    __m256i bytes;
    if (left >= 64) {
      bytes = words_at(weights);
    } else {
      uint8_t some[32] = {};
      std::memcpy(some, weights, left / 2);
      bytes = words_at(some);
    }
    bytes = _mm256_xor_si256(bytes, flip);  // levels + 8
    const __m256i even = _mm256_and_si256(bytes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    const auto sum = [](__m256i to, __m256i a, __m256i b) AXC_INLINE { return _mm256_add_epi16(to, _mm256_add_epi16(a, b)); };
    high = sum(high, _mm256_maddubs_epi16(even, x[0]), _mm256_maddubs_epi16(odd, x[1]));
    low = sum(low, _mm256_maddubs_epi16(even, x[2]), _mm256_maddubs_epi16(odd, x[3]));
  }
  AXC_INLINE Vi words() const {
    return Vi(_mm256_madd_epi16(high, _mm256_set1_epi16(256))) + Vi(_mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  }
};

template <bool kFour>
constexpr int32_t kOffset = kFour ? 8 : 0;

AXC_INLINE inline Vi lower_halves(Vi a, Vi b) { return Vi(_mm256_permute2x128_si256(__m256i(a), __m256i(b), 0x20)); }
AXC_INLINE inline Vi upper_halves(Vi a, Vi b) { return Vi(_mm256_permute2x128_si256(__m256i(a), __m256i(b), 0x31)); }

// Exact sums of 4-bit products. Of 32 bytes the first 16 are 32 columns, so the lower halves of the sums are one group of 32.
template <size_t kGroup>
AXC_INLINE inline void nibble_sums(const uint8_t* const rows[4], size_t first, size_t count, size_t columns, const uint8_t* levels,
                                   Vi* sums) {
  constexpr size_t kParts = kGroup == kBlock ? 1 : 2;  // of a block
  Vi quads[kParts][2] = {};                            // row r is in lanes r and 4 + r
  for (size_t b = 0; b < count; ++b) {
    const size_t left = columns - (first + b) * kBlock;
    ByteSums of[4];
    repeat<2>([&](auto half) AXC_INLINE {
      const size_t there = left > half * 64 ? left - half * 64 : 0;
      __m256i x[4];
      repeat<4>([&](auto i) AXC_INLINE { x[i] = words_at(levels + b * kLevelBytes + half * 128 + i * 32); });
      repeat<4>([&](auto r) AXC_INLINE {
        if (kParts == 2) of[r] = {};
        of[r].add(rows[r] + (first + b) * kBlock / 2 + half * 32, there, x);
      });
      if (kParts == 2 || half == 1) {
        quads[kParts == 2 ? half : 0][b] = quad_sums(of[0].words(), of[1].words(), of[2].words(), of[3].words());
      }
    });
  }
  repeat<kParts>([&](auto p) AXC_INLINE {
    const Vi lower = lower_halves(quads[p][0], quads[p][1]), upper = upper_halves(quads[p][0], quads[p][1]);
    if constexpr (kGroup == 32) {
      sums[2 * p] = lower, sums[2 * p + 1] = upper;
    } else {
      sums[p] = lower + upper;
    }
  });
}

template <bool kFour, size_t kGroup, Precision>
AXC_INLINE inline void group_sums(const uint8_t* const rows[4], size_t first, size_t count, size_t columns,
                                  const uint8_t* levels, const uint8_t*, Vi* sums) {
  if constexpr (kFour) return nibble_sums<kGroup>(rows, first, count, columns, levels, sums);
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  Vi quads[kGroups][2] = {};  // row r is the sum of lanes r and 4 + r
  for (size_t b = 0; b < count; ++b) {
    for (size_t g = 0; g < kGroups; ++g) {
      const size_t group = (first + b) * kGroups + g, left = columns > group * kSpan ? columns - group * kSpan : 0;
      const uint8_t* of = levels + b * kLevelBytes + 2 * g * kSpan;
      Vi rows_of[4];
      repeat<4>([&](auto r) AXC_INLINE {
        const uint8_t* at = rows[r] + group * kSpan;
        rows_of[r] = left < kSpan ? products(at, of, left) : products(at, of, kSpan);
      });
      quads[g][b] = quad_sums(rows_of[0], rows_of[1], rows_of[2], rows_of[3]);
    }
  }
  repeat<kGroups>([&](auto g) AXC_INLINE {
    sums[g] = lower_halves(quads[g][0], quads[g][1]) + upper_halves(quads[g][0], quads[g][1]);
  });
}

}  // namespace
}  // namespace axc

#include "integer_rows.h"

namespace axc {
namespace {

void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  dots_in<Precision::Bits16>(w, row, a, token, out);  // AVX2 stores levels in 16 bits at either precision
}

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() { return cpu_has({"avx2", "fma", "f16c"}); }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kAvx2 = table("avx2", runs_here);
}
