// Products in float32 with weights of any type, in place for a few tokens, else packed; and the epilogue of all products.
// Every sum runs over the columns in order.
#pragma once

#include "float_in_place.h"
#include "scales.h"

namespace axc {
namespace {

constexpr size_t kDepth = 128;  // columns packed at a time

// (level - zero) x scale for both 4-bit levels of each byte.
inline void widen_pairs(const uint8_t* pairs, size_t count, int32_t zero, float scale, float* out) {
  using Bytes = uint8_t __attribute__((vector_size(kWidth)));
  constexpr auto kLanes = std::make_index_sequence<kWidth>();
  const auto level = [=](Vi bits) AXC_INLINE { return __builtin_convertvector((bits ^ 8) - (8 + zero), Vf) * scale; };
  const auto some = [&](size_t i, size_t n) AXC_INLINE {
    Bytes bytes{};
    std::memcpy(&bytes, pairs + i, n);
    const Vi wide = __builtin_convertvector(bytes, Vi);
    const Vf low = level(wide & 15), high = level(wide >> 4);
    const Vf both[2] = {by_turns<0>(low, high, kLanes), by_turns<kWidth / 2>(low, high, kLanes)};
    std::memcpy(out + 2 * i, both, 2 * n * sizeof(float));
  };
  size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) some(i, kWidth);
  if (i < count) some(i, count - i);
}

// Columns [first, first + count) of one row of a weight, as float32.
inline void widen_row(const Matrix& w, size_t row, size_t first, size_t count, float* out) {
  const uint8_t* data = w.data + row * w.stride();
  if (w.type != Type::Int8 && w.type != Type::Int4) {
    widen(w.type, data + first * static_cast<size_t>(bits_of(w.type)) / 8, count, out);
    if (!w.scales) return;
    for (size_t i = 0; i < count; ++i) out[i] *= scale_at(w, row * w.blocks + (first + i) / w.block);
    return;
  }
  for (size_t i = 0; i < count;) {
    const size_t at = first + i, end = i + least(count - i, w.block - at % w.block), index = row * w.blocks + at / w.block;
    const float scale = scale_at(w, index);
    const int32_t zero = w.zeros ? w.zeros[index] : 0;
    if (w.type == Type::Int8) {
      for (; i < end; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(data[first + i]) - zero);
    } else {
      widen_pairs(data + at / 2, (end - i) / 2, zero, scale, out + i);  // blocks and rows of 4-bit weights are even
      i = end;
    }
  }
}

// `count` floats of one of the three types, at most a vector.
template <Type kType>
AXC_INLINE inline Vf widened(const uint8_t* at, size_t count = kWidth) {
  if constexpr (kType == Type::Float) {
    Vf v{};
    std::memcpy(&v, at, count * sizeof(float));
    return v;
  } else {
    Vh v{};
    std::memcpy(&v, at, count * sizeof(uint16_t));
    return kType == Type::BFloat16 ? bf16_to_float(v) : half_to_float(v);
  }
}

// The epilogue of a product: adds bias and residual, and stores.
inline void finish(const LinearJob& job, size_t token, size_t row, float value) {
  if (job.bias) value += job.bias[row];
  if (job.residual) value += job.residual[token * job.weight->rows + row];
  *job.at(token, row) = value;
}

// The same for `rows` rows from `row` on; `scales` are theirs, or null.
inline void finish_rows(const LinearJob& job, size_t token, size_t row, size_t rows, const float* values, const float* scales) {
  const float* residual = job.residual ? job.residual + token * job.weight->rows + row : nullptr;
  float* to = job.at(token, row);
  size_t r = 0;
  for (; r + kWidth <= rows; r += kWidth) {
    Vf y = load(values + r);
    if (scales) y *= load(scales + r);
    if (job.bias) y += load(job.bias + row + r);
    if (residual) y += load(residual + r);
    store(to + r, y);
  }
  for (; r < rows; ++r) finish(job, token, row + r, scales ? values[r] * scales[r] : values[r]);
}

// For a few tokens: `columns(rows, token, out)` computes kInPlaceRows rows.
template <class Columns>
inline void each_in_place(const LinearJob& job, size_t first, size_t last, Columns columns) {
  for (size_t row = first; row < last; row += kInPlaceRows) {
    const InPlaceRows rows(*job.weight, row);
    for (size_t t = 0; t < job.tokens; ++t) {
      float products[kInPlaceRows];
      columns(rows, t, products);
      finish_rows(job, t, row, least(kInPlaceRows, last - row), products, nullptr);
    }
  }
}

// Packs a panel of one of the three float types: kPanel rows, kDepth columns from `first` on.
template <Type kType>
void pack_floats(const Matrix& w, size_t row, size_t first, float* panel) {
  constexpr size_t kBytes = kType == Type::Float ? 4 : 2;
  const size_t stride = w.columns * kBytes;
  const uint8_t* data = w.data + row * stride + first * kBytes;
  transpose_panel(kDepth, panel, [&](size_t r, size_t k) AXC_INLINE { return widened<kType>(data + r * stride + k * kBytes); });
}

// Packs a panel of any type with any number of rows and columns.
inline void pack_panel(const Matrix& w, size_t row, size_t rows, size_t first, size_t depth, float* wide, float* panel) {
  if (rows == kPanel && depth == kDepth) {
    switch (w.type) {
      case Type::Float: return pack_floats<Type::Float>(w, row, first, panel);
      case Type::Float16: return pack_floats<Type::Float16>(w, row, first, panel);
      case Type::BFloat16: return pack_floats<Type::BFloat16>(w, row, first, panel);
      default: break;
    }
  }
  if (rows < kPanel) std::memset(wide, 0, kPanel * kDepth * sizeof(float));
  for (size_t r = 0; r < rows; ++r) widen_row(w, row + r, first, depth, wide + r * kDepth);
  transpose_panel(kDepth, panel, [wide](size_t r, size_t k) AXC_INLINE { return load(wide + r * kDepth + k); });
}

inline void float_linear(const LinearJob& job, size_t first, size_t last, void* scratch) {
  const Matrix& w = *job.weight;
  float* panel = static_cast<float*>(scratch);
  float* wide = panel + kPanel * kDepth;
  float* c = wide + kPanel * kDepth;
  if (const FloatColumns columns = float_columns_of(w.type); columns && job.tokens <= kTokensByDot) {
    return each_in_place(job, first, last, [&](const InPlaceRows& rows, size_t t, float* out) {
      columns(rows, w.columns, job.x + t * w.columns, out);
    });
  }
  for (size_t begin = 0; begin < job.tokens; begin += kTokenChunk) {
    const size_t tokens = least(kTokenChunk, job.tokens - begin);
    for (size_t row = first; row < last; row += kPanel) {
      const size_t rows = least(kPanel, last - row);
      std::memset(c, 0, tokens * kPanel * sizeof(float));
      for (size_t k = 0; k < w.columns; k += kDepth) {
        const size_t depth = least(kDepth, w.columns - k);
        pack_panel(w, row, rows, k, depth, wide, panel);
        Prefetcher prefetcher = behind(job, row, last, kPanel, k, kDepth, (tokens + kFloatRows - 1) / kFloatRows);
        float_rows(panel, kPanel, job.x + begin * w.columns + k, w.columns, tokens, depth, c, kPanel, [&] { prefetcher.some(); });
      }
      for (size_t t = 0; t < tokens; ++t) {
        finish_rows(job, begin + t, row, rows, c + t * kPanel, nullptr);
      }
    }
  }
}

static_assert((2 * kPanel * kDepth + kTokenChunk * kPanel) * sizeof(float) <= kLinearScratch);

}  // namespace
}  // namespace axc
