// Operators that move elements of any type: Transpose, Expand, Concat, Split, Slice, Gather.
#include <cstring>

#include "operators.h"

namespace axc {
namespace {

void expect_bytes(const Infer& infer) {
  infer.expect(bits_of(infer.type(0)) >= 8, "type " + name_of(infer.type(0)));
}

// Copies an input of `rank` dimensions to a dense output; `strides` are the input's, in elements, by output dimension.
void copy_strided(const Call& call, const View& y, const uint8_t* from, const std::array<int64_t, kMostRank>& strides) {
  const size_t count = y.count(), element = y.element();
  if (!count) return;
  // contiguous innermost dimensions are copied at once
  size_t inner = y.rank, block = 1;
  while (inner > 0 && (y.dims[inner - 1] == 1 || strides[inner - 1] == static_cast<int64_t>(block))) block *= y.dims[--inner];
  call.each(count / block, kPiece / block, [&](size_t first, size_t last, size_t) {
    std::array<size_t, kMostRank> at{};
    int64_t offset = 0;
    size_t left = first;
    for (size_t axis = inner; axis--;) {
      at[axis] = left % y.dims[axis];
      left /= y.dims[axis];
      offset += static_cast<int64_t>(at[axis]) * strides[axis];
    }
    uint8_t* to = y.data + first * block * element;
    for (size_t item = first; item < last; ++item, to += block * element) {
      std::memcpy(to, from + offset * static_cast<int64_t>(element), block * element);
      for (size_t axis = inner; axis--;) {
        offset += strides[axis];
        if (++at[axis] < y.dims[axis]) break;
        offset -= static_cast<int64_t>(y.dims[axis]) * strides[axis];
        at[axis] = 0;
      }
    }
  });
}

std::array<int64_t, kMostRank> dense_strides(const View& x) {
  std::array<int64_t, kMostRank> strides{};
  int64_t step = 1;
  for (size_t axis = x.rank; axis--;) {
    strides[axis] = step;
    step *= static_cast<int64_t>(x.dims[axis]);
  }
  return strides;
}

std::vector<size_t> permutation(const Operation& operation, size_t rank) {
  std::vector<size_t> order(rank);
  const Attribute* perm = operation.attribute("perm");
  for (size_t i = 0; i < rank; ++i) order[i] = perm ? static_cast<size_t>(perm->integers[i]) : rank - 1 - i;
  return order;
}

// The slice of one dimension, by numpy's rules.
struct Range {
  int64_t start, size, step;
};

Range range_of(int64_t length, int64_t start, int64_t end, int64_t step) {
  const auto bound = [&](int64_t at) {
    at = std::clamp(at, -length - 1, length + 1);
    if (at < 0) at += length;
    return step > 0 ? std::clamp<int64_t>(at, 0, length) : std::clamp<int64_t>(at, -1, length - 1);
  };
  // a negative end would count from the back, so it cannot mean before the first element
  const int64_t first = bound(start), last = step < 0 && end < -length ? -1 : bound(end);
  const int64_t distance = step > 0 ? last - first : first - last;
  const int64_t stride = step > 0 ? step : step == INT64_MIN ? INT64_MAX : -step;
  return {first, distance > 0 ? (distance - 1) / stride + 1 : 0, step};
}

// The size of a slice of a symbolic dimension; must hold for every M >= 1 and T >= 0.
std::optional<Dim> symbolic_size(const Dim& length, int64_t start, int64_t end, int64_t step) {
  if (step == -1 && start == -1 && end < -(int64_t{1} << 31)) return length;
  if (step != 1) return {};
  const auto bound = [&](int64_t at) -> std::optional<Dim> {
    if (at >= int64_t{1} << 31) return length;
    if (at < -length.least() || at > length.least()) return {};
    return at < 0 ? length + Dim{at} : Dim{at};
  };
  const std::optional<Dim> first = bound(start), last = bound(end);
  if (!first || !last) return {};
  const Dim size = *last - *first;
  if (size.tokens < 0 || size.history < 0 || size.least() < 0) return {};
  return size;
}

}  // namespace

void infer_transpose(Infer& infer) {
  expect_bytes(infer);
  const Shape& from = infer.shape(0);
  if (const Attribute* perm = infer.operation.attribute("perm")) {
    infer.expect(perm->integers.size() == from.size(), "perm");
    std::vector<bool> seen(from.size());
    for (const int64_t axis : perm->integers) {
      infer.expect(axis >= 0 && axis < static_cast<int64_t>(from.size()) && !seen[static_cast<size_t>(axis)], "perm");
      seen[static_cast<size_t>(axis)] = true;
    }
  }
  Shape shape;
  for (const size_t axis : permutation(infer.operation, from.size())) shape.push_back(from[axis]);
  infer.out(infer.type(0), shape);
}

void run_transpose(const Call& call) {
  const View& x = call.in[0];
  const Attribute* perm = call.operation.attribute("perm");
  const std::array<int64_t, kMostRank> dense = dense_strides(x);
  std::array<int64_t, kMostRank> strides{};
  for (size_t i = 0; i < x.rank; ++i) strides[i] = dense[perm ? static_cast<size_t>(perm->integers[i]) : x.rank - 1 - i];
  copy_strided(call, call.out[0], x.data, strides);
}

void infer_expand(Infer& infer) {
  expect_bytes(infer);
  const std::vector<Dim>& wanted = infer.known(1);
  for (const Dim& dim : wanted) infer.expect(dim.least() >= 0 && dim.fixed < INT32_MAX, text_of(dim));
  infer.out(infer.type(0), broadcast(infer, infer.shape(0), wanted));
}

void run_expand(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  const std::array<int64_t, kMostRank> dense = dense_strides(x);
  std::array<int64_t, kMostRank> strides{};
  for (size_t i = 0; i < x.rank; ++i) {
    if (x.dims[i] != 1) strides[y.rank - x.rank + i] = dense[i];
  }
  copy_strided(call, y, x.data, strides);
}

void infer_concat(Infer& infer) {
  infer.expect(infer.operation.attribute("axis") != nullptr, "no axis");
  expect_bytes(infer);
  const size_t axis = infer.axis("axis", 0, infer.rank(0));
  Shape shape = infer.shape(0);
  std::optional<std::vector<Dim>> known = infer.in(0).known;
  for (size_t i = 1; i < infer.inputs(); ++i) {
    infer.expect(infer.has(i) && infer.type(i) == infer.type(0) && infer.rank(i) == shape.size(), "types or ranks");
    for (size_t d = 0; d < shape.size(); ++d) {
      infer.expect(d == axis || infer.shape(i)[d] == shape[d], "shapes " + text_of(shape) + " and " + text_of(infer.shape(i)));
    }
    shape[axis] = shape[axis] + infer.shape(i)[axis];
    if (known && infer.in(i).known && known->size() < 64) {
      known->insert(known->end(), infer.in(i).known->begin(), infer.in(i).known->end());
    } else {
      known.reset();
    }
  }
  infer.out(infer.type(0), shape, known);
}

void run_concat(const Call& call) {
  const View& y = call.out[0];
  const size_t axis = call.axis("axis", 0, y.rank);
  const size_t outer = y.product(0, axis), row = y.product(axis, y.rank) * y.element();
  size_t start = 0;
  for (const View& x : call.in) {
    const size_t piece = x.product(axis, x.rank) * x.element();
    for (size_t i = 0; i < outer && piece; ++i) std::memcpy(y.data + i * row + start, x.data + i * piece, piece);
    start += piece;
  }
}

void infer_split(Infer& infer) {
  expect_bytes(infer);
  const size_t axis = infer.axis("axis", 0, infer.rank(0)), outputs = infer.operation.node->outputs.size();
  const Dim whole = infer.shape(0)[axis];
  std::vector<Dim> sizes;
  if (infer.has(1)) {
    sizes = infer.known(1);
  } else {
    const int64_t parts = infer.operation.integer("num_outputs", static_cast<int64_t>(outputs));
    infer.expect(parts > 0 && parts <= 1024 && whole.constant(), "parts of " + text_of(whole));
    const int64_t most = (whole.fixed + parts - 1) / parts;
    for (int64_t i = 0; i < parts; ++i) sizes.push_back(Dim{std::clamp<int64_t>(whole.fixed - i * most, 0, most)});
  }
  infer.expect(sizes.size() == outputs, "outputs");
  Dim sum;
  for (const Dim& size : sizes) {
    infer.expect(size.fixed > -(1 << 24) && size.fixed < INT32_MAX && size.least() >= 0, "a part of " + text_of(size));
    infer.expect(!infer.operation.node->outputs[infer.results.size()].empty(), "a part without a name");
    sum = sum + size;
    Shape shape = infer.shape(0);
    shape[axis] = size;
    infer.out(infer.type(0), shape);
  }
  infer.expect(sum == whole, "parts of " + text_of(sum) + " in all, the dimension is " + text_of(whole));
}

void run_split(const Call& call) {
  const View& x = call.in[0];
  const size_t axis = call.axis("axis", 0, x.rank);
  const size_t outer = x.product(0, axis), row = x.product(axis, x.rank) * x.element();
  size_t start = 0;
  for (size_t part = 0; part < call.out.size(); ++part) {
    const View& y = call.out[part];
    const size_t piece = y.product(axis, y.rank) * y.element();
    for (size_t i = 0; i < outer && piece; ++i) std::memcpy(y.data + i * piece, x.data + i * row + start, piece);
    start += piece;
  }
}

void infer_slice(Infer& infer) {
  expect_bytes(infer);
  Shape shape = infer.shape(0);
  const std::vector<int64_t> starts = infer.numbers(1), ends = infer.numbers(2);
  std::vector<int64_t> axes, steps(starts.size(), 1);
  if (infer.has(3)) {
    axes = infer.numbers(3);
  } else {
    for (size_t i = 0; i < starts.size(); ++i) axes.push_back(static_cast<int64_t>(i));
  }
  if (infer.has(4)) steps = infer.numbers(4);
  infer.expect(starts.size() == ends.size() && starts.size() == axes.size() && starts.size() == steps.size(), "lists");
  std::vector<bool> seen(shape.size());
  for (size_t i = 0; i < starts.size(); ++i) {
    const size_t axis = infer.axis(axes[i], shape.size());
    infer.expect(steps[i] != 0 && !seen[axis], "steps or axes");
    seen[axis] = true;
    const Dim length = shape[axis];
    if (length.constant()) {
      shape[axis] = Dim{range_of(length.fixed, starts[i], ends[i], steps[i]).size};
    } else {
      const std::optional<Dim> size = symbolic_size(length, starts[i], ends[i], steps[i]);
      infer.expect(size.has_value(), "a slice of " + text_of(length) + " whose size is no sum of M and T");
      shape[axis] = *size;
    }
  }
  std::optional<std::vector<Dim>> known;
  if (infer.in(0).known && shape.size() == 1 && starts.size() == 1) {
    const Range range = range_of(static_cast<int64_t>(infer.in(0).known->size()), starts[0], ends[0], steps[0]);
    known.emplace();
    for (int64_t i = 0; i < range.size; ++i) {
      known->push_back((*infer.in(0).known)[static_cast<size_t>(range.start + i * range.step)]);
    }
  }
  infer.out(infer.type(0), shape, known);
}

void run_slice(const Call& call) {
  const View &x = call.in[0], &y = call.out[0];
  if (!y.count()) return;
  std::array<int64_t, kMostRank> strides = dense_strides(x);
  int64_t offset = 0;
  for (size_t i = 0; i < call.numbers(1); ++i) {
    const int64_t given = call.has(3) ? call.number(3, i) : static_cast<int64_t>(i);
    const size_t axis = static_cast<size_t>(given < 0 ? given + static_cast<int64_t>(x.rank) : given);
    const int64_t step = call.has(4) ? call.number(4, i) : 1;
    const Range range = range_of(static_cast<int64_t>(x.dims[axis]), call.number(1, i), call.number(2, i), step);
    offset += range.start * strides[axis];
    strides[axis] *= range.size > 1 ? range.step : 1;
  }
  copy_strided(call, y, x.data + offset * static_cast<int64_t>(x.element()), strides);
}

void infer_gather(Infer& infer) {
  expect_bytes(infer);
  infer.expect(infer.type(1) == Type::Int64 || infer.type(1) == Type::Int32, "indices of " + name_of(infer.type(1)));
  const Shape &from = infer.shape(0), &indices = infer.shape(1);
  infer.expect(!from.empty(), "a scalar");
  const size_t axis = infer.axis("axis", 0, from.size());
  Shape shape(from.begin(), from.begin() + static_cast<int64_t>(axis));
  shape.insert(shape.end(), indices.begin(), indices.end());
  shape.insert(shape.end(), from.begin() + static_cast<int64_t>(axis) + 1, from.end());
  std::optional<std::vector<Dim>> known;
  if (infer.in(0).known && infer.in(1).known && from.size() == 1) {
    const std::vector<Dim>& list = *infer.in(0).known;
    known.emplace();
    for (const Dim& index : *infer.in(1).known) {
      infer.expect(index.constant(), "an index that depends on M or T");
      known->push_back(list[infer.axis(index.fixed, list.size())]);
    }
  }
  infer.out(infer.type(0), shape, known);
}

void run_gather(const Call& call) {
  const View &x = call.in[0], &indices = call.in[1], &y = call.out[0];
  const size_t axis = call.axis("axis", 0, x.rank), count = indices.count();
  const int64_t length = static_cast<int64_t>(x.dims[axis]);
  const size_t piece = x.product(axis + 1, x.rank) * x.element(), outer = x.product(0, axis);
  const auto index = [&](size_t i) {
    int64_t at = 0;
    if (indices.type == Type::Int64) {
      std::memcpy(&at, indices.data + 8 * i, 8);
    } else {
      int32_t narrow = 0;
      std::memcpy(&narrow, indices.data + 4 * i, 4);
      at = narrow;
    }
    return at < 0 && at >= -length ? at + length : at;
  };
  for (size_t i = 0; i < count; ++i) {
    if (index(i) < 0 || index(i) >= length) {
      call.fail("index " + std::to_string(index(i)) + " is outside the " + std::to_string(length) + " of " +
                call.graph.values[call.operation.inputs[0]].name);
    }
  }
  if (!piece) return;
  call.each(outer * count, kPiece / piece, [&](size_t first, size_t last, size_t) {
    for (size_t item = first; item < last; ++item) {
      const size_t row = item / count * static_cast<size_t>(length) + static_cast<size_t>(index(item % count));
      std::memcpy(y.data + item * piece, x.data + row * piece, piece);
    }
  });
}

}  // namespace axc
