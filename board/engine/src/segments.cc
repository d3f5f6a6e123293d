#include "segments.h"

#include <algorithm>

namespace axc {
namespace {

// Operators of one element at a time.
constexpr std::string_view kElementwise[] = {"Abs", "Add", "Cast", "Clip", "Cos", "Div", "Erf", "Exp", "Gelu", "Log",
                                             "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin",
                                             "Sqrt", "Sub", "Tanh"};

// Operators over the dimensions from their axis on, by default the last one.
constexpr std::string_view kFromAxis[] = {"LayerNormalization", "RMSNormalization", "Softmax"};

bool constant(const Shape& shape) {
  return std::all_of(shape.begin(), shape.end(), [](const Dim& dim) { return dim.constant(); });
}

// Which dimension of [M, ...] or [1, M, ...] is M.
size_t row_axis(const Shape& shape) { return !shape.empty() && shape[0] == Dim{1} ? 1 : 0; }

// Whether the rest is constant, so that rows lie one behind the other.
bool by_rows(const Shape& shape) {
  const size_t axis = row_axis(shape);
  return axis < shape.size() && shape[axis] == Dim{0, 1, 0} && constant(Shape(shape.begin() + axis + 1, shape.end()));
}

// Whether an operation of values by rows computes each row by itself.
bool keeps_rows_apart(const Graph& graph, const Operation& operation) {
  const auto is_in = [&](const auto& names) { return std::find(std::begin(names), std::end(names), operation.node->op) != std::end(names); };
  if (!is_in(kFromAxis)) return is_in(kElementwise);
  const Shape& shape = graph.values[operation.inputs[0]].shape;
  const int64_t axis = operation.integer("axis", -1);
  return axis < 0 ? -axis < static_cast<int64_t>(shape.size() - row_axis(shape)) : axis > static_cast<int64_t>(row_axis(shape));
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
    if (plain && !keeps_rows_apart(graph, graph.operations[plain->operation])) return false;
  }
  return std::all_of(graph.outputs.begin(), graph.outputs.end(), [&](int value) { return by_rows(graph.values[value].shape); });
}

bool attends(const Program& program) {
  return std::any_of(program.steps.begin(), program.steps.end(),
                     [](const Step& step) { return std::holds_alternative<Attention>(step); });
}

}  // namespace axc
