// Operators that change only the shape: Identity, Reshape, Squeeze, Unsqueeze; and Shape.
#include <cstring>

#include "operators.h"

namespace axc {
namespace {

std::vector<bool> marked(const Infer& infer, const std::vector<int64_t>& axes, size_t rank) {
  std::vector<bool> marked(rank);
  for (const int64_t given : axes) {
    const size_t axis = infer.axis(given, rank);
    infer.expect(!marked[axis], "an axis is given twice");
    marked[axis] = true;
  }
  return marked;
}

// The dimension of -1 in a Reshape: the extent divided by the other dimensions. Refuses if that is not one dimension.
Dim quotient(const Infer& infer, Extent whole, const Shape& shape) {
  const Extent taken(shape);
  const std::string why = text_of(infer.shape(0)) + " does not divide into " + text_of(shape);
  for (const Dim& part : taken.parts) {
    const auto found = std::find(whole.parts.begin(), whole.parts.end(), part);
    infer.expect(found != whole.parts.end(), why);
    whole.parts.erase(found);
  }
  infer.expect(taken.scale > 0 && whole.scale % taken.scale == 0 && whole.parts.size() <= 1, why);
  const Dim part = whole.parts.empty() ? Dim{1} : whole.parts[0];
  const int64_t factor = whole.scale / taken.scale;
  infer.expect(factor < int64_t{1} << 31, why);
  return part * factor;
}

}  // namespace

void infer_identity(Infer& infer) {
  infer.expect(bits_of(infer.type(0)) >= 8, "type " + name_of(infer.type(0)));
  infer.out(infer.type(0), infer.shape(0), infer.in(0).known);
}

void infer_reshape(Infer& infer) {
  infer.expect(bits_of(infer.type(0)) >= 8, "type " + name_of(infer.type(0)));
  const Shape& from = infer.shape(0);
  const bool zeros = infer.operation.integer("allowzero", 0) != 0;
  Shape shape, others;
  size_t open = SIZE_MAX;
  for (const Dim& wanted : infer.known(1)) {
    const size_t axis = shape.size();
    shape.push_back(wanted);
    if (wanted == Dim{-1}) {
      infer.expect(open == SIZE_MAX, "two dimensions of -1");
      open = axis;
      continue;
    }
    if (wanted == Dim{0} && !zeros) {
      infer.expect(axis < from.size(), "a dimension to keep that is not there");
      shape[axis] = from[axis];
    }
    const Dim& dim = shape[axis];
    infer.expect(dim.least() >= 0 && dim.fixed < INT32_MAX && dim.tokens >= 0 && dim.history >= 0, text_of(dim));
    others.push_back(dim);
  }
  if (open != SIZE_MAX) {
    shape[open] = quotient(infer, Extent(from), others);
  } else {
    const Extent a(from), b(shape);
    infer.expect(a == b || (a.scale == 0 && b.scale == 0), text_of(from) + " as " + text_of(shape));
  }
  infer.out(infer.type(0), shape, infer.in(0).known);
}

void infer_squeeze(Infer& infer) {
  infer.expect(bits_of(infer.type(0)) >= 8, "type " + name_of(infer.type(0)));
  const Shape& from = infer.shape(0);
  std::vector<bool> gone(from.size());
  if (infer.has(1)) {
    gone = marked(infer, infer.numbers(1), from.size());
  } else {
    for (size_t i = 0; i < from.size(); ++i) gone[i] = from[i] == Dim{1};
  }
  Shape shape;
  for (size_t i = 0; i < from.size(); ++i) {
    if (!gone[i]) shape.push_back(from[i]);
    infer.expect(!gone[i] || from[i] == Dim{1}, "a dimension of " + text_of(from[i]));
  }
  infer.out(infer.type(0), shape, infer.in(0).known);
}

void infer_unsqueeze(Infer& infer) {
  infer.expect(bits_of(infer.type(0)) >= 8, "type " + name_of(infer.type(0)));
  const std::vector<int64_t> axes = infer.numbers(1);
  const Shape& from = infer.shape(0);
  infer.expect(from.size() + axes.size() <= kMostRank, "rank");
  const std::vector<bool> added = marked(infer, axes, from.size() + axes.size());
  Shape shape;
  for (size_t i = 0, next = 0; i < added.size(); ++i) shape.push_back(added[i] ? Dim{1} : from[next++]);
  infer.out(infer.type(0), shape, infer.in(0).known);
}

void infer_shape(Infer& infer) {
  const Shape& from = infer.shape(0);
  const int64_t rank = static_cast<int64_t>(from.size());
  const auto bound = [rank](int64_t at) { return std::clamp<int64_t>(at < 0 ? at + rank : at, 0, rank); };
  const int64_t first = bound(std::clamp<int64_t>(infer.operation.integer("start", 0), -rank, rank));
  const int64_t last = std::max(first, bound(std::clamp<int64_t>(infer.operation.integer("end", rank), -rank, rank)));
  infer.out(Type::Int64, {Dim{last - first}}, std::vector<Dim>(from.begin() + first, from.begin() + last));
}

void run_copy(const Call& call) {
  const size_t bytes = call.out[0].count() * call.out[0].element();
  if (bytes) std::memcpy(call.out[0].data, call.in[0].data, bytes);
}

void run_shape(const Call& call) {
  const std::vector<Dim>& known = *call.graph.values[call.operation.outputs[0]].known;
  for (size_t i = 0; i < known.size(); ++i) {
    const int64_t size = known[i].at(call.tokens, call.history);
    std::memcpy(call.out[0].data + 8 * i, &size, 8);
  }
}

}  // namespace axc
