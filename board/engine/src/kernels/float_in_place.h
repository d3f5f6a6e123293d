// Multiplies a few tokens with a float weight in place, reading it once: transposes columns of kWidth rows in registers,
// so that every output has a lane and its sum runs over the columns in order, as in float_tile.
#pragma once

#include "float_tile.h"
#include "prefetch.h"
#include "transpose_words.h"

namespace axc {
namespace {

constexpr size_t kInPlaceVectors = kWidth < 16 ? 4 : 2;  // independent accumulators, to hide latency
constexpr size_t kInPlaceRows = kInPlaceVectors * kWidth;
constexpr size_t kInPlaceAhead = 512;  // prefetch distance in bytes of a row

// Rows [row, row + kInPlaceRows) of a weight; beyond its end the last row is repeated.
struct InPlaceRows {
  const uint8_t* of[kInPlaceRows];
  size_t stride;

  InPlaceRows(const Matrix& w, size_t row) : stride(w.stride()) {
    for (size_t r = 0; r < kInPlaceRows; ++r) of[r] = w.data + least(row + r, w.rows - 1) * stride;
  }

  // `bytes` of each row of a vector from `at` on, transposed: words[i] has bytes 4 i to 4 i + 3 of every row; zero padded.
  AXC_INLINE void transposed(size_t vector, size_t at, size_t bytes, Vf words[kWidth]) const {
    const uint8_t* const* own = of + vector * kWidth;
    if (bytes < sizeof(Vf)) {
      repeat<kWidth>([&](auto r) AXC_INLINE {
        words[r] = Vf{};
        std::memcpy(&words[r], own[r] + at, bytes);
      });
      transpose(words);
    } else if (own[kWidth - 1] == own[0] + (kWidth - 1) * stride) {
      transpose_words([&](size_t r) AXC_INLINE { return own[0] + r * stride + at; }, words);
    } else {
      transpose_words([&](size_t r) AXC_INLINE { return own[r] + at; }, words);
    }
  }

  // Prefetches for the rows of a vector: further on in the same rows, or the start of the rows that follow.
  AXC_INLINE void prefetch(size_t vector, size_t at) const {
    if (!kPrefetched) return;
    const size_t ahead = at + kInPlaceAhead, next = ahead < stride ? ahead : ahead + (kInPlaceRows - 1) * stride;
    for (size_t r = 0; r < kWidth; ++r) __builtin_prefetch(of[vector * kWidth + r] + next, 0, 2);
  }
};

// The two values of 16 bits in each word.
inline std::pair<Vf, Vf> both_halves(Type type, Vu words) {
  if (type == Type::BFloat16) return {std::bit_cast<Vf>(words << 16), std::bit_cast<Vf>(words & 0xFFFF0000)};
#ifdef __AVX512F__
  alignas(64) static constexpr auto kEvenFirst = [] {
    struct { uint16_t of[2 * kWidth]; } order{};
    for (size_t i = 0; i < 2 * kWidth; ++i) order.of[i] = static_cast<uint16_t>(i % kWidth * 2 + i / kWidth);
    return order;
  }();
  const __m512i sorted = _mm512_permutexvar_epi16(_mm512_load_si512(kEvenFirst.of), __m512i(words));
  return {Vf(_mm512_cvtph_ps(_mm512_castsi512_si256(sorted))), Vf(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(sorted, 1)))};
#endif
  return {half_to_float(__builtin_convertvector(words & 0xFFFF, Vh)), half_to_float(__builtin_convertvector(words >> 16, Vh))};
}

// out[r] = sum over the columns of row r times x
template <Type kType>
void float_columns(const InPlaceRows& rows, size_t columns, const float* x, float* out) {
  constexpr size_t kBytes = kType == Type::Float ? 4 : 2, kStep = 4 * kWidth / kBytes;  // columns in a vector of one row
  Vf acc[kInPlaceVectors];
  repeat<kInPlaceVectors>([&](auto v) AXC_INLINE { acc[v] = Vf{}; });
  const auto add = [&](size_t k, size_t count, const float* own) AXC_INLINE {
    repeat<kInPlaceVectors>([&](auto v) AXC_INLINE {
      Vf words[kWidth];
      rows.prefetch(v, k * kBytes);
      rows.transposed(v, k * kBytes, count * kBytes, words);
      repeat<kWidth>([&](auto i) AXC_INLINE {
        if constexpr (kType == Type::Float) {
          acc[v] = fma(words[i], own[i], acc[v]);
        } else {
          const auto [even, odd] = both_halves(kType, std::bit_cast<Vu>(words[i]));
          acc[v] = fma(odd, own[2 * i + 1], fma(even, own[2 * i], acc[v]));
        }
      });
    });
  };
  size_t k = 0;
  for (; k + kStep <= columns; k += kStep) add(k, kStep, x + k);
  if (k < columns) {
    float rest[kStep] = {};
    std::memcpy(rest, x + k, (columns - k) * sizeof(float));
    add(k, columns - k, rest);
  }
  repeat<kInPlaceVectors>([&](auto v) AXC_INLINE { store(out + v * kWidth, acc[v]); });
}

using FloatColumns = void (*)(const InPlaceRows&, size_t, const float*, float*);

// Null for types that are converted by blocks.
inline FloatColumns float_columns_of(Type type) {
  switch (type) {
    case Type::Float: return float_columns<Type::Float>;
    case Type::Float16: return float_columns<Type::Float16>;
    case Type::BFloat16: return float_columns<Type::BFloat16>;
    default: return nullptr;
  }
}

}  // namespace
}  // namespace axc
