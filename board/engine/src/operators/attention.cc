// https://onnx.ai/onnx/operators/onnx__Attention.html in opset 23, with the soft cap before the mask. Computes one query
// row at a time, with the scores of all keys in memory.
#include <cmath>
#include <limits>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

constexpr int64_t kScores = 0, kCappedScores = 1, kMaskedScores = 2, kProbabilities = 3;  // qk_matmul_output_mode

// Heads of q, k or v: [batch, tokens, heads * width] or [batch, heads, tokens, width].
struct Heads {
  const View& view;
  size_t heads, tokens, width;

  Heads(const View& view, size_t given) : view(view) {
    const bool flat = view.rank == 3;
    heads = flat ? given : view.dims[1];
    tokens = flat ? view.dims[1] : view.dims[2];
    width = flat ? view.dims[2] / given : view.dims[3];
  }
  size_t at(size_t batch, size_t head, size_t token) const {
    return view.rank == 3 ? ((batch * tokens + token) * heads + head) * width
                          : ((batch * heads + head) * tokens + token) * width;
  }
};

// Keys or values: the past ones, then the current ones.
struct Cached {
  Heads current;
  const View* past;  // [batch, heads, tokens, width] or null

  size_t history() const { return past ? past->dims[2] : 0; }
  size_t tokens() const { return history() + current.tokens; }
  void load(const Kernels& kernels, size_t batch, size_t head, size_t token, float* to) const {
    const bool old = token < history();
    const View& view = old ? *past : current.view;
    const size_t at = old ? ((batch * current.heads + head) * history() + token) * current.width
                          : current.at(batch, head, token - history());
    kernels.widen(view.type, view.data + at * view.element(), current.width, to);
  }
  // present_key or present_value: [batch, heads, tokens, width]
  void keep(size_t batches, const View& y) const {
    const size_t row = current.width * y.element();
    for (size_t i = 0; i < batches * current.heads * tokens() && row; ++i) {
      const size_t token = i % tokens(), head = i / tokens() % current.heads, batch = i / tokens() / current.heads;
      const bool old = token < history();
      const uint8_t* from = old ? past->data + ((batch * current.heads + head) * history() + token) * row
                                : current.view.data + current.at(batch, head, token - history()) * y.element();
      std::memcpy(y.data + i * row, from, row);
    }
  }
};

// Eight partial sums: a single one would wait for each addition.
float dot(const float* a, const float* b, size_t count) {
  float sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (size_t j = 0; i + j < count; ++j) sums[j] += a[i + j] * b[i + j];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

}  // namespace

void infer_attention(Infer& infer) {
  const Operation& operation = infer.operation;
  const Type type = infer.type(0);
  const Shape &q = infer.shape(0), &k = infer.shape(1), &v = infer.shape(2);
  infer.expect(is_float(type) && infer.type(1) == type && is_float(infer.type(2)), "types");
  infer.expect((q.size() == 3 || q.size() == 4) && k.size() == q.size() && v.size() == q.size(), "ranks");
  const bool flat = q.size() == 3;
  const int64_t q_given = operation.integer("q_num_heads", 0), kv_given = operation.integer("kv_num_heads", 0);
  const auto heads_of = [&](const Shape& shape, int64_t given) {
    const Dim& last = shape.back();
    infer.expect(last.constant() && last.fixed > 0, "heads");
    if (!flat) {
      infer.expect(shape[1].constant() && shape[1].fixed > 0, "heads");
      return shape[1].fixed;
    }
    infer.expect(given > 0 && given <= last.fixed && last.fixed % given == 0, "heads");
    return given;
  };
  const int64_t heads = heads_of(q, q_given), kv_heads = heads_of(k, kv_given);
  infer.expect(heads_of(v, kv_given) == kv_heads && heads % kv_heads == 0, "heads");
  const auto width_of = [&](const Shape& shape, int64_t count) { return flat ? shape[2].fixed / count : shape[3].fixed; };
  const int64_t width = width_of(q, heads), v_width = width_of(v, kv_heads);
  const size_t token_axis = flat ? 1 : 2;
  const Dim tokens = q[token_axis], current = k[token_axis];
  infer.expect(width_of(k, kv_heads) == width && v[token_axis] == current && k[0] == q[0] && v[0] == q[0],
               "shapes " + text_of(q) + ", " + text_of(k) + ", " + text_of(v));
  Dim keys = current;
  infer.expect(infer.has(4) == infer.has(5), "a past without the other");
  if (infer.has(4)) {
    const Shape &past_k = infer.shape(4), &past_v = infer.shape(5);
    infer.expect(infer.type(4) == infer.type(1) && infer.type(5) == infer.type(2), "types of the past");
    infer.expect(past_k.size() == 4 && past_k == Shape{q[0], Dim{kv_heads}, past_k[2], Dim{width}}, "past " + text_of(past_k));
    infer.expect(past_v == Shape{q[0], Dim{kv_heads}, past_k[2], Dim{v_width}}, "past " + text_of(past_v));
    keys = keys + past_k[2];
  }
  if (infer.has(3)) {
    const Shape& mask = infer.shape(3);
    infer.expect(is_float(infer.type(3)) || infer.type(3) == Type::Bool, "type of the mask");
    infer.expect(mask.size() >= 2 && mask.size() <= 4, "mask " + text_of(mask));
    const Shape whole{q[0], Dim{heads}, tokens, keys};
    Shape last = mask;  // keys beyond a shorter mask are masked
    const bool shorter = mask.back().constant() && keys.constant() && mask.back().fixed < keys.fixed && mask.back().fixed > 1;
    if (shorter) last.back() = keys;
    infer.expect(broadcast(infer, last, whole) == whole, "mask " + text_of(mask) + " for " + text_of(whole));
  }
  const int64_t mode = operation.integer("qk_matmul_output_mode", 0), precision = operation.integer("softmax_precision", 1);
  infer.expect(mode >= 0 && mode <= 3, "qk_matmul_output_mode");
  infer.expect(is_float(static_cast<Type>(precision)), "softmax_precision");
  infer.expect(operation.real("softcap", 0) >= 0, "softcap");
  Shape y = flat ? Shape{q[0], tokens, Dim{heads * v_width}} : Shape{q[0], Dim{heads}, tokens, Dim{v_width}};
  infer.out(type, y);
  infer.out(infer.type(1), {q[0], Dim{kv_heads}, keys, Dim{width}});
  infer.out(infer.type(2), {q[0], Dim{kv_heads}, keys, Dim{v_width}});
  infer.out(type, {q[0], Dim{heads}, tokens, keys});
}

