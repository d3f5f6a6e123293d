#include "operator.h"

namespace axc {

size_t Infer::axis(int64_t given, size_t rank) const {
  const int64_t length = static_cast<int64_t>(rank);
  expect(given >= -length && given < length, "axis " + std::to_string(given) + " of rank " + std::to_string(rank));
  return static_cast<size_t>(given < 0 ? given + length : given);
}

const std::vector<Dim>& Infer::known(size_t index) const {
  expect(in(index).known.has_value(), in(index).name + " is not known when the model is loaded");
  return *in(index).known;
}

std::vector<int64_t> Infer::numbers(size_t index) const {
  std::vector<int64_t> numbers;
  for (const Dim& dim : known(index)) {
    expect(dim.constant(), in(index).name + " depends on M or T");
    numbers.push_back(dim.fixed);
  }
  return numbers;
}

void Infer::refuse(const std::string& why) const {
  illegal(std::string(operation.node->op) + " of " + std::string(operation.node->outputs[0]) + ": " + why);
}

void Call::fail(const std::string& why) const {
  illegal(std::string(operation.node->op) + " of " + std::string(operation.node->outputs[0]) + ": " + why);
}

Shape broadcast(const Infer& infer, const Shape& a, const Shape& b) {
  Shape shape(std::max(a.size(), b.size()), Dim{1});
  for (size_t i = 0; i < shape.size(); ++i) {
    const auto from_end = [&](const Shape& s) { return i < s.size() ? s[s.size() - 1 - i] : Dim{1}; };
    const Dim x = from_end(a), y = from_end(b);
    infer.expect(x == y || x == Dim{1} || y == Dim{1}, "shapes " + text_of(a) + " and " + text_of(b));
    shape[shape.size() - 1 - i] = x == Dim{1} ? y : x;
  }
  return shape;
}

}  // namespace axc
