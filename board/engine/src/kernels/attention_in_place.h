// Attention of a few query rows over keys and values of 16 bits, which are read once, where they lie, and never packed.
// Sums have the order of float_tile: a score runs over the columns, an output over the keys.
#pragma once

#include "float_in_place.h"

namespace axc {
namespace {

constexpr size_t kFewRows = 8;

using RowsOf = const uint8_t* const*;  // addresses of rows

// Of kPanel keys: scores[r][key] = sum over the columns of q[r] times the key. `ahead`: rows that are read soon.
template <Type kType, size_t kRows>
void few_scores(RowsOf keys, RowsOf ahead, size_t dim, const float* q, float* scores, size_t width) {
  constexpr size_t kVectorsOfKeys = kPanel / kWidth, kTogether = kRows * 2 < 8 ? 2 : 1;  // sums that do not wait for each other
  for (size_t first = 0; first < kVectorsOfKeys; first += kTogether) {
    Vf acc[kTogether][kRows];
    repeat<kTogether>([&](auto v) AXC_INLINE { repeat<kRows>([&](auto r) AXC_INLINE { acc[v][r] = Vf{}; }); });
    for (size_t k = 0; k < dim; k += 2 * kWidth) {
      repeat<kTogether>([&](auto v) AXC_INLINE {
        const size_t place = (first + v) * kWidth;
        if (2 * k % 64 == 0) {
          for (size_t i = 0; i < kWidth; ++i) __builtin_prefetch(ahead[place + i] + 2 * k, 0, 2);
        }
        Vf words[kWidth];
        transpose_words([&](size_t i) AXC_INLINE { return keys[place + i] + 2 * k; }, words);
        repeat<kWidth>([&](auto i) AXC_INLINE {
          const std::pair<Vf, Vf> pair = both_halves(kType, std::bit_cast<Vu>(words[i]));
          const Vf even = pair.first, odd = pair.second;  // names that lambdas can take in clang 14 too
          const float* from = q + k + 2 * i;
          repeat<kRows>([&](auto r) AXC_INLINE { acc[v][r] = fma(even, from[r * dim], acc[v][r]); });
          repeat<kRows>([&](auto r) AXC_INLINE { acc[v][r] = fma(odd, from[r * dim + 1], acc[v][r]); });
        });
      });
    }
    repeat<kTogether>([&](auto v) AXC_INLINE {
      repeat<kRows>([&](auto r) AXC_INLINE { store(scores + r * width + (first + v) * kWidth, acc[v][r]); });
    });
  }
}

// Two vectors of 16-bit floats, in an order that restored() takes back.
template <Type kType>
AXC_INLINE inline std::pair<Vf, Vf> some_values(const uint8_t* at) {
  if constexpr (kType == Type::BFloat16) {
    Vu words;
    std::memcpy(&words, at, sizeof words);
    return both_halves(kType, words);
  } else {
    Vh halves[2];
    std::memcpy(halves, at, sizeof halves);
    return {half_to_float(halves[0]), half_to_float(halves[1])};
  }
}

template <Type kType>
AXC_INLINE inline std::pair<Vf, Vf> restored(Vf a, Vf b) {
  if constexpr (kType != Type::BFloat16) return {a, b};
  constexpr auto kAll = std::make_index_sequence<kWidth>();
  return {by_turns<0>(a, b, kAll), by_turns<kWidth / 2>(a, b, kAll)};
}

// out[r] += sum over `count` values of p[r][value] times the value; pairs of vectors of `out` in the order of some_values.
template <Type kType, size_t kRows>
void few_values(RowsOf values, RowsOf ahead, size_t count, size_t dim, const float* p, size_t width, float* out) {
  constexpr size_t kMost = (kWidth < 16 ? 12 : 24) / (2 * kRows), kPairs = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  const auto add = [&](size_t at, auto pairs) AXC_INLINE {
    constexpr size_t kVectorsOfOut = 2 * decltype(pairs)::value;
    Vf acc[kRows][kVectorsOfOut];
    const auto each = [&](auto f) AXC_INLINE {
      repeat<kRows>([&](auto r) AXC_INLINE { repeat<kVectorsOfOut>([&](auto c) AXC_INLINE { f(r, c); }); });
    };
    each([&](auto r, auto c) AXC_INLINE { acc[r][c] = load(out + r * dim + at + c * kWidth); });
    for (size_t j = 0; j < count; ++j) {
      repeat<kVectorsOfOut / 2>([&](auto c) AXC_INLINE {
        const size_t byte = 2 * (at + 2 * c * kWidth);
        if (byte % 64 == 0) __builtin_prefetch(ahead[j] + byte, 0, 2);
        const std::pair<Vf, Vf> pair = some_values<kType>(values[j] + byte);
        const Vf a = pair.first, b = pair.second;
        repeat<kRows>([&](auto r) AXC_INLINE { acc[r][2 * c] = fma(a, p[r * width + j], acc[r][2 * c]); });
        repeat<kRows>([&](auto r) AXC_INLINE { acc[r][2 * c + 1] = fma(b, p[r * width + j], acc[r][2 * c + 1]); });
      });
    }
    each([&](auto r, auto c) AXC_INLINE { store(out + r * dim + at + c * kWidth, acc[r][c]); });
  };
  size_t at = 0;
  for (; at + 2 * kPairs * kWidth <= dim; at += 2 * kPairs * kWidth) add(at, std::integral_constant<size_t, kPairs>());
  for (; at < dim; at += 2 * kWidth) add(at, std::integral_constant<size_t, 1>());
}

// y = out * factor, in the order of columns again.
template <Type kType>
void few_outputs(const float* out, size_t dim, float factor, float* y) {
  for (size_t i = 0; i < dim; i += 2 * kWidth) {
    const auto [low, high] = restored<kType>(load(out + i), load(out + i + kWidth));
    store(y + i, low * factor);
    store(y + i + kWidth, high * factor);
  }
}

struct InPlaceAttention {
  void (*scores)(RowsOf keys, RowsOf ahead, size_t dim, const float* q, float* scores, size_t width);
  void (*values)(RowsOf values, RowsOf ahead, size_t count, size_t dim, const float* p, size_t width, float* out);
  void (*outputs)(const float* out, size_t dim, float factor, float* y);
};

template <Type kType, size_t... kRows>
constexpr ByCount<InPlaceAttention, sizeof...(kRows)> few_rows(std::index_sequence<kRows...>) {
  return {{{few_scores<kType, kRows + 1>, few_values<kType, kRows + 1>, few_outputs<kType>}...}};
}

// Null where keys and values are packed.
inline const InPlaceAttention* in_place_attention(Type type, size_t rows, size_t dim) {
  constexpr auto kCounts = std::make_index_sequence<kFewRows>();
  static constexpr auto kBFloat16 = few_rows<Type::BFloat16>(kCounts), kFloat16 = few_rows<Type::Float16>(kCounts);
  if (rows > kFewRows || dim % (2 * kWidth)) return nullptr;
  return type == Type::BFloat16 ? &kBFloat16.of[rows - 1] : type == Type::Float16 ? &kFloat16.of[rows - 1] : nullptr;
}

}  // namespace
}  // namespace axc
