// Transposition of rows of bytes as words of 4 bytes. See vectors.h for how it is included.
#pragma once

#include "quads.h"

namespace axc {
namespace {

// Reads 4 * kWidth bytes of each of kWidth rows, transposed: words[i] has bytes 4 i to 4 i + 3 of every row. Rows 4 apart
// are combined as they are loaded, which saves the shuffles between quarters. row(r) is the address of row r.
template <class Row>
AXC_INLINE inline void transpose_words(Row row, Vf words[kWidth]) {
  repeat<kWidth / 4>([&](auto chunk) AXC_INLINE {
    const auto quarter = [&](size_t r) AXC_INLINE {
      V4 v;
      std::memcpy(&v, row(r) + 16 * chunk, sizeof v);
      return v;
    };
    repeat<4>([&](auto i) AXC_INLINE {
      Vf& x = words[4 * chunk + i];
#if defined(__AVX512F__)
      const auto next = [&](size_t r) AXC_INLINE { return __m128i(quarter(r)); };
      __m512i y = _mm512_broadcast_i32x4(next(i));
      y = _mm512_mask_broadcast_i32x4(y, 0x00F0, next(i + 4));
      y = _mm512_mask_broadcast_i32x4(y, 0x0F00, next(i + 8));
      x = Vf(_mm512_mask_broadcast_i32x4(y, 0xF000, next(i + 12)));
#elif defined(__AVX2__)
      x = Vf(_mm256_set_m128(__m128(quarter(i + 4)), __m128(quarter(i))));
#else
      x = quarter(i);
#endif
    });
    transpose_quads(words + 4 * chunk);
  });
}

}  // namespace
}  // namespace axc
