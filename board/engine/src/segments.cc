#include "segments.h"

#include <algorithm>

namespace axc {
namespace {

// Operators of one element at a time.
constexpr std::string_view kElementwise[] = {"Abs", "Add", "Cast", "Clip", "Cos", "Div", "Erf", "Exp", "Gelu", "Log",
                                             "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin",
                                             "Sqrt", "Sub", "Tanh"};

bool constant(const Shape& shape) {
  return std::all_of(shape.begin(), shape.end(), [](const Dim& dim) { return dim.constant(); });
}

// [M, ...] or [1, M, ...], the rest constant: the rows lie one behind the other.
bool by_rows(const Shape& shape) {
  const size_t axis = !shape.empty() && shape[0] == Dim{1} ? 1 : 0;
  return axis < shape.size() && shape[axis] == Dim{0, 1, 0} && constant(Shape(shape.begin() + axis + 1, shape.end()));
}

bool is_elementwise(const Operation& operation) {
  return std::find(std::begin(kElementwise), std::end(kElementwise), operation.node->op) != std::end(kElementwise);
}

}  // namespace

bool takes_segments(const Graph& graph, const Program& program) {
  const auto owner = [&](int value) -> const Value& { return graph.values[program.stands_for[value]]; };
  const auto fits = [&](int value) { return constant(graph.values[value].shape) || by_rows(graph.values[value].shape); };
  size_t attentions = 0;
  for (const Step& step : program.steps) {
    if (const Attention* attention = std::get_if<Attention>(&step)) {
      for (const int value : {attention->k_cache, attention->v_cache, attention->mask}) {
        if (owner(value).input < 0) return false;
      }
      if (++attentions > 1 || !fits(attention->q) || !fits(attention->k) || !fits(attention->v) || !fits(attention->to)) {
        return false;
      }
      continue;
    }
    bool all = true;
    touch(graph, step, [&](int value) { all = all && fits(value); }, [&](int value) { all = all && by_rows(graph.values[value].shape); });
    if (!all) return false;
    const Plain* plain = std::get_if<Plain>(&step);
    if (plain && !is_elementwise(graph.operations[plain->operation])) return false;
  }
  return std::all_of(graph.outputs.begin(), graph.outputs.end(), [&](int value) { return by_rows(graph.values[value].shape); });
}

bool attends(const Program& program) {
  return std::any_of(program.steps.begin(), program.steps.end(),
                     [](const Step& step) { return std::holds_alternative<Attention>(step); });
}

}  // namespace axc
