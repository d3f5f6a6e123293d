// Grouped-query attention that reads keys and values where the cache has them, and only those that some row sees.
//
// What a token gets does not depend on the tokens beside it: scores are sums over a head's columns in order, values are
// added key by key in order, and in the sums of exponentials a key's lane is its position modulo kLanes. A key that is
// hidden adds exactly 0 everywhere.
#pragma once

#include <algorithm>

#include "attention_in_place.h"
#include "rows.h"

namespace axc {
namespace {

constexpr size_t padded(size_t n, size_t step) { return (n + step - 1) / step * step; }

struct AttentionScratch {
  float *panel, *wide, *q, *scores, *out, *mask, *bias, *inverse, *zeros;
  uint32_t* seen;
  uint8_t* whole;
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
    whole = reinterpret_cast<uint8_t*>(take(columns / kLanes));
    bytes = at - start;
  }
};

inline size_t attention_scratch(const AttentionJob& job, size_t rows) { return AttentionScratch(job, rows, nullptr).bytes; }

// A cache and the current rows behind it: keys or values.
struct Cached {
  const void *cache, *current;
};

// A key or value row of one head.
inline const void* cached_row(const AttentionJob& job, Cached of, size_t row, size_t kv_head) {
  const size_t width = job.kv_heads * job.head_dim;
  const bool past = row < job.history;
  const size_t element = (past ? row : row - job.history) * width + kv_head * job.head_dim;
  return static_cast<const uint8_t*>(past ? of.cache : of.current) + element * static_cast<size_t>(bits_of(job.type)) / 8;
}

inline void prefetch(const void* row, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const uint8_t*>(row) + at);
}

constexpr float kHidden = -3.0e38f;
constexpr uint32_t kNone = UINT32_MAX;  // in a list of columns: a place that holds none

inline bool any_of(Vi lanes) {
  int32_t any = 0;
  for (size_t i = 0; i < kWidth; ++i) any |= lanes[i];
  return any;
}

// Whether a row of a mask sees some of `columns`: the last is looked at first, it is seen most often.
inline bool sees_some(const float* mask, size_t columns) {
  if (columns && mask[columns - 1] > kMasked) return true;
  Vi seen{};
  size_t j = 0;
  for (; j + kWidth <= columns; j += kWidth) seen |= load(mask + j) > all(kMasked);
  for (; j < columns; ++j) {
    if (mask[j] > kMasked) return true;
  }
  return any_of(seen);
}

// Whether some of `tokens` rows of a mask see each of the kLanes columns from `first` on.
inline bool sees_all(const float* mask, size_t tokens, size_t columns, size_t first) {
  Vi hidden[kLanes / kWidth];
  repeat<kLanes / kWidth>([&](auto v) AXC_INLINE { hidden[v] = ~Vi{}; });
  for (size_t t = tokens; t--;) {  // the last sees most
    Vi any{};
    repeat<kLanes / kWidth>([&](auto v) AXC_INLINE {
      hidden[v] &= load(mask + t * columns + first + v * kWidth) <= all(kMasked);
      any |= hidden[v];
    });
    if (!any_of(any)) return true;
  }
  return false;
}

