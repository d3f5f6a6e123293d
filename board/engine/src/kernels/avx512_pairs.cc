// AVX-512 with VNNI and products of bfloat16 on CPUs that add beside their multipliers, as AMD's do: for many tokens of
// 16 bits half the products do. Of two columns (x0 + w1) (x1 + w0) = x0 w0 + x1 w1 + x0 x1 + w0 w1, where the sums of
// x0 x1 and of w0 w1 are the activations' and the weights' own: S. Winograd, A New Algorithm for Inner Product, IEEE
// Transactions on Computers C-17, 1968. 32 bits that overflow on the way do no harm: the sum of a block does not.
#include "avx512_bfloat16.h"
#include "avx512_bytes.h"

namespace axc {
namespace {

constexpr size_t kIntRows = 8;
constexpr size_t kPairPanel = 2 * kIntPanel * kBlock;  // bytes; behind them 32 times minus the sum of w0 w1

// 16-bit words as the panel's products read them. 4-bit weights lie 8 columns to the word of 32 bits.
alignas(64) constexpr auto kPairOrder = [] {
  struct { uint16_t of[2][32]; } order{};
  constexpr uint16_t kInt8[4] = {0, 2, 1, 3}, kInt4[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (uint16_t i = 0; i < 32; ++i) {
    order.of[0][i] = static_cast<uint16_t>(i / 4 * 4 + kInt8[i % 4]);
    order.of[1][i] = static_cast<uint16_t>(i / 8 * 8 + kInt4[i % 8]);
  }
  return order;
}();

// Returns the sum of x0 x1.
int32_t store_pairs(const int16_t* levels, Arithmetic order, uint8_t* out) {
  const __m512i from = _mm512_load_si512(kPairOrder.of[order == Arithmetic::Int4]);
  __m512i sum = _mm512_setzero_si512();
  for (size_t i = 0; i < 4; ++i) {
    const __m512i words = _mm512_permutexvar_epi16(from, _mm512_loadu_si512(levels + 32 * i));
    const __m512i other = _mm512_shuffle_epi32(words, _MM_PERM_CDAB);
    constexpr __mmask16 kFirst = 0x5555;  // else each product counts twice
    sum = _mm512_mask_dpwssd_epi32(sum, kFirst, words, other);
    _mm512_storeu_si512(out + 64 * i, words);
  }
  return _mm512_reduce_add_epi32(sum);
}

int32_t store_levels(const int16_t* levels, const Activations& of, Arithmetic order, uint8_t* out) {
  const bool pairs = of.rows > kTokensByDot && of.precision == Precision::Bits16;
  return (pairs ? store_pairs : store_bytes)(levels, order, out);
}

// Panel: for every 4 columns and 16 outputs two words w1, then two w0.
struct PairPanel {
  uint8_t* at;
  __m512i products[kIntPanel / 16] = {};

  AXC_INLINE void put(size_t step, size_t group, __m512i w0, __m512i w1) {
    _mm512_store_si512(at + (step * 4 + group * 2) * 64, w1);
    _mm512_store_si512(at + (step * 4 + group * 2 + 1) * 64, w0);
    products[group] = _mm512_dpwssd_epi32(products[group], w0, w1);
  }
  void end() const {
    for (size_t group = 0; group < kIntPanel / 16; ++group) {
      _mm512_store_si512(at + kPairPanel + group * 64, _mm512_sub_epi32(_mm512_setzero_si512(), products[group]));
    }
  }
};

// The lowest bits of each word as a signed number. Of two shifts, which would do, a CPU begins fewer in a cycle.
template <size_t kBits>
AXC_INLINE inline __m512i signed_low(__m512i words) {
  constexpr int kFlipped = 0x28;  // as ternary logic: (words ^ sign) & mask
  const __m512i sign = _mm512_set1_epi16(1 << (kBits - 1)), mask = _mm512_set1_epi16((1 << kBits) - 1);
  return _mm512_sub_epi16(_mm512_ternarylogic_epi32(words, sign, mask, kFlipped), sign);
}

template <Precision kPrecision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  if (kPrecision == Precision::Bits8) return pack_bytes_int8(w, stride, rows, columns, panel);
  PairPanel to{panel};
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w);
  each_turned<kBlock>(bytes, stride, rows, columns, [&](size_t group, size_t half, const __m512i* r) AXC_INLINE {
    for (size_t i = 0; i < 16; ++i) to.put(half * 16 + i, group, signed_low<8>(r[i]), _mm512_srai_epi16(r[i], 8));
  });
  to.end();
}

template <Precision kPrecision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  if (kPrecision == Precision::Bits8) return pack_bytes_int4(w, stride, rows, panel);
  PairPanel to{panel};
  each_turned<kBlock / 2>(w, stride, rows, kBlock / 2, [&](size_t group, size_t, const __m512i* r) AXC_INLINE {
    for (size_t i = 0; i < 16; ++i) {
      to.put(2 * i, group, signed_low<4>(r[i]), signed_low<4>(_mm512_srli_epi16(r[i], 4)));
      to.put(2 * i + 1, group, signed_low<4>(_mm512_srli_epi16(r[i], 8)), _mm512_srai_epi16(r[i], 12));
    }
  });
  to.end();
}

template <size_t kRows, bool kScaled>
void pair_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t* sums, int32_t,
               const float* row_scales, float* c) {
  Vu acc[kRows][2];
  repeat<2>([&](auto v) AXC_INLINE {
    const Vu products = Vu(_mm512_load_si512(panel + kPairPanel + 64 * v));
    repeat<kRows>([&](auto t) AXC_INLINE { acc[t][v] = products - static_cast<uint32_t>(sums[t]); });
  });
  for (size_t step = 0; step < kBlock / 4; ++step) {
    Vu w[4];
    repeat<4>([&](auto i) AXC_INLINE { w[i] = Vu(_mm512_load_si512(panel + (step * 4 + i) * 64)); });
    repeat<kRows>([&](auto t) AXC_INLINE {
      const __m512i x0 = _mm512_set1_epi32(dword(levels + t * kLevelBytes + 8 * step));
      const __m512i x1 = _mm512_set1_epi32(dword(levels + t * kLevelBytes + 8 * step + 4));
      repeat<2>([&](auto v) AXC_INLINE {
        const __m512i first = _mm512_add_epi16(x0, __m512i(w[2 * v])), second = _mm512_add_epi16(x1, __m512i(w[2 * v + 1]));
        acc[t][v] = Vu(_mm512_dpwssd_epi32(__m512i(acc[t][v]), first, second));
      });
    });
  }
  repeat<kRows>([&](auto t) AXC_INLINE {
    repeat<2>([&](auto v) AXC_INLINE {
      add_scaled<kScaled>(Vi(acc[t][v]), scales[t], row_scales + 16 * v, c + t * kIntPanel + 16 * v);
    });
  });
}

template <size_t kRows, bool kScaled, Precision kPrecision>
constexpr auto int_tile = kPrecision == Precision::Bits8 ? byte_tile<kRows, kScaled, Precision::Bits8> : pair_tile<kRows, kScaled>;

bool runs_here() { return has_avx512() && cpu_has({"avx512bf16"}) && is_amd(); }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kAvx512Pairs = table("avx512_pairs", runs_here);
}
