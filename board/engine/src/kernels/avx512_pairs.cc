// AVX-512 with VNNI and bfloat16 on CPUs with separate adders, such as AMD's: halves the products for many tokens of
// 16 bits. For two columns, (x0 + w1) (x1 + w0) = x0 w0 + x1 w1 + x0 x1 + w0 w1, where the sums of x0 x1 and of w0 w1 depend
// on activations or weights alone: S. Winograd, A New Algorithm for Inner Product, IEEE Transactions on Computers C-17,
// 1968. Intermediate sums may wrap around in 32 bits, since the sum of a block does not overflow.
#include "avx512_bfloat16.h"
#include "avx512_bytes.h"

#include "integer_rows.h"

namespace axc {
namespace {

inline void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  (a.precision == Precision::Bits8 ? dots_in<Precision::Bits8> : dots_in<Precision::Bits16>)(w, row, a, token, out);
}

constexpr size_t kIntRows = 8;
constexpr size_t kPairPanel = 2 * kIntPanel * kBlock;  // bytes, followed by 32 negative sums of w0 w1

// 16-bit words in the order of the panel's products. 4-bit weights: 8 columns per 32-bit word.
alignas(64) constexpr auto kPairOrder = [] {
  struct { uint16_t of[2][32]; } order{};
  constexpr uint16_t kInt8[4] = {0, 2, 1, 3}, kInt4[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (uint16_t i = 0; i < 32; ++i) {
    order.of[0][i] = static_cast<uint16_t>(i / 4 * 4 + kInt8[i % 4]);
    order.of[1][i] = static_cast<uint16_t>(i / 8 * 8 + kInt4[i % 8]);
  }
  return order;
}();

// The sums of x0 x1.
void store_pairs(const int16_t* levels, size_t group, Arithmetic order, uint8_t* out, int32_t* sums) {
  const __m512i from = _mm512_load_si512(kPairOrder.of[order == Arithmetic::Int4]);
  __m512i of_32[4];
  for (size_t i = 0; i < 4; ++i) {
    const __m512i words = _mm512_permutexvar_epi16(from, _mm512_loadu_si512(levels + 32 * i));
    const __m512i other = _mm512_shuffle_epi32(words, _MM_PERM_CDAB);
    constexpr __mmask16 kFirst = 0x5555;  // every other lane, or each product would count twice
    of_32[i] = _mm512_mask_dpwssd_epi32(_mm512_setzero_si512(), kFirst, words, other);
    _mm512_storeu_si512(out + 64 * i, words);
  }
  store_sums(of_32, group, sums);
}

void store_levels(const int16_t* levels, const Activations& of, Arithmetic order, uint8_t* out, int32_t* sums) {
  if (of.rows <= kTokensByDot) return store_bytes(levels, of.group, order, out, sums);
  if (of.precision == Precision::Bits8) return store_unsigned(levels, of.precision, order, out);
  store_pairs(levels, of.group, order, out, sums);
}

// Panel: for every 4 columns and 16 outputs two words w1, then two w0. Each group of columns ends with the sums of its
// products.
class PairPanel {
 public:
  explicit PairPanel(uint8_t* at) : at_(at) {}

  template <size_t kStep, size_t kHalf>
  AXC_INLINE void put(__m512i w0, __m512i w1) {
    _mm512_store_si512(at_ + (kStep * 4 + kHalf * 2) * 64, w1);
    _mm512_store_si512(at_ + (kStep * 4 + kHalf * 2 + 1) * 64, w0);
    products_.add<kStep, kHalf>([&](__m512i sum) AXC_INLINE { return _mm512_dpwssd_epi32(sum, w0, w1); });
  }

  AXC_INLINE void finish(size_t group) const { products_.store(group, at_ + kPairPanel); }

 private:
  uint8_t* at_;
  GroupSums products_;
};

// The lowest bits of each word as a signed number. Two shifts would do, but have a lower throughput.
template <size_t kBits>
AXC_INLINE inline __m512i signed_low(__m512i words) {
  constexpr int kFlipped = 0x28;  // as ternary logic: (words ^ sign) & mask
  const __m512i sign = _mm512_set1_epi16(1 << (kBits - 1)), mask = _mm512_set1_epi16((1 << kBits) - 1);
  return _mm512_sub_epi16(_mm512_ternarylogic_epi32(words, sign, mask, kFlipped), sign);
}

template <Precision kPrecision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  if (kPrecision == Precision::Bits8) return pack_bytes_int8(w, stride, rows, columns, group, panel);
  PairPanel to(panel);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w);
  each_transposed<kBlock>(bytes, stride, rows, columns, [&](auto half, auto part, const __m512i* r) AXC_INLINE {
    repeat<16>([&](auto i) AXC_INLINE { to.put<part * 16 + i, half>(signed_low<8>(r[i]), _mm512_srai_epi16(r[i], 8)); });
  });
  to.finish(group);
}