void run_attention(const Call& call) {
  const Operation& operation = call.operation;
  const size_t kv_given = static_cast<size_t>(operation.integer("kv_num_heads", 1));
  const Heads q(call.in[0], static_cast<size_t>(operation.integer("q_num_heads", 1)));
  const Cached k{Heads(call.in[1], kv_given), call.has(4) ? &call.in[4] : nullptr};
  const Cached v{Heads(call.in[2], kv_given), call.has(5) ? &call.in[5] : nullptr};
  const size_t batches = call.in[0].dims[0], keys = k.tokens(), group = q.heads / k.current.heads;
  const float scale = operation.real("scale", 1.0f / std::sqrt(static_cast<float>(q.width)));
  const float cap = operation.real("softcap", 0);
  const bool causal = operation.integer("is_causal", 0) != 0;
  const int64_t mode = operation.integer("qk_matmul_output_mode", 0);
  const View* mask = call.has(3) ? &call.in[3] : nullptr;
  const View& y = call.out[0];
  const auto shown = [&](int64_t wanted, size_t row, const float* scores) {
    if (!call.gives(3) || mode != wanted) return;
    const View& out = call.out[3];
    call.kernels.narrow(out.type, scores, keys, out.data + row * keys * out.element());
  };
  const auto add_mask = [&](size_t batch, size_t head, size_t token, float* scores) {
    if (!mask) return;
    const size_t columns = mask->dims[mask->rank - 1];
    const std::array<size_t, 3> index{batch, head, token};
    size_t at = 0;
    for (size_t axis = 0; axis + 1 < mask->rank; ++axis) {
      const size_t length = mask->dims[axis];
      at = at * length + (length == 1 ? 0 : index[axis + 4 - mask->rank]);
    }
    for (size_t j = 0; j < keys; ++j) {
      const bool there = j < columns || columns == 1;
      const size_t element = at * columns + (columns == 1 ? 0 : j);
      if (!there) {
        scores[j] = -std::numeric_limits<float>::infinity();
      } else if (mask->type == Type::Bool) {
        if (!mask->data[element]) scores[j] = -std::numeric_limits<float>::infinity();
      } else {
        float added = 0;
        call.kernels.widen(mask->type, mask->data + element * mask->element(), 1, &added);
        scores[j] += added;
      }
    }
  };
  const size_t depth = std::max(q.width, v.current.width);
  const auto scratch = call.scratch<float>(keys + 3 * depth);
  const size_t rows = batches * q.heads * q.tokens;
  call.each(rows, kPiece / std::max<size_t>(keys * depth, 1), [&](size_t first, size_t last, size_t thread) {
    float *scores = scratch(thread), *query = scores + keys, *row = query + depth, *sum = row + depth;
    for (size_t item = first; item < last; ++item) {
      const size_t token = item % q.tokens, head = item / q.tokens % q.heads, batch = item / q.tokens / q.heads;
      const View& from = q.view;
      call.kernels.widen(from.type, from.data + q.at(batch, head, token) * from.element(), q.width, query);
      for (size_t j = 0; j < keys; ++j) {
        k.load(call.kernels, batch, head / group, j, row);
        scores[j] = dot(query, row, q.width) * scale;
      }
      shown(kScores, item, scores);
      if (cap > 0) {
        for (size_t j = 0; j < keys; ++j) scores[j] = scores[j] / cap;
        call.kernels.tanh(scores, keys, scores);
        for (size_t j = 0; j < keys; ++j) scores[j] *= cap;
      }
      shown(kCappedScores, item, scores);
      add_mask(batch, head, token, scores);
      if (causal) {
        for (size_t j = token + k.history() + 1; j < keys; ++j) scores[j] = -std::numeric_limits<float>::infinity();
      }
      shown(kMaskedScores, item, scores);
      // a row whose keys are all masked is zero
      bool sees = false;
      for (size_t j = 0; j < keys && !sees; ++j) sees = scores[j] != -std::numeric_limits<float>::infinity();
      if (sees) {
        call.kernels.softmax(scores, keys, scores);
      } else {
        std::memset(scores, 0, keys * sizeof(float));
      }
      shown(kProbabilities, item, scores);
      std::memset(sum, 0, v.current.width * sizeof(float));
      for (size_t j = 0; j < keys; ++j) {
        if (scores[j] == 0) continue;
        v.load(call.kernels, batch, head / group, j, row);
        for (size_t i = 0; i < v.current.width; ++i) sum[i] += scores[j] * row[i];
      }
      const size_t at = y.rank == 3 ? ((batch * q.tokens + token) * q.heads + head) * v.current.width
                                    : item * v.current.width;
      call.kernels.narrow(y.type, sum, v.current.width, y.data + at * y.element());
    }
  });
  if (call.gives(1)) k.keep(batches, call.out[1]);
  if (call.gives(2)) v.keep(batches, call.out[2]);
}

}  // namespace axc
