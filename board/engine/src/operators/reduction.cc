// Reductions, and TopK.
#include <cmath>
#include <limits>
#include <numeric>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

// The axes to reduce: those given, or all.
template <class Number>
uint32_t reduced(size_t rank, size_t count, bool nothing, const Number& number) {
  if (!count) return nothing ? 0 : (uint32_t{1} << rank) - 1;
  uint32_t mask = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t axis = number(i);
    mask |= uint32_t{1} << (axis < 0 ? axis + static_cast<int64_t>(rank) : axis);
  }
  return mask;
}

// Folds combine(accumulated, element) from `start`, then calls finish(accumulated, number of elements).
template <class Number, class Sum, class Combine, class Finish>
void reduce(const Call& call, Sum start, Combine combine, Finish finish) {
  const View &x = call.in[0], &y = call.out[0];
  const size_t count = call.has(1) ? call.numbers(1) : 0;
  const uint32_t mask = reduced(x.rank, count, call.operation.integer("noop_with_empty_axes", 0) != 0,
                                [&](size_t i) { return call.number(1, i); });
  // Offsets of kept dimensions give the start of a result, those of reduced ones its elements.
  View kept, gone;
  std::array<size_t, kMostRank> kept_strides{}, gone_strides{};
  size_t step = x.count();
  for (size_t axis = 0; axis < x.rank; ++axis) {
    step = x.dims[axis] ? step / x.dims[axis] : 0;
    View& side = mask >> axis & 1 ? gone : kept;
    (mask >> axis & 1 ? gone_strides : kept_strides)[side.rank] = step;
    side.dims[side.rank++] = x.dims[axis];
  }
  const auto offset = [](const View& side, const std::array<size_t, kMostRank>& strides, size_t index) {
    size_t at = 0;
    for (size_t axis = side.rank; axis--; index /= side.dims[axis]) at += index % side.dims[axis] * strides[axis];
    return at;
  };
  const size_t elements = gone.count(), inner = gone.rank ? gone.dims[gone.rank - 1] : 1;
  const size_t stride = gone.rank ? gone_strides[gone.rank - 1] : 1;
  call.each(y.count(), kPiece / std::max<size_t>(elements, 1), [&](size_t first, size_t last, size_t) {
    for (size_t i = first; i < last; ++i) {
      const size_t origin = offset(kept, kept_strides, i);
      Sum sum = start;
      for (size_t run = 0; run < elements; run += inner) {
        const size_t row = origin + offset(gone, gone_strides, run);
        for (size_t j = 0; j < inner; j += kRun) {
          Number buffer[kRun];
          const size_t some = std::min(kRun, inner - j);
          const Number* from = load_run(call.kernels, x, row + j * stride, stride, some, buffer);
          for (size_t k = 0; k < some; ++k) sum = combine(sum, from[k]);
        }
      }
      const Number made = static_cast<Number>(finish(sum, elements));
      Number own = made;
      store_run<Number>(call.kernels, y, i, 1, &own);
    }
  });
}

template <class Floats, class Integers>
void extreme(const Call& call, float floats, int64_t integers, Floats of_floats, Integers of_integers) {
  const auto as_it_is = [](auto best, size_t) { return best; };
  if (is_float(call.in[0].type)) return reduce<float>(call, floats, of_floats, as_it_is);
  reduce<int64_t>(call, integers, of_integers, as_it_is);
}

struct Limits {
  int64_t least, most;
};

Limits limits_of(Type type) {
  switch (type) {
    case Type::Bool: return {0, 1};
    case Type::Uint8: return {0, UINT8_MAX};
    case Type::Int8: return {INT8_MIN, INT8_MAX};
    case Type::Int32: return {INT32_MIN, INT32_MAX};
    case Type::Uint32: return {0, UINT32_MAX};
    default: return {INT64_MIN, INT64_MAX};
  }
}

}  // namespace

void infer_reduce(Infer& infer) {
  const Type type = infer.type(0);
  const bool extremes = infer.operation.is("ReduceMax") || infer.operation.is("ReduceMin");
  infer.expect(is_float(type) || is_integer(type) || (extremes && type == Type::Bool), "type " + name_of(type));
  const Shape& from = infer.shape(0);
  const std::vector<int64_t> axes = infer.has(1) ? infer.numbers(1) : std::vector<int64_t>{};
  for (const int64_t axis : axes) infer.axis(axis, from.size());
  const uint32_t mask = reduced(from.size(), axes.size(), infer.operation.integer("noop_with_empty_axes", 0) != 0,
                                [&](size_t i) { return axes[i]; });
  const bool kept = infer.operation.integer("keepdims", 1) != 0;
  Shape shape;
  for (size_t i = 0; i < from.size(); ++i) {
    if (!(mask >> i & 1)) {
      shape.push_back(from[i]);
    } else if (kept) {
      shape.push_back(Dim{1});
    }
  }
  infer.out(type, shape);
}

