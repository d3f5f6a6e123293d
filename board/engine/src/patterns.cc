#include "patterns.h"

namespace axc {
namespace {

const float* floats(const Tensor& tensor) { return reinterpret_cast<const float*>(tensor.bytes()); }

}  // namespace

std::optional<RowPatterns::Match> RowPatterns::convert(const Operation& cast) const {
  const int x = cast.inputs[0], to = cast.outputs[0];
  const Type from = value(x).type, made = value(to).type;
  if (value(x).tensor || !is_float(from) || !is_float(made) || from == made) return {};
  return Match{&cast, Convert{x, to}};
}

std::optional<Norm> RowPatterns::norm_of(const Operation& operation) const {
  const int x = operation.inputs[0];
  const Tensor* scale = value(operation.inputs[1]).tensor;
  const size_t width = value(x).width();
  const int64_t axis = operation.integer("axis", -1), last = static_cast<int64_t>(value(x).shape.size()) - 1;
  if (value(x).type != Type::Float || !width || !scale || scale->dims != std::vector<int64_t>{static_cast<int64_t>(width)} ||
      (axis != -1 && axis != last)) {
    return {};
  }
  return Norm{x, -1, operation.outputs[0], width, {floats(*scale), operation.real("epsilon", 1e-5f)}};
}

std::optional<RowPatterns::Match> RowPatterns::rotary(const Operation& rotary) const {
  const Value& x = value(rotary.inputs[0]);
  if (x.type != Type::Float || x.shape.size() != 3) return {};
  const size_t heads = static_cast<size_t>(rotary.integer("num_heads", 1));
  const Rotation rotation{heads, x.width() / heads, value(rotary.inputs[1]).width(), rotary.integer("interleaved", 0) != 0};
  const std::optional<Angles> turns = angles(rotary);
  if (!turns) return {};
  Rotary step{rotary.inputs[0], rotary.outputs[0], rotation, *turns, {}};
  // each head is normalised on its own: flat -> heads -> norm -> flat
  const Operation* flat = maker(step.x);
  if (is(flat, "Reshape") && only_user(step.x) == &rotary) {
    const Operation* norm = maker(flat->inputs[0]);
    const std::optional<Norm> found =
        is(norm, "RMSNormalization") && only_user(flat->inputs[0]) == flat ? norm_of(*norm) : std::nullopt;
    if (found && found->width == rotation.head_dim) step.x = found->x, step.norm = found->scaling;
  }
  const Operation* root = &rotary;
  const Operation* cast = only_user(step.to);
  if (is(cast, "Cast") && is_float(value(cast->outputs[0]).type)) root = cast, step.to = cast->outputs[0];
  return Match{root, step};
}

// cos and sin come from two tables by position, as rows, or from the addition theorem for a position's high and low part:
// cos = Sub(Mul(cos high, cos low), Mul(sin high, sin low)), sin = Add(Mul(sin high, cos low), Mul(cos high, sin low)).
std::optional<Angles> RowPatterns::angles(const Operation& rotary) const {
  const int cos = rotary.inputs[1], sin = rotary.inputs[2];
  if (rotary.inputs.size() > 3 && rotary.inputs[3] >= 0) {
    return Angles{cos, sin, -1, -1, positions_before_cast(rotary.inputs[3]), static_cast<size_t>(value(cos).shape[0].fixed), 0};
  }
  const Angles rows{cos, sin, -1, -1, -1, 0, 0};
  const Operation *difference = maker(cos), *sum = maker(sin);
  if (!is(difference, "Sub") || !is(sum, "Add")) return rows;
  const auto cosines = product(difference->inputs[0]), sines = product(difference->inputs[1]);
  const auto mixed = product(sum->inputs[0]), crossed = product(sum->inputs[1]);
  if (!cosines || !sines || !mixed || !crossed) return rows;
  const auto [ch, cl] = *cosines;
  const auto [sh, sl] = *sines;
  if (!(sh.same_place(ch) && sl.same_place(cl) && *mixed == std::pair{sh, cl} && *crossed == std::pair{ch, sl})) return rows;
  const size_t half = value(cos).width(), high = static_cast<size_t>(value(ch.table).shape[0].fixed);
  for (const int table : {ch.table, sh.table}) {
    if (value(table).shape != Shape{Dim{static_cast<int64_t>(high)}, Dim{static_cast<int64_t>(half)}}) return rows;
  }
  for (const int table : {cl.table, sl.table}) {
    if (value(table).shape != Shape{Dim{static_cast<int64_t>(ch.divisor)}, Dim{static_cast<int64_t>(half)}}) return rows;
  }
  return Angles{ch.table, sh.table, cl.table, sl.table, positions_before_cast(ch.positions), high * ch.divisor, ch.divisor};
}

std::optional<RowPatterns::Gathered> RowPatterns::gathered(int index) const {
  const Operation* gather = maker(index);
  if (!is(gather, "Gather") || gather->integer("axis", 0) != 0) return {};
  const Value& table = value(gather->inputs[0]);
  const Operation* at = maker(gather->inputs[1]);
  const bool quotient = is(at, "Div");
  if (!table.tensor || table.type != Type::Float || table.shape.size() != 2 || (!quotient && !is(at, "Mod"))) return {};
  const Value &positions = value(at->inputs[0]), &divisor = value(at->inputs[1]);
  if (positions.type != Type::Int64 || at->integer("fmod", 0) || !divisor.tensor || !divisor.known ||
      divisor.known->size() != 1 || (*divisor.known)[0].fixed < 1) {
    return {};
  }
  return Gathered{gather->inputs[0], at->inputs[0], static_cast<size_t>((*divisor.known)[0].fixed), quotient};
}

// The product of rows gathered at the quotient and at the remainder; returned in that order.
std::optional<std::pair<RowPatterns::Gathered, RowPatterns::Gathered>> RowPatterns::product(int index) const {
  const Operation* mul = maker(index);
  if (!is(mul, "Mul")) return {};
  auto first = gathered(mul->inputs[0]), second = gathered(mul->inputs[1]);
  if (!first || !second || first->quotient == second->quotient) return {};
  if (second->quotient) std::swap(first, second);
  return std::pair{*first, *second};
}

int RowPatterns::positions_before_cast(int index) const {
  const Operation* cast = maker(index);
  return is(cast, "Cast") && value(cast->inputs[0]).type == Type::Uint32 ? cast->inputs[0] : index;
}

}  // namespace axc
