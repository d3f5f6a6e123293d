// Norms over the last dimensions, and Softmax along any.
#include <cmath>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

// Checks a norm and returns its axis, the first of the normalised dimensions.
size_t infer_norm(Infer& infer) {
  const Type type = infer.type(0);
  infer.expect(is_float(type), "type " + name_of(type));
  infer.expect(infer.operation.integer("stash_type", 1) == 1, "stash_type");
  const Shape& shape = infer.shape(0);
  const size_t axis = infer.axis("axis", -1, shape.size());
  const Shape normalized(shape.begin() + static_cast<int64_t>(axis), shape.end());
  for (size_t i = 1; i < infer.inputs(); ++i) {
    if (!infer.has(i)) continue;
    infer.expect(infer.type(i) == type && broadcast(infer, infer.shape(i), normalized) == normalized,
                 "a scale or bias " + text_of(infer.shape(i)) + " for " + text_of(normalized));
  }
  return axis;
}

// The elements of a scale or bias as float32 rows: in place if they already are, else in `buffer`.
const float* widened(const Call& call, const View& x, const View& row, float* buffer) {
  if (x.type == Type::Float && x.count() == row.count()) return x.floats();
  View y = row;
  y.type = Type::Float, y.data = reinterpret_cast<uint8_t*>(buffer);
  const Walk<1> walk(y, {&x});
  walk.each(call, [&](size_t first, const auto& offsets, size_t count) {
    float wide[kRun];
    const float* from = load_run(call.kernels, x, offsets[0], walk.stride(0), count, wide);
    std::memcpy(buffer + first, from, count * sizeof(float));
  });
  return buffer;
}

// Calls body(row index, x, y) for each row as float32; other types are converted before and after.
template <class Body>
void each_row(const Call& call, size_t axis, const Body& body) {
  const View &x = call.in[0], &y = call.out[0];
  const size_t width = x.product(axis, x.rank), rows = x.product(0, axis);
  if (!width || !rows) return;
  View row;
  row.rank = x.rank - axis;
  for (size_t i = 0; i < row.rank; ++i) row.dims[i] = x.dims[axis + i];
  const bool wide = x.type == Type::Float;
  // The first thread's memory holds scale and bias for all.
  const auto scratch = call.scratch<float>(4 * width);
  const float* scale = call.has(1) ? widened(call, call.in[1], row, scratch(0)) : nullptr;
  const float* bias = call.has(2) ? widened(call, call.in[2], row, scratch(0) + width) : nullptr;
  call.each(rows, kPiece / width, [&](size_t first, size_t last, size_t thread) {
    float* own = scratch(thread) + 2 * width;
    for (size_t i = first; i < last; ++i) {
      if (wide) {
        body(i, width, x.floats() + i * width, scale, bias, y.floats() + i * width);
        continue;
      }
      call.kernels.widen(x.type, x.data + i * width * x.element(), width, own);
      body(i, width, own, scale, bias, own + width);
      call.kernels.narrow(y.type, own + width, width, y.data + i * width * y.element());
    }
  });
}

}  // namespace

void infer_rms_norm(Infer& infer) {
  infer_norm(infer);
  infer.out(infer.type(0), infer.shape(0));
}

void run_rms_norm(const Call& call) {
  const float epsilon = call.operation.real("epsilon", 1e-5f);
  each_row(call, call.axis("axis", -1, call.in[0].rank), [&](size_t, size_t width, const float* x, const float* scale,
                                                           const float*, float* y) {
    call.kernels.rms_norm(x, scale, epsilon, width, y);
  });
}

void infer_layer_norm(Infer& infer) {
  const size_t axis = infer_norm(infer);
  Shape kept = infer.shape(0);
  for (size_t i = axis; i < kept.size(); ++i) kept[i] = Dim{1};
  infer.out(infer.type(0), infer.shape(0));
  infer.out(Type::Float, kept);
  infer.out(Type::Float, kept);
}

void run_layer_norm(const Call& call) {
  const float epsilon = call.operation.real("epsilon", 1e-5f);
  each_row(call, call.axis("axis", -1, call.in[0].rank), [&](size_t row, size_t width, const float* x, const float* scale,
                                                           const float* bias, float* y) {
    float moments[2];  // mean and inverse standard deviation
    call.kernels.layer_norm(x, scale, bias, epsilon, width, y, moments);
    for (size_t i = 0; i < 2; ++i) {
      if (call.gives(i + 1)) call.out[i + 1].floats()[row] = moments[i];
    }
  });
}

void infer_softmax(Infer& infer) {
  infer.expect(is_float(infer.type(0)), "type " + name_of(infer.type(0)));
  infer.axis("axis", -1, infer.rank(0));
  infer.out(infer.type(0), infer.shape(0));
}

void run_softmax(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  const size_t axis = call.axis("axis", -1, x.rank), width = x.dims[axis];
  const size_t inner = x.product(axis + 1, x.rank), rows = x.product(0, axis) * inner;
  if (!rows || !width) return;
  const bool straight = inner == 1 && x.type == Type::Float;
  const auto scratch = call.scratch<float>(straight ? 0 : width);
  call.each(rows, kPiece / width, [&](size_t first, size_t last, size_t thread) {
    for (size_t row = first; row < last; ++row) {
      if (straight) {
        call.kernels.softmax(x.floats() + row * width, width, y.floats() + row * width);
        continue;
      }
      const size_t start = row / inner * width * inner + row % inner;
      float* own = scratch(thread);
      for (size_t i = 0; i < width; i += kRun) {
        const size_t count = std::min(kRun, width - i);
        const float* from = load_run(call.kernels, x, start + i * inner, inner, count, own + i);
        if (from != own + i) std::memcpy(own + i, from, count * sizeof(float));
      }
      call.kernels.softmax(own, width, own);
      for (size_t i = 0; i < width; ++i) store_run<float>(call.kernels, y, start + i * inner, 1, own + i);
    }
  });
}

}  // namespace axc
