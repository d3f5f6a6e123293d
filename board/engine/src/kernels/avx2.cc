// AVX2 with FMA and conversion of halves: 256-bit vectors; integer products in 16 bits, pairs of columns at a time (vpmaddwd).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "cpu_x86.h"
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 8, kVectors = 2, kFloatRows = 5;
constexpr int32_t kOffset8 = 0, kOffset4 = 0;
constexpr size_t kIntRows = 5, kIntPanel = 16, kPrefetched = 16384;

}  // namespace
}  // namespace axc

#include "vectors.h"

namespace axc {
namespace {

// 16-bit levels; for 4-bit weights the even columns come first: they are the low halves of the bytes. Returns their sum.
int32_t store_levels(const int16_t* levels, const Activations&, Arithmetic order, uint8_t* out) {
  int16_t sorted[kBlock];
  int32_t sum = 0;
  for (size_t i = 0; i < kBlock; ++i) {
    sorted[i] = levels[order == Arithmetic::Int4 ? i % 64 * 2 + i / 64 : i];
    sum += levels[i];
  }
  std::memcpy(out, sorted, sizeof sorted);
  return sum;
}

inline __m256i words_at(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

// Unsigned nibbles of 16 bytes, in 16 bits each: what they are above -8.
struct Nibbles {
  __m256i even, odd;

  explicit Nibbles(const uint8_t* at) {
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), _mm_set1_epi8(static_cast<char>(0x88)));
    const __m256i wide = _mm256_cvtepu8_epi16(bytes);
    even = _mm256_and_si256(wide, _mm256_set1_epi16(15));
    odd = _mm256_srli_epi16(wide, 4);
  }
};

// Panel: for every 2 columns 16 outputs x 2 levels of 16 bits. `columns(row)` gives 16 columns of one of 8 rows.
template <class Columns>
inline void pack_columns(uint8_t* panel, size_t k, size_t group, Columns columns) {
  Vf rows[kWidth];
  repeat<kWidth>([&](auto r) AXC_INLINE { rows[r] = Vf(columns(r)); });
  transpose(rows);
  repeat<kWidth>([&](auto i) AXC_INLINE { std::memcpy(panel + ((k / 2 + i) * kIntPanel + group) * 4, &rows[i], sizeof(Vf)); });
}

template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  for (size_t group = 0; group < kIntPanel; group += kWidth) {
    for (size_t k = 0; k < kBlock; k += 16) {
      const size_t count = columns > k ? least(16, columns - k) : 0;
      pack_columns(panel, k, group, [&](size_t r) AXC_INLINE {
        int8_t bytes[16] = {};
        if (group + r < rows && count == 16) std::memcpy(bytes, w + (group + r) * stride + k, 16);
        if (group + r < rows && count < 16) std::memcpy(bytes, w + (group + r) * stride + k, count);
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      });
    }
  }
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  const __m256i eight = _mm256_set1_epi16(8), zero = _mm256_setzero_si256();
  for (size_t group = 0; group < kIntPanel; group += kWidth) {
    for (size_t k = 0; k < kBlock / 2; k += 16) {
      const auto at = [&](size_t r) { return w + (group + r) * stride + k; };
      pack_columns(panel, k, group, [&](size_t r) AXC_INLINE {
        return group + r < rows ? _mm256_sub_epi16(Nibbles(at(r)).even, eight) : zero;
      });
      pack_columns(panel, kBlock / 2 + k, group, [&](size_t r) AXC_INLINE {
        return group + r < rows ? _mm256_sub_epi16(Nibbles(at(r)).odd, eight) : zero;
      });
    }
  }
}

template <size_t kRows, bool kScaled, Precision>
void int_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t*, int32_t, const float* row_scales,
              float* c) {
  Vi acc[kRows][2];
  repeat<kRows>([&](auto t) AXC_INLINE { acc[t][0] = acc[t][1] = Vi{}; });
  for (size_t k = 0; k < kBlock; k += 2) {
    const __m256i w0 = words_at(panel + k * 32), w1 = words_at(panel + k * 32 + 32);
    repeat<kRows>([&](auto t) AXC_INLINE {
      int32_t pair;
      std::memcpy(&pair, levels + t * kLevelBytes + 2 * k, sizeof pair);
      const __m256i both = _mm256_set1_epi32(pair);
      acc[t][0] += Vi(_mm256_madd_epi16(w0, both));
      acc[t][1] += Vi(_mm256_madd_epi16(w1, both));
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      float* at = c + t * kIntPanel + v * kWidth;
      Vf factor = all(scales[t]);
      if (kScaled) factor *= load(row_scales + v * kWidth);
      store(at, load(at) + __builtin_convertvector(acc[t][v], Vf) * factor);
    });
  });
}

[[gnu::noinline]] float dot_int8(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const int8_t* weights = reinterpret_cast<const int8_t*>(w.data) + row * w.columns;
  Vf total{};
  for (size_t b = 0; b < a.blocks(); ++b) {
    const size_t entry = a.entry(b, token), count = least(kBlock, w.columns - b * kBlock);
    const int8_t* at = weights + b * kBlock;
    const uint8_t* levels = a.levels + entry * kLevelBytes;
    Vi acc{};
    const auto add = [&](const int8_t* bytes, size_t k) AXC_INLINE {
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      acc += Vi(_mm256_madd_epi16(wide, words_at(levels + 2 * k)));
    };
    size_t k = 0;
    for (; k + 16 <= count; k += 16) add(at + k, k);
    if (k < count) {
      int8_t rest[16] = {};
      std::memcpy(rest, at + k, count - k);
      add(rest, k);
    }
    total += __builtin_convertvector(acc, Vf) * a.scales[entry];
  }
  return sum(total);
}

[[gnu::noinline]] float dot_int4(const Matrix& w, size_t row, const Activations& a, size_t token) {
  const size_t blocks = a.blocks();
  const uint8_t* weights = w.data + row * blocks * (kBlock / 2);
  Vf total{};
  float offset = 0;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t entry = a.entry(b, token);
    const uint8_t *at = weights + b * (kBlock / 2), *levels = a.levels + entry * kLevelBytes;
    Vi acc{};
    for (size_t k = 0; k < kBlock / 2; k += 16) {
      const Nibbles nibbles(at + k);
      acc += Vi(_mm256_madd_epi16(nibbles.even, words_at(levels + 2 * k)));
      acc += Vi(_mm256_madd_epi16(nibbles.odd, words_at(levels + kBlock + 2 * k)));
    }
    const float factor = a.scales[entry] * w.scales[row * blocks + b];
    total += __builtin_convertvector(acc, Vf) * factor;
    offset += factor * static_cast<float>(8 * a.sums[entry]);
  }
  return sum(total) - offset;
}

constexpr size_t kDotRows = 1;

inline void dots(const Matrix& w, size_t row, size_t, const Activations& a, size_t token, float* out) {
  *out = w.arithmetic == Arithmetic::Int4 ? dot_int4(w, row, a, token) : dot_int8(w, row, a, token);
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
