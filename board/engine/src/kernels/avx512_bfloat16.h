// Products of bfloat16 weights with activations rounded to bfloat16, two columns at a time (vdpbf16ps).
#pragma once

#include "avx512_bytes.h"
#include "float_linear.h"

namespace axc {
namespace {

// c[t][o] += sum over a block. Panel: for every 2 columns 32 outputs x 2 weights.
template <size_t kRows>
void bfloat16_tile(const uint8_t* panel, const uint8_t* levels, float* c) {
  Vf acc[kRows][2];
  const auto each = [](auto f) AXC_INLINE {
    repeat<kRows>([&](auto t) AXC_INLINE { repeat<2>([&](auto v) AXC_INLINE { f(t, v); }); });
  };
  each([&](auto t, auto v) AXC_INLINE { acc[t][v] = load(c + t * kIntPanel + 16 * v); });
  for (size_t k = 0; k < kBlock; k += 2) {
    __m512i w[2];
    repeat<2>([&](auto v) AXC_INLINE { w[v] = _mm512_load_si512(panel + k * 64 + 64 * v); });
    each([&](auto t, auto v) AXC_INLINE {
      const __m512i x = _mm512_set1_epi32(dword(levels + t * kLevelBytes + 2 * k));
      acc[t][v] = Vf(_mm512_dpbf16_ps(__m512(acc[t][v]), (__m512bh)w[v], (__m512bh)x));
    });
  }
  each([&](auto t, auto v) AXC_INLINE { store(c + t * kIntPanel + 16 * v, acc[t][v]); });
}

using Bfloat16Tile = void (*)(const uint8_t*, const uint8_t*, float*);

template <size_t... kRows>
constexpr ByCount<Bfloat16Tile, sizeof...(kRows)> bfloat16_tiles(std::index_sequence<kRows...>) {
  return {{bfloat16_tile<kRows + 1>...}};
}

// For a few tokens: like float_columns, two columns at a time.
void bfloat16_columns(const InPlaceRows& rows, size_t columns, const uint8_t* levels, float* out) {
  constexpr size_t kStep = 32;
  Vf acc[kInPlaceVectors] = {};
  for (size_t k = 0; k < columns; k += kStep) {
    repeat<kInPlaceVectors>([&](auto v) AXC_INLINE {
      Vf words[16];
      rows.prefetch(v, 2 * k);
      rows.transposed(v, 2 * k, 2 * least(kStep, columns - k), words);
      repeat<16>([&](auto i) AXC_INLINE {
        const __m512i x = _mm512_set1_epi32(dword(levels + 2 * k + 4 * i));
        acc[v] = Vf(_mm512_dpbf16_ps(__m512(acc[v]), (__m512bh)words[i], (__m512bh)x));
      });
    });
  }
  repeat<kInPlaceVectors>([&](auto v) AXC_INLINE { store(out + 16 * v, acc[v]); });
}

void bfloat16_linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  constexpr size_t kRows = 12, kBytes = 2 * kBlock, kPanelBytes = kIntPanel * kBytes;
  static constexpr auto kTiles = bfloat16_tiles(std::make_index_sequence<kRows>());
  static_assert(kBytes == kLevelBytes && kPanelBytes + kTokenChunk * kIntPanel * sizeof(float) <= kLinearScratch);
  const Matrix& w = *job.weight;
  const Activations& a = *job.levels;
  if (job.tokens <= kTokensByDot) {
    return each_in_place(job, first, last, [&](const InPlaceRows& rows, size_t t, float* out) {
      bfloat16_columns(rows, w.columns, a.levels + a.entry(0, t) * kLevelBytes, out);
    });
  }
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  float* c = reinterpret_cast<float*>(panel + kPanelBytes);
  for (size_t begin = 0; begin < job.tokens; begin += kTokenChunk) {
    const size_t tokens = least(kTokenChunk, job.tokens - begin);
    for (size_t row = first; row < last; row += kIntPanel) {
      const size_t rows = least(kIntPanel, last - row);
      std::memset(c, 0, tokens * kIntPanel * sizeof(float));
      for (size_t b = 0; b < a.blocks(); ++b) {
        const size_t columns = least(kBlock, w.columns - b * kBlock);
        const uint8_t* data = w.data + row * w.stride() + b * kBytes;
        each_transposed<kBytes>(data, w.stride(), rows, 2 * columns, [&](auto half, auto part, const __m512i* r) AXC_INLINE {
          for (size_t i = 0; i < 16; ++i) _mm512_store_si512(panel + (part * 16 + i) * 128 + half * 64, r[i]);
        });
        Prefetcher prefetcher = behind(job, row, last, kIntPanel, b * kBlock, kBlock, (tokens + kRows - 1) / kRows);
        for (size_t t = 0; t < tokens; t += kRows) {
          const size_t n = least(kRows, tokens - t);
          prefetcher.some();
          kTiles.of[n - 1](panel, a.levels + a.entry(b, begin + t) * kLevelBytes, c + t * kIntPanel);
        }
      }
      for (size_t t = 0; t < tokens; ++t) finish_rows(job, begin + t, row, rows, c + t * kIntPanel, nullptr);
    }
  }
}

constexpr bool kRoundsBfloat16 = true;
constexpr LinearKernel kBfloat16Linear = bfloat16_linear;

}  // namespace
}  // namespace axc
