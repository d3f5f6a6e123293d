// https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html
#include "rotary.h"

#include "elements.h"
#include "operators.h"

namespace axc {

void infer_rotary(Infer& infer) {
  const Type type = infer.type(0);
  infer.expect(is_float(type) && infer.type(1) == type && infer.type(2) == type, "types");
  const Shape &shape = infer.shape(0), &cos = infer.shape(1);
  infer.expect(shape.size() == 3 || shape.size() == 4, "rank " + std::to_string(shape.size()));
  infer.expect(cos == infer.shape(2) && !cos.empty() && cos.back().constant(), "tables");
  const int64_t given = infer.operation.integer("num_heads", 0), partial = infer.operation.integer("rotary_embedding_dim", 0);
  const Dim tokens = shape[shape.size() - 2], last = shape.back();
  infer.expect(last.constant() && last.fixed > 0, "heads");
  int64_t head_dim = last.fixed;
  const Dim length = shape.size() == 3 ? shape[1] : tokens;
  if (shape.size() == 3) {
    infer.expect(given > 0 && given <= last.fixed && last.fixed % given == 0, "num_heads");
    head_dim = last.fixed / given;
  } else {
    infer.expect(shape[1].constant() && shape[1].fixed > 0 && (given == 0 || given == shape[1].fixed), "heads");
  }
  const int64_t rotated = partial ? partial : head_dim;
  infer.expect(rotated > 0 && rotated <= head_dim && rotated % 2 == 0, "rotary_embedding_dim");
  infer.expect(cos.back() == Dim{rotated / 2}, "tables " + text_of(cos) + " for heads of " + std::to_string(rotated));
  if (infer.has(3)) {
    infer.expect(infer.type(3) == Type::Int64 && infer.shape(3) == Shape{shape[0], length}, "positions");
    infer.expect(cos.size() == 2 && cos[0].constant() && cos[0].fixed > 0, "tables " + text_of(cos));
  } else {
    infer.expect(cos == Shape{shape[0], length, cos.back()}, "tables " + text_of(cos) + " for " + text_of(shape));
  }
  infer.out(type, shape);
}

void run_rotary(const Call& call) {
  const View &x = call.in[0], &cos = call.in[1], &sin = call.in[2], &y = call.out[0];
  const bool flat = x.rank == 3;  // [batch, tokens, heads * head_dim], else [batch, heads, tokens, head_dim]
  const size_t heads = flat ? static_cast<size_t>(call.operation.integer("num_heads", 1)) : x.dims[1];
  const size_t tokens = flat ? x.dims[1] : x.dims[2], head_dim = x.dims[x.rank - 1] / (flat ? heads : 1);
  const size_t half = cos.dims[cos.rank - 1], rows = x.dims[0] * tokens;
  const Rotation rotation{1, head_dim, half, call.operation.integer("interleaved", 0) != 0};
  const auto position = [&](size_t row) -> uint64_t {
    if (!call.has(3)) return row;
    uint64_t at = 0;
    std::memcpy(&at, call.in[3].data + 8 * row, 8);
    return at;
  };
  for (size_t row = 0; call.has(3) && row < rows; ++row) check_position(position(row), cos.dims[0]);
  const bool wide = x.type == Type::Float;
  const auto scratch = call.scratch<float>(wide ? 0 : 2 * half + 2 * head_dim);
  call.each(rows, kPiece / (heads * head_dim), [&](size_t first, size_t last, size_t thread) {
    for (size_t row = first; row < last; ++row) {
      const size_t at = static_cast<size_t>(position(row)) * half;
      const float *c = cos.floats() + at, *s = sin.floats() + at;
      if (!wide) {
        float* tables = scratch(thread);
        call.kernels.widen(x.type, cos.data + at * x.element(), half, tables);
        call.kernels.widen(x.type, sin.data + at * x.element(), half, tables + half);
        c = tables, s = tables + half;
      }
      for (size_t head = 0; head < heads; ++head) {
        const size_t start =
            (flat ? row * heads + head : (row / tokens * heads + head) * tokens + row % tokens) * head_dim;
        if (wide) {
          rotate(call.kernels, rotation, x.floats() + start, c, s, y.floats() + start);
          continue;
        }
        float *from = scratch(thread) + 2 * half, *to = from + head_dim;
        call.kernels.widen(x.type, x.data + start * x.element(), head_dim, from);
        rotate(call.kernels, rotation, from, c, s, to);
        call.kernels.narrow(y.type, to, head_dim, y.data + start * y.element());
      }
    }
  });
}

}  // namespace axc
