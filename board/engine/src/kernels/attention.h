// Grouped-query attention that reads keys and values where the cache has them, and only those that some row sees.
#pragma once

#include <algorithm>

#include "float_tile.h"
#include "rows.h"

namespace axc {
namespace {

constexpr size_t padded(size_t n, size_t step) { return (n + step - 1) / step * step; }

struct AttentionScratch {
  float *panel, *wide, *q, *scores, *out, *mask, *bias, *threshold, *inverse;
  uint32_t* seen;
  size_t bytes;

  AttentionScratch(const AttentionJob& job, size_t rows, void* memory) {
    const size_t columns = padded(job.history + job.tokens, kPanel), depth = padded(job.head_dim, kPanel);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory);  // 0 when only the size is asked for
    uintptr_t at = start;
    const auto take = [&at](size_t count) { return std::exchange(at, at + padded(count * 4, 64)); };
    panel = reinterpret_cast<float*>(take(kPanel * depth));
    wide = reinterpret_cast<float*>(take(kPanel * depth));
    q = reinterpret_cast<float*>(take(rows * job.head_dim));
    scores = reinterpret_cast<float*>(take(rows * columns));
    out = reinterpret_cast<float*>(take(rows * depth));
    mask = reinterpret_cast<float*>(take(rows * columns));
    bias = reinterpret_cast<float*>(take(kPanel));
    threshold = reinterpret_cast<float*>(take(rows));
    inverse = reinterpret_cast<float*>(take(rows));
    seen = reinterpret_cast<uint32_t*>(take(columns));
    bytes = at - start;
  }
};

inline size_t attention_scratch(const AttentionJob& job, size_t rows) { return AttentionScratch(job, rows, nullptr).bytes; }

// A key or value row of one head.
inline const void* cached_row(const AttentionJob& job, const void* cache, const void* current, size_t row, size_t kv_head) {
  const size_t width = job.kv_heads * job.head_dim;
  const bool past = row < job.history;
  const size_t element = (past ? row : row - job.history) * width + kv_head * job.head_dim;
  return static_cast<const uint8_t*>(past ? cache : current) + element * static_cast<size_t>(bits_of(job.type)) / 8;
}

// Rows of a head lie apart, and what was read between two tokens has driven them from the caches.
inline void prefetch(const void* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const uint8_t*>(row) + at);
}

// Lists the columns some token sees. One that sees nothing sees everything, as softmax has it.
inline size_t visible(const float* mask, size_t tokens, size_t columns, float* threshold, uint32_t* seen) {
  bool blind = false;
  for (size_t t = 0; t < tokens; ++t) {
    bool sees = false;
    for (size_t j = 0; j < columns && !sees; ++j) sees = mask[t * columns + j] > kMasked;
    threshold[t] = sees ? kMasked : -3.4e38f;
    blind |= !sees;
  }
  size_t count = 0;
  for (size_t j = 0; j < columns; ++j) {
    bool wanted = blind;
    for (size_t t = tokens; t-- && !wanted;) wanted = mask[t * columns + j] > kMasked;  // the last sees most
    if (wanted) seen[count++] = static_cast<uint32_t>(j);
  }
  return count;
}

constexpr float kHidden = -3.0e38f;

// What is added to a token's scores with the keys `seen`; kHidden for what it does not see.
inline void biases(const float* mask, float threshold, const uint32_t* seen, size_t keys, float* bias) {
  for (size_t j = 0; j < kPanel; ++j) bias[j] = j < keys && mask[seen[j]] > threshold ? mask[seen[j]] : kHidden;
}

// A hidden score is replaced, not only lowered: what the cache holds there may be no number.
inline void add_biases(const float* bias, float* scores) {
  for (size_t j = 0; j < kPanel; j += kWidth) {
    const Vf b = load(bias + j), hidden = all(kHidden);
    store(scores + j, b > hidden ? load(scores + j) + b : hidden);
  }
}

inline void cap_scores(float cap, float* scores) {
  each(scores, scores, kPanel, scores, [cap](Vf v, Vf) { return cap * hyperbolic_tangent(v / cap); });
}

// The two values of 16 bits in each word.
inline std::pair<Vf, Vf> both_halves(Type type, Vu words) {
  if (type == Type::BFloat16) return {std::bit_cast<Vf>(words << 16), std::bit_cast<Vf>(words & 0xFFFF0000)};
  return {half_to_float(__builtin_convertvector(words & 0xFFFF, Vh)), half_to_float(__builtin_convertvector(words >> 16, Vh))};
}

// Half the shuffles, which narrow vectors wait for; with 512 bits it is no faster.
constexpr bool kByWords = kWidth < 16;
static_assert(kPanel % (2 * kWidth) == 0);

