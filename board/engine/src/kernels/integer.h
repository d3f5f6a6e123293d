// Products of integer weights with 16-bit activations. Sums within a block are exact integers, whatever the
// instruction set. Its file brings, before it includes this:
//   kOffset8, kOffset4        what packing adds to a level to make it unsigned (0: it stays signed)
//   kIntRows, kIntPanel       tokens and outputs of a tile
//   store_levels              one block of activations in the order its products read
//   pack_int8, pack_int4      one block of kIntPanel rows of a weight
//   int_tile<tokens, scaled>  c[t][o] += scale[t] (* row_scale[o]) * product
//   dot_int8, dot_int4        a whole row of a weight, in place, with one token
#pragma once

#include <utility>

#include "float_tile.h"

namespace axc {
namespace {

// The magnitude's bits order as the magnitudes do; a NaN or an infinity makes its block NaN.
inline void quantise(const float* x, Arithmetic order, size_t first, size_t last, const Activations& out) {
  constexpr float kRound = 12582912.0f;
  for (size_t row = first; row < last; ++row) {
    for (size_t block = 0; block < out.blocks(); ++block) {
      const size_t begin = block * kBlock, count = least(kBlock, out.columns - begin);
      alignas(64) float values[kBlock] = {};
      alignas(64) int16_t levels[kBlock];
      std::memcpy(values, x + row * out.columns + begin, count * sizeof(float));
      int32_t peak = 0;
      for (size_t i = 0; i < kBlock; ++i) {
        const int32_t size = std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF;
        peak = size > peak ? size : peak;
      }
      const float largest = std::bit_cast<float>(peak);
      const bool finite = peak < 0x7F800000;
      const float factor = finite && largest > 1e-30f ? kTopLevel / largest : 0.0f;
      int32_t total = 0;
      for (size_t i = 0; i < kBlock; ++i) {
        const int32_t level = std::bit_cast<int32_t>(values[i] * factor + kRound) - std::bit_cast<int32_t>(kRound);
        levels[i] = static_cast<int16_t>(finite ? level : 0);
        total += levels[i];
      }
      const size_t entry = out.entry(block, row);
      out.scales[entry] = finite ? largest / kTopLevel : std::bit_cast<float>(0x7FC00000);
      out.sums[entry] = total;
      store_levels(levels, order, out.levels + entry * kLevelBytes);
    }
  }
}

// The weight's next block, fetched a few rows after each tile: a block's rows lie too far apart for the CPU to foresee,
// and all at once they would hold up the tiles.
class Ahead {
 public:
  Ahead(const uint8_t* data, size_t stride, size_t bytes, size_t rows, size_t turns)
      : data_(data), stride_(stride), bytes_(bytes), rows_(rows), step_((rows + turns - 1) / turns) {}

  void some() {
    for (const size_t last = least(next_ + step_, rows_); next_ < last; ++next_) {
      for (size_t line = 0; line < bytes_; line += 64) __builtin_prefetch(data_ + next_ * stride_ + line, 0, 2);
    }
  }

 private:
  const uint8_t* data_;
  size_t stride_, bytes_, rows_, step_, next_ = 0;
};

using IntTile = void (*)(const uint8_t*, const uint8_t*, const float*, const int32_t*, int32_t, const float*, float*);

template <bool kScaled, size_t... kRows>
constexpr ByCount<IntTile, sizeof...(kRows)> int_tiles(std::index_sequence<kRows...>) {
  return {{int_tile<kRows + 1, kScaled>...}};
}

inline void int_linear_packed(const LinearJob& job, size_t first, size_t last, void* scratch) {
  static constexpr auto kPlain = int_tiles<false>(std::make_index_sequence<kIntRows>());
  static constexpr auto kScaled = int_tiles<true>(std::make_index_sequence<kIntRows>());
  const Matrix& w = *job.weight;
  const Activations& a = *job.levels;
  const bool four = w.arithmetic == Arithmetic::Int4;
  const size_t blocks = a.blocks(), block_bytes = four ? kBlock / 2 : kBlock;
  uint8_t* panel = static_cast<uint8_t*>(scratch);
  float* c = reinterpret_cast<float*>(panel + 2 * kIntPanel * kBlock);
  float* row_scales = c + kTokenChunk * kIntPanel;
  for (size_t begin = 0; begin < job.tokens; begin += kTokenChunk) {
    const size_t tokens = least(kTokenChunk, job.tokens - begin);
    for (size_t row = first; row < last; row += kIntPanel) {
      const size_t rows = least(kIntPanel, last - row);
      std::memset(c, 0, tokens * kIntPanel * sizeof(float));
      for (size_t b = 0; b < blocks; ++b) {
        const uint8_t* data = w.data + row * w.stride() + b * block_bytes;
        if (four) {
          pack_int4(data, w.stride(), rows, panel);
          for (size_t r = 0; r < kIntPanel; ++r) row_scales[r] = r < rows ? w.scales[(row + r) * blocks + b] : 0.0f;
        } else {
          pack_int8(reinterpret_cast<const int8_t*>(data), w.stride(), rows, least(kBlock, w.columns - b * kBlock), panel);
        }
        const bool more = b + 1 < blocks;
        const size_t next = more ? row : row + kIntPanel;
        Ahead ahead(w.data + next * w.stride() + (more ? (b + 1) * block_bytes : 0), w.stride(), block_bytes,
                    next < last ? least(kIntPanel, last - next) : 0, (tokens + kIntRows - 1) / kIntRows);
        for (size_t t = 0; t < tokens; t += kIntRows) {
          const size_t n = least(kIntRows, tokens - t), entry = a.entry(b, begin + t);
          (four ? kScaled : kPlain).of[n - 1](panel, a.levels + entry * kLevelBytes, a.scales + entry, a.sums + entry,
                                              four ? kOffset4 : kOffset8, row_scales, c + t * kIntPanel);
          ahead.some();
        }
      }
      for (size_t t = 0; t < tokens; ++t) {
        finish_rows(job, begin + t, row, rows, c + t * kIntPanel, four ? nullptr : w.scales + row);
      }
    }
  }
}

// Row by row, as they lie in memory: what bounds this is how fast the weight is read. Rows taken by twos and fours were
// faster from the cache, and slower from memory, with and without prefetching.
inline void int_linear_in_place(const LinearJob& job, size_t first, size_t last) {
  const Matrix& w = *job.weight;
  const bool four = w.arithmetic == Arithmetic::Int4;
  for (size_t row = first; row < last; ++row) {
    for (size_t t = 0; t < job.tokens; ++t) {
      finish(job, t, row, four ? dot_int4(w, row, *job.levels, t) : dot_int8(w, row, *job.levels, t) * w.scales[row]);
    }
  }
}

inline void linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  if (job.weight->arithmetic == Arithmetic::Float) {
    float_linear(job, first, last, scratch);
  } else if (job.tokens > kTokensByDot) {
    int_linear_packed(job, first, last, scratch);
  } else {
    int_linear_in_place(job, first, last);
  }
}

static_assert(2 * kIntPanel * kBlock + (kTokenChunk + 1) * kIntPanel * sizeof(float) <= kLinearScratch);

}  // namespace
}  // namespace axc
