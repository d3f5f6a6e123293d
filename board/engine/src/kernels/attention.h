// Grouped-query attention that reads keys and values where the cache has them, and only those that some row sees.
//
// What a token gets does not depend on the tokens beside it: scores are sums over a head's columns in order, values are
// added key by key in order, and in the sums of exponentials a key's lane is its position modulo kLanes. A key that is
// hidden adds exactly 0 everywhere.
#pragma once

#include <algorithm>

#include "float_in_place.h"
#include "rows.h"

namespace axc {
namespace {

constexpr size_t padded(size_t n, size_t step) { return (n + step - 1) / step * step; }

struct AttentionScratch {
  float *panel, *wide, *q, *scores, *out, *mask, *bias, *inverse, *zeros;
  uint32_t* seen;
  size_t bytes;

  AttentionScratch(const AttentionJob& job, size_t rows, void* memory) {
    const size_t columns = padded(job.history + job.tokens, kPanel) + kPanel + kLanes, depth = padded(job.head_dim, kPanel);
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
    inverse = reinterpret_cast<float*>(take(rows));
    zeros = reinterpret_cast<float*>(take(depth));
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

constexpr float kHidden = -3.0e38f;
constexpr uint32_t kNone = UINT32_MAX;  // in a list of columns: a place that holds none

inline bool sees_any(const float* mask, size_t columns) {
  for (size_t j = columns; j--;) {
    if (mask[j] > kMasked) return true;
  }
  return false;
}

// Lists the columns that some of `tokens` rows of a mask see, in kLanes consecutive positions at a time, without those
// that hold nothing seen; returns the length of the list. The positions of cached columns are their numbers, those of the
// current ones begin at job.past.
inline size_t visible(const AttentionJob& job, const float* mask, size_t tokens, uint32_t* seen) {
  const size_t columns = job.history + job.tokens;
  const auto wanted = [&](size_t column) {
    for (size_t t = tokens; t--;) {  // the last sees most
      if (mask[t * columns + column] > kMasked) return true;
    }
    return false;
  };
  size_t past = job.past;
  for (size_t j = past; j < job.history && past < job.history; ++j) {
    if (wanted(j)) past = job.history;  // no causal mask
  }
  const size_t positions = past + job.tokens;
  size_t count = 0, end = 0;
  for (size_t first = 0; first < positions; first += kLanes) {
    size_t last = count;
    for (size_t i = 0; i < kLanes; ++i) {
      const size_t position = first + i, column = position < past ? position : position - past + job.history;
      const bool there = position < positions && wanted(column);
      seen[count + i] = there ? static_cast<uint32_t>(column) : kNone;
      if (there) last = count + i + 1;
    }
    if (last == count) continue;
    end = last, count += kLanes;
  }
  return end;
}

// What is added to a token's scores with the keys `seen`; kHidden for what it does not see.
inline void biases(const float* mask, float threshold, const uint32_t* seen, size_t keys, float* bias) {
  for (size_t j = 0; j < kPanel; ++j) {
    bias[j] = j < keys && seen[j] != kNone && mask[seen[j]] > threshold ? mask[seen[j]] : kHidden;
  }
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

// Tokens that all see something, or all see nothing: those see everything, as softmax has it.
inline void attend_alike(const AttentionJob& job, const AttentionShare& share, const float* mask, bool blind, const AttentionScratch& s) {
  const size_t heads = share.last_head - share.first_head, tokens = share.last - share.first, rows = heads * tokens;
  const size_t columns = job.history + job.tokens, dim = job.head_dim;
  const size_t depth = padded(dim, kPanel), q_width = job.heads * dim;
  const size_t row_bytes = dim * static_cast<size_t>(bits_of(job.type)) / 8;
  const float threshold = blind ? -3.4e38f : kMasked;
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t h = 0; h < heads; ++h) {
      const float* q = job.q + (share.first + t) * q_width + (share.first_head + h) * dim;
      for (size_t i = 0; i < dim; ++i) s.q[(t * heads + h) * dim + i] = q[i] * job.scale;
    }
  }
  size_t count = columns;
  if (blind) {
    for (size_t j = 0; j < columns; ++j) s.seen[j] = static_cast<uint32_t>(j);
  } else {
    count = visible(job, mask, tokens, s.seen);
  }
  const size_t width = padded(count, kPanel);
  const auto row_of = [&](const void* cache, const void* current, size_t place) AXC_INLINE -> const void* {
    return s.seen[place] == kNone ? s.zeros : cached_row(job, cache, current, s.seen[place], share.kv_head);
  };

  for (size_t first = 0; first < count; first += kPanel) {
    const size_t keys = least(kPanel, count - first);
    const uint32_t* seen = s.seen + first;
    const bool words = kByWords && job.type != Type::Float;
    if (keys < kPanel) std::memset(s.wide, 0, kPanel * depth * sizeof(float));
    for (size_t j = first + kPanel; j < least(first + 2 * kPanel, count); ++j) {
      prefetch(row_of(job.k_cache, job.k_current, j), row_bytes);
    }
    const void* rows_of[kPanel];
    for (size_t j = 0; j < keys; ++j) {
      prefetch(row_of(job.v_cache, job.v_current, first + j), row_bytes);
      rows_of[j] = row_of(job.k_cache, job.k_current, first + j);
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
      biases(mask + t * columns, threshold, seen, keys, s.bias);
      for (size_t h = 0; h < heads; ++h) add_biases(s.bias, scores + (t * heads + h) * width);
    }
  }

  for (size_t r = 0; r < rows; ++r) s.inverse[r] = exponentials(s.scores + r * width, width, s.scores + r * width);
  std::memset(s.out, 0, rows * depth * sizeof(float));
  for (size_t first = 0; first < count; first += kPanel) {
    const size_t keys = least(kPanel, count - first);
    for (size_t j = 0; j < keys; ++j) {
      float* row = s.panel + j * depth;
      widen(job.type, row_of(job.v_cache, job.v_current, first + j), dim, row);
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

inline void attend(const AttentionJob& job, const AttentionShare& share, void* memory) {
  const size_t columns = job.history + job.tokens;
  const AttentionScratch s(job, (share.last_head - share.first_head) * (share.last - share.first), memory);
  std::memset(s.zeros, 0, job.head_dim * sizeof(float));
  const size_t row_bytes = columns * static_cast<size_t>(bits_of(job.type)) / 8;
  widen(job.type, static_cast<const uint8_t*>(job.mask) + share.first * row_bytes, (share.last - share.first) * columns, s.mask);
  const auto blind = [&](size_t token) { return !sees_any(s.mask + (token - share.first) * columns, columns); };
  for (size_t first = share.first, last; first < share.last; first = last) {
    const bool none = blind(first);
    for (last = first + 1; last < share.last && blind(last) == none; ++last) {
    }
    attend_alike(job, {share.kv_head, share.first_head, share.last_head, first, last}, s.mask + (first - share.first) * columns, none, s);
  }
}

}  // namespace
}  // namespace axc
