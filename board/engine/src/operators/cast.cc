// Cast, and DequantizeLinear.
#include <cmath>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

bool is_float8(Type type) { return type == Type::Float8E4M3 || type == Type::Float8E5M2; }
bool is_half_byte(Type type) { return type == Type::Int4 || type == Type::Uint4; }
bool is_level(Type type) { return type == Type::Int8 || type == Type::Uint8 || type == Type::Int32 || is_half_byte(type); }

// Truncates towards zero. Out-of-range values become the lowest of the type: undefined in the standard, usual in hardware.
int64_t truncated(float x, Type to) {
  constexpr float kPast64 = 9223372036854775808.0f;
  const int64_t wide = x >= -kPast64 && x < kPast64 ? static_cast<int64_t>(x) : INT64_MIN;
  if (to == Type::Int32 && (wide < INT32_MIN || wide > INT32_MAX)) return INT32_MIN;
  return wide;
}

// Reads consecutive levels; 4-bit levels are packed two per byte.
void load_levels(const View& x, size_t offset, size_t count, int32_t* to) {
  for (size_t i = 0; i < count; ++i) {
    const size_t at = offset + i;
    if (is_half_byte(x.type)) {
      const int32_t level = x.data[at / 2] >> (at % 2 * 4) & 15;
      to[i] = x.type == Type::Int4 && level > 7 ? level - 16 : level;
    } else if (x.type == Type::Int32) {
      std::memcpy(to + i, x.data + 4 * at, 4);
    } else {
      to[i] = x.type == Type::Int8 ? static_cast<int8_t>(x.data[at]) : x.data[at];
    }
  }
}

}  // namespace

void infer_cast(Infer& infer) {
  const Type from = infer.type(0), to = static_cast<Type>(infer.operation.integer("to", 0));
  const bool reads = is_float(from) || is_integer(from) || from == Type::Bool || is_float8(from) || is_half_byte(from);
  infer.expect(reads && (is_float(to) || is_integer(to) || to == Type::Bool), "from " + name_of(from) + " to " + name_of(to));
  const bool kept = is_integer(from) && to == Type::Int64;
  infer.out(to, infer.shape(0), kept ? infer.in(0).known : std::nullopt);
}

void run_cast(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  const bool floats = is_float(x.type) || is_float8(x.type);
  call.each((y.count() + kRun - 1) / kRun, kPiece / kRun, [&](size_t begin, size_t end, size_t) {
    for (size_t run = begin; run < end; ++run) {
      const size_t first = run * kRun, count = std::min(kRun, y.count() - first);
      float wide[kRun];
      int64_t whole[kRun];
      if (floats) {
        const bool straight = y.type == Type::Float && x.type != Type::Float;
        const float* from = load_run(call.kernels, x, first, 1, count, straight ? y.floats() + first : wide);
        if (is_float(y.type)) {
          store_run(call.kernels, y, first, count, from);
          continue;
        }
        for (size_t i = 0; i < count; ++i) whole[i] = y.type == Type::Bool ? from[i] != 0 : truncated(from[i], y.type);
        store_run<int64_t>(call.kernels, y, first, count, whole);
        continue;
      }
      const int64_t* from = whole;
      if (is_half_byte(x.type)) {
        int32_t levels[kRun];
        load_levels(x, first, count, levels);
        std::copy(levels, levels + count, whole);
      } else {
        from = load_run(call.kernels, x, first, 1, count, whole);
      }
      if (is_float(y.type)) {
        for (size_t i = 0; i < count; ++i) wide[i] = static_cast<float>(from[i]);
        store_run<float>(call.kernels, y, first, count, wide);
      } else {
        for (size_t i = 0; i < count; ++i) whole[i] = y.type == Type::Bool ? from[i] != 0 : from[i];
        store_run<int64_t>(call.kernels, y, first, count, whole);
      }
    }
  });
}