template <Precision kPrecision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  if (kPrecision == Precision::Bits8) return pack_bytes_int4(w, stride, rows, columns, group, panel);
  PairPanel to(panel);
  each_transposed<kBlock / 2>(w, stride, rows, columns / 2, [&](auto half, auto, const __m512i* r) AXC_INLINE {
    repeat<16>([&](auto i) AXC_INLINE {
      to.put<2 * i, half>(signed_low<4>(r[i]), signed_low<4>(_mm512_srli_epi16(r[i], 4)));
      to.put<2 * i + 1, half>(signed_low<4>(_mm512_srli_epi16(r[i], 8)), _mm512_srai_epi16(r[i], 12));
    });
  });
  to.finish(group);
}

template <size_t kRows, size_t kGroup>
void pair_tile(const uint8_t* panel, const uint8_t* levels, const float* scales, const int32_t* sums,
               const float* row_scales, size_t columns, float* c) {
  constexpr size_t kSpan = kGroup ? kGroup : kBlock, kGroups = kBlock / kSpan;
  Vf total[kRows][2];  // for blocks of several groups
  if (kGroups > 1) repeat<kRows>([&](auto t) AXC_INLINE { total[t][0] = total[t][1] = Vf{}; });
  for (size_t g = 0; g * kSpan < columns; ++g) {
    Vu acc[kRows][2];
    repeat<2>([&](auto v) AXC_INLINE {
      const Vu products = Vu(_mm512_load_si512(panel + kPairPanel + (g * 2 + v) * 64));
      repeat<kRows>([&](auto t) AXC_INLINE { acc[t][v] = products - static_cast<uint32_t>(sums[t * kGroups + g]); });
    });
    for (size_t step = g * kSpan / 4; step < (g + 1) * kSpan / 4; ++step) {
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
        const float* own = row_scales + g * kIntPanel + 16 * v;
        if constexpr (kGroups > 1) {
          total[t][v] = fma(__builtin_convertvector(Vi(acc[t][v]), Vf), load(own), total[t][v]);
        } else {
          add_scaled<kGroup != 0>(Vi(acc[t][v]), scales[t], own, c + t * kIntPanel + 16 * v);
        }
      });
    });
  }
  if constexpr (kGroups > 1) {
    repeat<kRows>([&](auto t) AXC_INLINE {
      repeat<2>([&](auto v) AXC_INLINE {
        float* at = c + t * kIntPanel + 16 * v;
        store(at, fma(total[t][v], scales[t * kGroups], load(at)));
      });
    });
  }
}

template <size_t kRows, size_t kGroup, Precision kPrecision>
constexpr auto int_tile = kPrecision == Precision::Bits8 ? bytes_tile<kRows, kGroup, Precision::Bits8> : pair_tile<kRows, kGroup>;

bool runs_here() { return has_avx512() && cpu_has({"avx512bf16"}) && is_amd(); }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kAvx512Pairs = table("avx512_pairs", runs_here);
}
