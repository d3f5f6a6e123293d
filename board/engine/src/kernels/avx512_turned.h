// Transposes rows of bytes to columns of words. vectors.h explains how it is included.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

// 64 bytes of each of 16 rows, transposed: r[i] has bytes 4 i to 4 i + 3 of every row. Loads combine rows 4 apart, which
// saves half the shuffles.
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

}  // namespace
}  // namespace axc