// https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html : one scale, one per index of an axis, or one per block
// along it
void infer_dequantize(Infer& infer) {
  const Type from = infer.type(0), scale = infer.type(1);
  const int64_t to = infer.operation.integer("output_dtype", 0), block = infer.operation.integer("block_size", 0);
  infer.expect((is_level(from) || is_float8(from)) && is_float(scale), "types");
  infer.expect(to == 0 || is_float(static_cast<Type>(to)), "output_dtype");
  const Shape &shape = infer.shape(0), &scales = infer.shape(1);
  const auto single = [](const Shape& shape) { return shape.empty() || shape == Shape{Dim{1}}; };
  const bool one = single(scales);
  if (infer.has(2)) {
    const bool fits = infer.shape(2) == scales || (one && single(infer.shape(2)));
    infer.expect(infer.type(2) == from && fits, "zero points");
  }
  if (block || !one) {
    const size_t axis = infer.axis("axis", 1, shape.size());
    if (block) {
      infer.expect(block > 0 && scales.size() == shape.size(), "scales");
      for (size_t i = 0; i < shape.size(); ++i) {
        Dim blocks = shape[i];
        if (i == axis) {
          infer.expect(blocks.constant(), "blocks");
          blocks.fixed = (blocks.fixed + block - 1) / block;
        }
        infer.expect(scales[i] == blocks, "scales " + text_of(scales) + " of " + text_of(shape));
      }
    } else {
      infer.expect(scales == Shape{shape[axis]}, "scales " + text_of(scales) + " of " + text_of(shape));
    }
  }
  infer.out(to ? static_cast<Type>(to) : scale, shape);
}

void run_dequantize(const Call& call) {
  const View &x = call.in[0], &scales = call.in[1], &y = call.out[0];
  const bool one = scales.count() == 1 && scales.rank <= 1;
  const size_t block = static_cast<size_t>(call.operation.integer("block_size", 0));
  // x is [outer, length, inner]; a scale covers `step` indices of the axis and, with blocks, one inner index
  size_t length = 1, inner = x.count(), step = 1, blocks = 1;
  if (!one || block) {
    const size_t axis = call.axis("axis", 1, x.rank);
    length = x.dims[axis], inner = x.product(axis + 1, x.rank);
    step = block ? block : 1, blocks = block ? scales.dims[axis] : length;
  }
  if (!y.count()) return;
  const size_t outer = x.count() / (length * inner);
  const size_t inner_runs = (inner + kRun - 1) / kRun;
  call.each(outer * length * inner_runs, kPiece / std::min(inner, kRun), [&](size_t begin, size_t end, size_t) {
    for (size_t item = begin; item < end; ++item) {
      const size_t row = item / inner_runs, start = item % inner_runs * kRun, count = std::min(kRun, inner - start);
      const size_t first = row * inner + start, at = row % length / step;
      int32_t levels[kRun], zeros[kRun] = {};
      float wide[kRun], factors[kRun];
      const size_t scale = block ? (row / length * blocks + at) * inner + start : at, many = block ? count : 1;
      const float* factor = load_run(call.kernels, scales, scale, 1, many, factors);
      if (is_float8(x.type)) {
        call.kernels.widen(x.type, x.data + first, count, wide);
        if (call.has(2)) {
          float zero[kRun];
          call.kernels.widen(x.type, call.in[2].data + scale, many, zero);
          for (size_t i = 0; i < count; ++i) wide[i] -= zero[block ? i : 0];
        }
      } else {
        load_levels(x, first, count, levels);
        if (call.has(2)) load_levels(call.in[2], scale, many, zeros);
        for (size_t i = 0; i < count; ++i) {
          wide[i] = static_cast<float>(int64_t{levels[i]} - zeros[block ? i : 0]);
        }
      }
      for (size_t i = 0; i < count; ++i) wide[i] *= factor[block ? i : 0];
      store_run<float>(call.kernels, y, first, count, wide);
    }
  });
}

}  // namespace axc