void run_reduce_sum(const Call& call) {
  if (is_float(call.in[0].type)) {
    return reduce<float>(call, 0.0, [](double sum, float x) { return sum + x; }, [](double sum, size_t) { return sum; });
  }
  reduce<int64_t>(call, uint64_t{0}, [](uint64_t sum, int64_t x) { return sum + static_cast<uint64_t>(x); },
                  [](uint64_t sum, size_t) { return sum; });
}

void run_reduce_mean(const Call& call) {
  if (is_float(call.in[0].type)) {
    return reduce<float>(call, 0.0, [](double sum, float x) { return sum + x; },
                         [](double sum, size_t count) { return sum / static_cast<double>(count); });
  }
  reduce<int64_t>(call, uint64_t{0}, [](uint64_t sum, int64_t x) { return sum + static_cast<uint64_t>(x); },
                  [](uint64_t sum, size_t count) { return count ? static_cast<int64_t>(sum) / static_cast<int64_t>(count) : 0; });
}

void run_reduce_max(const Call& call) {
  const float least = -std::numeric_limits<float>::infinity();
  extreme(call, least, limits_of(call.in[0].type).least, [](float a, float x) { return a != a || a > x ? a : x; },
          [](int64_t a, int64_t x) { return a > x ? a : x; });
}

void run_reduce_min(const Call& call) {
  const float most = std::numeric_limits<float>::infinity();
  extreme(call, most, limits_of(call.in[0].type).most, [](float a, float x) { return a != a || a < x ? a : x; },
          [](int64_t a, int64_t x) { return a < x ? a : x; });
}

void infer_top_k(Infer& infer) {
  infer.expect(is_float(infer.type(0)) || is_integer(infer.type(0)), "type " + name_of(infer.type(0)));
  infer.expect(infer.type(1) == Type::Int64, "type of k");
  const std::vector<Dim>& k = infer.known(1);
  const size_t axis = infer.axis("axis", -1, infer.rank(0));
  const Dim length = infer.shape(0)[axis];
  infer.expect(k.size() == 1 && k[0].least() >= 0 && k[0].fixed <= INT32_MAX, "k");
  const Dim rest = length - k[0];
  infer.expect(rest.tokens >= 0 && rest.history >= 0 && rest.least() >= 0, "k " + text_of(k[0]) + " of " + text_of(length));
  Shape shape = infer.shape(0);
  shape[axis] = k[0];
  infer.out(infer.type(0), shape);
  infer.out(Type::Int64, shape);
}

// A total order: of equal values the lower index comes first, NaN last.
void run_top_k(const Call& call) {
  const View& x = call.in[0];
  const size_t axis = call.axis("axis", -1, x.rank), width = x.dims[axis], k = static_cast<size_t>(call.number(1, 0));
  const size_t inner = x.product(axis + 1, x.rank), rows = x.product(0, axis) * inner;
  const bool largest = call.operation.integer("largest", 1) != 0;
  if (!rows || !k) return;
  const auto scratch = call.scratch<uint8_t>(width * (sizeof(int64_t) + sizeof(uint32_t)));
  const auto pick = [&]<class Number>(Number, size_t row, uint8_t* memory) {
    const Number* values = reinterpret_cast<const Number*>(memory);
    uint32_t* order = reinterpret_cast<uint32_t*>(memory + width * sizeof(int64_t));
    const size_t start = row / inner * width * inner + row % inner;
    if (inner == 1 && x.type == (std::is_same_v<Number, float> ? Type::Float : Type::Int64)) {
      values = reinterpret_cast<const Number*>(x.data) + start;
    } else {
      Number* row_of = reinterpret_cast<Number*>(memory);
      for (size_t i = 0; i < width; i += kRun) {
        const size_t count = std::min(kRun, width - i);
        const Number* from = load_run(call.kernels, x, start + i * inner, inner, count, row_of + i);
        if (from != row_of + i) std::memcpy(row_of + i, from, count * sizeof(Number));
      }
    }
    std::iota(order, order + width, uint32_t{0});
    std::partial_sort(order, order + k, order + width, [&](uint32_t a, uint32_t b) {
      const Number p = values[a], q = values[b];
      const bool p_nan = p != p, q_nan = q != q;
      if (p_nan || q_nan) return p_nan != q_nan ? q_nan : a < b;
      return p != q ? (largest ? p > q : p < q) : a < b;
    });
    const size_t to = row / inner * k * inner + row % inner;
    for (size_t i = 0; i < k; ++i) {
      const size_t at = to + i * inner;
      if (call.gives(0)) {
        std::memcpy(call.out[0].data + at * x.element(), x.data + (start + order[i] * inner) * x.element(), x.element());
      }
      const int64_t index = order[i];
      if (call.gives(1)) std::memcpy(call.out[1].data + 8 * at, &index, 8);
    }
  };
  call.each(rows, kPiece / std::max<size_t>(width, 1), [&](size_t first, size_t last, size_t thread) {
    for (size_t row = first; row < last; ++row) {
      is_float(x.type) ? pick(float{}, row, scratch(thread)) : pick(int64_t{}, row, scratch(thread));
    }
  });
}

}  // namespace axc