// Lists the columns that some of `tokens` rows of a mask see, in kLanes consecutive positions at a time, without those
// that hold nothing seen; returns the length of the list. The positions of cached columns are their numbers, those of the
// current ones begin at job.past. whole[i]: places [kLanes i, kLanes (i + 1)) of the list hold consecutive cached columns.
inline size_t visible(const AttentionJob& job, const float* mask, size_t tokens, uint32_t* seen, uint8_t* whole) {
  const size_t columns = job.history + job.tokens;
  const auto wanted = [&](size_t column) {
    for (size_t t = tokens; t--;) {
      if (mask[t * columns + column] > kMasked) return true;
    }
    return false;
  };
  size_t past = job.past;
  for (size_t t = tokens; t-- && past < job.history;) {
    if (sees_some(mask + t * columns + past, job.history - past)) past = job.history;  // no causal mask
  }
  const size_t positions = past + job.tokens;
  size_t count = 0, end = 0;
  for (size_t first = 0; first < positions; first += kLanes) {
    whole[count / kLanes] = first + kLanes <= past && sees_all(mask, tokens, columns, first);
    if (whole[count / kLanes]) {
      for (size_t i = 0; i < kLanes; ++i) seen[count + i] = static_cast<uint32_t>(first + i);
      end = count += kLanes;
      continue;
    }
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

// What is added to a token's scores with the kPanel keys from `first` on; kHidden for what it does not see.
inline void biases(const float* mask, float threshold, const AttentionScratch& s, size_t first, size_t count) {
  for (size_t j = 0; j < kPanel; j += kWidth) {
    const uint32_t* seen = s.seen + first + j;
    if (first + j < count && s.whole[(first + j) / kLanes]) {
      const Vf m = load(mask + seen[0]);
      store(s.bias + j, m > all(threshold) ? m : all(kHidden));
      continue;
    }
    for (size_t i = 0; i < kWidth; ++i) {
      const bool there = first + j + i < count && seen[i] != kNone && mask[seen[i]] > threshold;
      s.bias[j + i] = there ? mask[seen[i]] : kHidden;
    }
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

static_assert(kPanel % (2 * kWidth) == 0);

// Columns of kPanel rows of 16-bit floats become rows of kPanel, widened: two columns are transposed as one word.
inline void transpose_halves(Type type, size_t columns, RowsOf rows, float* panel) {
  for (size_t i = 0; i < columns; i += 2 * kWidth) {
    const size_t count = least(2 * kWidth, columns - i);
    for (size_t j = 0; j < kPanel; j += kWidth) {
      Vf words[kWidth];
      if (count == 2 * kWidth) {
        transpose_words([&](size_t r) AXC_INLINE { return rows[j + r] + 2 * i; }, words);
      } else {
        repeat<kWidth>([&](auto r) AXC_INLINE {
          words[r] = Vf{};
          std::memcpy(&words[r], rows[j + r] + 2 * i, 2 * count);
        });
        transpose(words);
      }
      repeat<kWidth>([&](auto r) AXC_INLINE {
        const auto [even, odd] = both_halves(type, std::bit_cast<Vu>(words[r]));
        store(panel + (i + 2 * r) * kPanel + j, even);
        if (2 * r + 1 < count) store(panel + (i + 2 * r + 1) * kPanel + j, odd);
      });
    }
  }
}

// Keys become columns of a panel; `wide` is room for them as float32.
inline void pack_keys(Type type, size_t dim, RowsOf keys, float* wide, float* panel) {
  if (type == Type::Float16 || type == Type::BFloat16) return transpose_halves(type, dim, keys, panel);
  const size_t depth = padded(dim, kPanel);
  for (size_t j = 0; j < kPanel; ++j) widen(type, keys[j], dim, wide + j * depth);
  transpose_panel(dim, panel, [&](size_t j, size_t i) AXC_INLINE { return load(wide + j * depth + i); });
}

// Addresses of the rows at kPanel places from `first` on, zeros where there is none.
inline void addresses(const AttentionJob& job, const AttentionScratch& s, Cached of, size_t kv_head, size_t first, size_t count,
                      const uint8_t** rows) {
  const size_t stride = job.kv_heads * job.head_dim * static_cast<size_t>(bits_of(job.type)) / 8;
  for (size_t j = 0; j < kPanel; j += kWidth) {
    const uint32_t* seen = s.seen + first + j;
    if (first + j < count && s.whole[(first + j) / kLanes]) {
      const uint8_t* row = static_cast<const uint8_t*>(cached_row(job, of, seen[0], kv_head));
      for (size_t i = 0; i < kWidth; ++i) rows[j + i] = row + i * stride;
      continue;
    }
    for (size_t i = 0; i < kWidth; ++i) {
      const bool there = first + j + i < count && seen[i] != kNone;
      rows[j + i] = static_cast<const uint8_t*>(there ? cached_row(job, of, seen[i], kv_head) : s.zeros);
    }
  }
}

// Caps scores and adds the mask: of `rows` rows with kPanel keys.
inline void finish_scores(const AttentionJob& job, const AttentionScratch& s, const float* mask, float threshold, size_t heads,
                          size_t tokens, size_t first, size_t count, size_t width) {
  float* scores = s.scores + first;
  for (size_t t = 0; t < tokens; ++t) {
    biases(mask + t * (job.history + job.tokens), threshold, s, first, count);
    for (size_t h = 0; h < heads; ++h, scores += width) {
      if (job.softcap > 0) cap_scores(job.softcap, scores);
      add_biases(s.bias, scores);
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
  const Cached k{job.k_cache, job.k_current}, v{job.v_cache, job.v_current};
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t h = 0; h < heads; ++h) {
      const float* q = job.q + (share.first + t) * q_width + (share.first_head + h) * dim;
      for (size_t i = 0; i < dim; ++i) s.q[(t * heads + h) * dim + i] = q[i] * job.scale;
    }
  }
  size_t count = columns;
  if (blind) {
    for (size_t j = 0; j < columns; ++j) s.seen[j] = static_cast<uint32_t>(j);
    std::memset(s.whole, 0, padded(columns, kLanes) / kLanes);
  } else {
    count = visible(job, mask, tokens, s.seen, s.whole);
  }
  const size_t width = padded(count, kPanel);
  const InPlaceAttention* in_place = in_place_attention(job.type, rows, dim);
  // Rows of a head lie apart, and the weights read between two tokens have evicted them from the caches: those of the next
  // panel are prefetched.
  const uint8_t *addressed[2][kPanel], **own = addressed[0], **next = addressed[1];
  const auto advance = [&](Cached of, size_t first) {
    std::swap(own, next);
    first < count ? addresses(job, s, of, share.kv_head, first, count, next) : addresses(job, s, v, share.kv_head, 0, count, next);
  };

  advance(k, 0);
  for (size_t first = 0; first < count; first += kPanel) {
    advance(k, first + kPanel);
    if (in_place) {
      in_place->scores(own, next, dim, s.q, s.scores + first, width);
    } else {
      for (size_t j = 0; j < kPanel; ++j) prefetch(next[j], row_bytes);
      pack_keys(job.type, dim, own, s.wide, s.panel);
      for (size_t r = 0; r < rows; ++r) std::memset(s.scores + r * width + first, 0, kPanel * sizeof(float));
      float_rows(s.panel, kPanel, s.q, dim, rows, dim, s.scores + first, width, [] {});
    }
    finish_scores(job, s, mask, threshold, heads, tokens, first, count, width);
  }

  for (size_t r = 0; r < rows; ++r) s.inverse[r] = exponentials(s.scores + r * width, width, s.scores + r * width);
  std::memset(s.out, 0, rows * depth * sizeof(float));
  for (size_t first = 0; first < count; first += kPanel) {
    const size_t keys = least(kPanel, count - first);
    advance(v, first + kPanel);
    if (in_place) {
      in_place->values(own, next, keys, dim, s.scores + first, width, s.out);
      continue;
    }
    for (size_t j = 0; j < keys; ++j) {
      float* row = s.panel + j * depth;
      prefetch(next[j], row_bytes);
      widen(job.type, own[j], dim, row);
      for (size_t i = dim; i < depth; ++i) row[i] = 0;
    }
    for (size_t i = 0; i < depth; i += kPanel) {
      float_rows(s.panel + i, depth, s.scores + first, width, rows, keys, s.out + i, depth, [] {});
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    float* y = job.y + (share.first + r / heads) * q_width + (share.first_head + r % heads) * dim;
    if (in_place) {
      in_place->outputs(s.out + r * dim, dim, s.inverse[r], y);
    } else {
      for (size_t i = 0; i < dim; ++i) y[i] = s.out[r * depth + i] * s.inverse[r];
    }
  }
}

inline void attend(const AttentionJob& job, const AttentionShare& share, void* memory) {
  const size_t columns = job.history + job.tokens;
  const AttentionScratch s(job, (share.last_head - share.first_head) * (share.last - share.first), memory);
  std::memset(s.zeros, 0, job.head_dim * sizeof(float));
  const size_t row_bytes = columns * static_cast<size_t>(bits_of(job.type)) / 8;
  widen(job.type, static_cast<const uint8_t*>(job.mask) + share.first * row_bytes, (share.last - share.first) * columns, s.mask);
  const auto blind = [&](size_t token) { return !sees_some(s.mask + (token - share.first) * columns, columns); };
  for (size_t first = share.first, last; first < share.last; first = last) {
    const bool none = blind(first);
    for (last = first + 1; last < share.last && blind(last) == none; ++last) {
    }
    attend_alike(job, {share.kv_head, share.first_head, share.last_head, first, last}, s.mask + (first - share.first) * columns, none, s);
  }
}

}  // namespace
}  // namespace axc