// Columns of kPanel rows of 16-bit floats become rows of kPanel, widened: two columns are transposed as one word.
inline void transpose_halves(Type type, size_t columns, const void* const rows[kPanel], float* panel) {
  for (size_t i = 0; i < columns; i += 2 * kWidth) {
    const size_t count = least(2 * kWidth, columns - i);
    for (size_t j = 0; j < kPanel; j += kWidth) {
      Vf words[kWidth];
      repeat<kWidth>([&](auto r) AXC_INLINE {
        const uint16_t* from = static_cast<const uint16_t*>(rows[j + r]) + i;
        words[r] = Vf{};
        if (count == 2 * kWidth) {
          std::memcpy(&words[r], from, sizeof(Vf));
        } else {
          std::memcpy(&words[r], from, 2 * count);
        }
      });
      transpose(words);
      repeat<kWidth>([&](auto r) AXC_INLINE {
        const auto [even, odd] = both_halves(type, std::bit_cast<Vu>(words[r]));
        store(panel + (i + 2 * r) * kPanel + j, even);
        if (2 * r + 1 < count) store(panel + (i + 2 * r + 1) * kPanel + j, odd);
      });
    }
  }
}

inline void attend(const AttentionJob& job, const AttentionShare& share, void* memory) {
  const size_t heads = share.last_head - share.first_head, tokens = share.last - share.first, rows = heads * tokens;
  const size_t columns = job.history + job.tokens, dim = job.head_dim;
  const size_t depth = padded(dim, kPanel), q_width = job.heads * dim;
  const size_t row_bytes = dim * static_cast<size_t>(bits_of(job.type)) / 8;
  const AttentionScratch s(job, rows, memory);
  for (size_t t = 0; t < tokens; ++t) {
    const uint8_t* mask = static_cast<const uint8_t*>(job.mask);
    widen(job.type, mask + (share.first + t) * columns * static_cast<size_t>(bits_of(job.type)) / 8, columns, s.mask + t * columns);
    for (size_t h = 0; h < heads; ++h) {
      const float* q = job.q + (share.first + t) * q_width + (share.first_head + h) * dim;
      for (size_t i = 0; i < dim; ++i) s.q[(t * heads + h) * dim + i] = q[i] * job.scale;
    }
  }
  const size_t count = visible(s.mask, tokens, columns, s.threshold, s.seen), width = padded(count, kPanel);

  for (size_t first = 0; first < count; first += kPanel) {
    const size_t keys = least(kPanel, count - first);
    const uint32_t* seen = s.seen + first;
    const bool words = kByWords && job.type != Type::Float;
    if (keys < kPanel) std::memset(s.wide, 0, kPanel * depth * sizeof(float));
    for (size_t j = first + kPanel; j < least(first + 2 * kPanel, count); ++j) {
      prefetch(cached_row(job, job.k_cache, job.k_current, s.seen[j], share.kv_head), row_bytes);
    }
    const void* rows_of[kPanel];
    for (size_t j = 0; j < keys; ++j) {
      prefetch(cached_row(job, job.v_cache, job.v_current, seen[j], share.kv_head), row_bytes);
      rows_of[j] = cached_row(job, job.k_cache, job.k_current, seen[j], share.kv_head);
      if (!words) widen(job.type, rows_of[j], dim, s.wide + j * depth);
    }
    if (words) {
      std::fill(rows_of + keys, rows_of + kPanel, s.wide);
      transpose_halves(job.type, dim, rows_of, s.panel);
    } else {
      transpose_panel(dim, s.panel, [&](size_t j, size_t i) AXC_INLINE { return load(s.wide + j * depth + i); });
    }
    float* scores = s.scores + first;
    for (size_t r = 0; r < rows; ++r) std::memset(scores + r * width, 0, kPanel * sizeof(float));
    float_rows(s.panel, kPanel, s.q, dim, rows, dim, scores, width, [] {});
    if (job.softcap > 0) {
      for (size_t r = 0; r < rows; ++r) cap_scores(job.softcap, scores + r * width);
    }
    for (size_t t = 0; t < tokens; ++t) {
      biases(s.mask + t * columns, s.threshold[t], seen, keys, s.bias);
      for (size_t h = 0; h < heads; ++h) add_biases(s.bias, scores + (t * heads + h) * width);
    }
  }

  for (size_t r = 0; r < rows; ++r) s.inverse[r] = exponentials(s.scores + r * width, width, s.scores + r * width);
  std::memset(s.out, 0, rows * depth * sizeof(float));
  for (size_t first = 0; first < count; first += kPanel) {
    const size_t keys = least(kPanel, count - first);
    for (size_t j = 0; j < keys; ++j) {
      float* row = s.panel + j * depth;
      widen(job.type, cached_row(job, job.v_cache, job.v_current, s.seen[first + j], share.kv_head), dim, row);
      for (size_t i = dim; i < depth; ++i) row[i] = 0;
    }
    for (size_t i = 0; i < depth; i += kPanel) {
      float_rows(s.panel + i, depth, s.scores + first, width, rows, keys, s.out + i, depth, [] {});
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    float* y = job.y + (share.first + r / heads) * q_width + (share.first_head + r % heads) * dim;
    for (size_t i = 0; i < dim; ++i) y[i] = s.out[r * depth + i] * s.inverse[r];
  }
}

}  // namespace
}  // namespace axc
