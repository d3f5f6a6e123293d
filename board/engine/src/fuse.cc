// Fuses patterns of operators that have a kernel of their own. A pattern ends in one operation, its root, and replaces
// the operations that only the root needs. Operations outside patterns run one by one.
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "patterns.h"

namespace axc {
namespace {

const float* floats(const Tensor& tensor) { return reinterpret_cast<const float*>(tensor.bytes()); }

class Fuser : Neighbours {
 public:
  explicit Fuser(const Graph& graph) : Neighbours(graph), rows_(graph), made_at_(graph.values.size(), -1) {}

  Program run() {
    size_t bytes = 0;
    for (const Value& value : graph_.values) bytes += value.tensor ? value.tensor->data.size() : 0;
    program_.scales = ScaleStore(bytes);
    find_views();
    const int count = static_cast<int>(graph_.operations.size());
    for (int index = 0; index < count; ++index) {
      if (graph_.operations[index].needed) match(graph_.operations[index]);
    }
    const std::vector<bool> runs = find_running();
    for (int index = 0; index < count; ++index) {
      if (!runs[index]) continue;
      const auto root = roots_.find(index);
      emit(root == roots_.end() ? Step(Plain{index}) : std::move(root->second));
    }
    return std::move(program_);
  }

 private:
  bool taken(const Operation& root) const { return roots_.contains(index_of(root)); }

  // A value with the same bytes as another one shares its memory. Outputs are written to the caller's buffers.
  void find_views() {
    std::vector<int>& owner = program_.stands_for;
    for (int index = 0; index < static_cast<int>(graph_.values.size()); ++index) owner.push_back(index);
    for (const Operation& operation : graph_.operations) {
      if (!operation.needed || operation.outputs[0] < 0) continue;
      const int x = operation.inputs[0], to = operation.outputs[0];
      const bool cast = operation.is("Cast") && value(x).type == value(to).type;
      if (!cast && operation.op->run != run_copy) continue;
      const int root = owner[x];
      if (value(to).output < 0) {
        owner[to] = root;
      } else if (value(root).maker >= 0 && value(root).output < 0) {
        std::replace(owner.begin(), owner.end(), root, to);
      }
    }
  }
  bool is_view(const Operation& operation) const {
    const bool one = operation.op->run == run_copy || operation.is("Cast");
    return one && program_.stands_for[operation.outputs[0]] == program_.stands_for[operation.inputs[0]];
  }

  void match(const Operation& operation) {
    if (operation.is("MatMul")) match_linear(operation);
    if (operation.is("Mul")) match_gated(operation);
    if (operation.is("RotaryEmbedding")) take(rows_.rotary(operation));
    if (operation.is("Attention")) match_attention(operation);
    if (operation.is("Cast") && !is_view(operation)) take(rows_.convert(operation));
    if (operation.is("RMSNormalization")) {
      take(rows_.norm(operation, [this](const Operation& root) { return !taken(root); }));
    }
  }

  void take(std::optional<RowPatterns::Match> match) {
    if (match) roots_.emplace(index_of(*match->root), std::move(match->step));
  }

  // [DequantizeLinear | Cast] -> Transpose -> MatMul [-> Add bias] [-> Add residual]
  void match_linear(const Operation& matmul) {
    const std::optional<Matrix> weight = matrix(matmul.inputs[1]);
    if (!weight) return;
    Part part{*weight, nullptr, -1, matmul.outputs[0]};
    const Operation* root = &matmul;
    const Operation* add = only_user(part.to);
    if (is(add, "Add") && !taken(*add)) {
      const Tensor* bias = value(other(*add, part.to)).tensor;
      if (bias && bias->dims == std::vector<int64_t>{static_cast<int64_t>(weight->rows)}) {
        part.bias = floats(*bias);
        root = add, part.to = add->outputs[0];
        add = only_user(part.to);
      }
    }
    if (is(add, "Add") && !taken(*add) && value(other(*add, part.to)).shape == value(part.to).shape &&
        !value(other(*add, part.to)).tensor) {
      part.residual = other(*add, part.to);  // `add` is the only user of part.to, so its operands differ
      root = add, part.to = add->outputs[0];
    }
    roots_.emplace(index_of(*root), Linear{matmul.inputs[0], {part}});
  }

  // The weight behind the second operand of a MatMul, if its rows can be read in the stored layout.
  std::optional<Matrix> matrix(int index) {
    const Operation* transpose = maker(index);
    if (!is(transpose, "Transpose") || value(index).shape.size() != 2) return {};
    const Attribute* perm = transpose->attribute("perm");
    if (perm && perm->integers != std::vector<int64_t>{1, 0}) return {};
    const Value* stored = &value(transpose->inputs[0]);
    const Operation* widened = maker(transpose->inputs[0]);
    if (is(widened, "Cast") || is(widened, "DequantizeLinear")) stored = &value(widened->inputs[0]);
    if (!stored->tensor || stored->tensor->type == Type::None || value(index).type != Type::Float) return {};
    const Tensor& tensor = *stored->tensor;
    const size_t rows = static_cast<size_t>(tensor.dims[0]), columns = static_cast<size_t>(tensor.dims[1]);
    if (!rows || !columns) return {};
    Matrix matrix{Arithmetic::Float, tensor.type, tensor.bytes(), rows, columns};
    if (is(widened, "DequantizeLinear")) return add_scales(matrix, tensor, *widened);
    const bool float8 = tensor.type == Type::Float8E4M3 || tensor.type == Type::Float8E5M2;
    if (!is_float(tensor.type) && !float8) return {};
    if (tensor.type == Type::BFloat16 && hidden_is_bfloat16()) matrix.arithmetic = Arithmetic::BFloat16;
    return matrix;
  }

  // Adds scales and zero points to a weight of integer levels, or scales to one of 8-bit floats.
  std::optional<Matrix> add_scales(Matrix matrix, const Tensor& levels, const Operation& dequantize) {
    const Operation* cast = maker(dequantize.inputs[1]);
    const Tensor* scales = value(is(cast, "Cast") ? cast->inputs[0] : dequantize.inputs[1]).tensor;
    const bool given = dequantize.inputs.size() > 2 && dequantize.inputs[2] >= 0;
    const Tensor* zeros = given ? value(dequantize.inputs[2]).tensor : nullptr;
    const bool float8 = levels.type == Type::Float8E4M3 || levels.type == Type::Float8E5M2;
    if (levels.type != Type::Int8 && levels.type != Type::Int4 && !float8) return {};
    if (float8 && given) return {};
    if (!scales || scales->type != (is(cast, "Cast") ? Type::Float16 : Type::Float)) return {};
    if (value(dequantize.inputs[1]).type != Type::Float || given != (zeros && zeros->type == levels.type)) return {};
    const int64_t axis = dequantize.integer("axis", 1), block = dequantize.integer("block_size", 0);
    matrix.block = block ? static_cast<size_t>(block) : matrix.columns;
    matrix.blocks = (matrix.columns + matrix.block - 1) / matrix.block;
    const int64_t blocks = static_cast<int64_t>(matrix.blocks);
    const std::vector<int64_t> dims = block ? std::vector<int64_t>{levels.dims[0], blocks} : std::vector<int64_t>{levels.dims[0]};
    const bool along_rows = axis == 1 || axis == -1;
    if (along_rows != (block != 0) || scales->dims != dims || (zeros && zeros->dims != dims)) return {};
    // rows or blocks would begin in the middle of a byte
    if (levels.type == Type::Int4 && (matrix.columns % 2 || matrix.block % 2)) return {};
    return program_.scales.complete(matrix, *scales, zeros) ? std::optional(matrix) : std::nullopt;
  }

  // If the hidden state is bfloat16, rounding activations to bfloat16 loses no more than it does.
  bool hidden_is_bfloat16() const {
    return std::any_of(graph_.inputs.begin(), graph_.inputs.end(), [this](int i) { return value(i).type == Type::BFloat16; });
  }

  // Mul(activation(gate), up); the activation is Mul(gate, Sigmoid(gate)) or Gelu with tanh.
  void match_gated(const Operation& outer) {
    for (const int bent : outer.inputs) {
      const Operation* inner = maker(bent);
      const int up = other(outer, bent);
      if (!inner || only_user(bent) != &outer || value(bent).type != Type::Float || value(up).tensor ||
          value(up).shape != value(bent).shape) {
        continue;
      }
      const std::optional<std::pair<int, Activation>> gate = activation(*inner);
      if (!gate || value(gate->first).tensor) continue;
      roots_.emplace(index_of(outer), Gated{gate->first, up, outer.outputs[0], gate->second});
      return;
    }
  }

  std::optional<std::pair<int, Activation>> activation(const Operation& operation) const {
    if (operation.is("Gelu") && operation.text("approximate", "none") == "tanh") {
      return std::pair{operation.inputs[0], Activation::GeluTanh};
    }
    if (!operation.is("Mul")) return {};
    for (const int sigmoid : operation.inputs) {
      const Operation* source = maker(sigmoid);
      const int gate = other(operation, sigmoid);
      if (is(source, "Sigmoid") && source->inputs[0] == gate && only_user(sigmoid) == &operation) {
        return std::pair{gate, Activation::Silu};
      }
    }
    return {};
  }

  // Attention(q, Cast(Concat(K_cache, k)), Cast(Concat(V_cache, v)), Unsqueeze(Cast(mask)))
  void match_attention(const Operation& attention) {
    const Value& q = value(attention.inputs[0]);
    if (attention.inputs.size() != 4 || attention.inputs[3] < 0 || attention.outputs.size() != 1 ||
        attention.integer("is_causal", 0) || q.type != Type::Float || q.shape.size() != 3 || q.shape[0] != Dim{1}) {
      return;
    }
    const auto keys = history(attention.inputs[1]), values = history(attention.inputs[2]);
    const Operation* unsqueeze = maker(attention.inputs[3]);
    if (!keys || !values || !is(unsqueeze, "Unsqueeze")) return;
    const int mask = before_cast(unsqueeze->inputs[0]);
    const auto [k_cache, k] = *keys;
    const auto [v_cache, v] = *values;
    const Shape &kept = value(k_cache).shape, &current = value(k).shape;
    for (const int read : {attention.inputs[2], attention.inputs[3]}) {
      if (value(read).type != Type::Float) return;
    }
    if (value(mask).type != value(k).type || value(v).type != value(k).type || value(v).shape != current ||
        value(v_cache).shape != kept || current[1] != q.shape[1] ||
        value(mask).shape != Shape{Dim{1}, q.shape[1], kept[1] + current[1]} ||
        value(attention.inputs[3]).shape != Shape{Dim{1}, Dim{1}, q.shape[1], kept[1] + current[1]}) {
      return;
    }
    const size_t heads = static_cast<size_t>(attention.integer("q_num_heads", 1));
    const size_t kv_heads = static_cast<size_t>(attention.integer("kv_num_heads", 1)), head_dim = q.width() / heads;
    const float scale = attention.real("scale", 1.0f / std::sqrt(static_cast<float>(head_dim)));
    roots_.emplace(index_of(attention), Attention{attention.inputs[0], k_cache, k, v_cache, v, mask, attention.outputs[0],
                                                  heads, kv_heads, head_dim, scale, attention.real("softcap", 0)});
  }

  // The input of the Cast that makes the value, or the value itself.
  int before_cast(int index) const {
    const Operation* cast = maker(index);
    return is(cast, "Cast") && is_float(value(cast->inputs[0]).type) ? cast->inputs[0] : index;
  }

  // The cache and the current rows, if the value is their concatenation along axis 1.
  std::optional<std::pair<int, int>> history(int index) const {
    const Operation* concat = maker(before_cast(index));
    if (!is(concat, "Concat") || concat->inputs.size() != 2) return {};
    const int past = concat->inputs[0], current = concat->inputs[1];
    const int64_t axis = concat->integer("axis", 0);
    if ((axis != 1 && axis != -2) || value(past).shape.size() != 3 || value(past).shape[0] != Dim{1}) return {};
    return std::pair{past, current};
  }

  // Which operations must run, found from the outputs backwards: patterns make some unnecessary.
  std::vector<bool> find_running() const {
    std::vector<bool> wanted(graph_.values.size()), runs(graph_.operations.size());
    for (const int output : graph_.outputs) wanted[output] = true;
    for (int index = static_cast<int>(runs.size()) - 1; index >= 0; --index) {
      const Operation& operation = graph_.operations[index];
      if (std::none_of(operation.outputs.begin(), operation.outputs.end(), [&](int v) { return v >= 0 && wanted[v]; })) continue;
      const auto root = roots_.find(index);
      const Step step = root == roots_.end() ? Step(Plain{index}) : root->second;
      touch(graph_, step, [&](int read) { wanted[read] = true; }, [](int) {});
      runs[index] = root != roots_.end() || !is_view(operation);
    }
    return runs;
  }

  void emit(Step step) {
    if (Linear* linear = std::get_if<Linear>(&step); linear && join(*linear)) return;
    if (Gated* gated = std::get_if<Gated>(&step); gated && join(*gated)) return;
    if (const Plain* plain = std::get_if<Plain>(&step)) {
      const Operation& operation = graph_.operations[plain->operation];
      program_.most_tensors = std::max(program_.most_tensors, operation.inputs.size() + operation.outputs.size());
    }
    const int at = static_cast<int>(program_.steps.size());
    touch(graph_, step, [](int) {}, [&](int made) { made_at_[program_.stands_for[made]] = at; });
    program_.steps.push_back(std::move(step));
  }

  // Merges a Linear into the last one with the same input, so that activations are rounded once.
  bool join(Linear& linear) {
    const Part& next = linear.parts[0];
    const int x = program_.stands_for[linear.x];
    for (int at = static_cast<int>(program_.steps.size()) - 1; at >= 0; --at) {
      Linear* earlier = std::get_if<Linear>(&program_.steps[at]);
      if (!earlier || program_.stands_for[earlier->x] != x) continue;
      const bool ready = next.residual < 0 || made_at_[program_.stands_for[next.residual]] < at;
      const Matrix& first = earlier->parts[0].weight;
      if (earlier->gated >= 0 || !ready || first.arithmetic != next.weight.arithmetic || first.columns != next.weight.columns ||
          first.block != next.weight.block) {
        return false;
      }
      made_at_[program_.stands_for[next.to]] = at;
      earlier->parts.push_back(next);
      return true;
    }
    return false;
  }

  // If one Linear computes gate and up and nothing else reads them, it applies the activation too. Puts the gate first.
  bool join(Gated& gated) {
    const int at = made_at_[gated.gate];
    if (at < 0 || made_at_[gated.up] != at || value(gated.gate).output >= 0 || value(gated.up).output >= 0) return false;
    const size_t uses = gated.activation == Activation::Silu ? 2 : 1;
    if (value(gated.gate).users.size() != uses || value(gated.up).users.size() != 1) return false;
    Linear* linear = std::get_if<Linear>(&program_.steps[at]);
    if (!linear || linear->gated >= 0 || linear->parts.size() != 2) return false;
    Part &a = linear->parts[0], &b = linear->parts[1];
    if (a.residual >= 0 || b.residual >= 0 || a.to == b.to) return false;
    if (!((a.to == gated.gate && b.to == gated.up) || (a.to == gated.up && b.to == gated.gate))) return false;
    if (a.to == gated.up) std::swap(a, b);
    linear->gated = gated.to, linear->activation = gated.activation;
    made_at_[program_.stands_for[gated.to]] = at;
    return true;
  }

  const RowPatterns rows_;
  std::vector<int> made_at_;  // step that writes a value, for values with memory of their own
  std::map<int, Step> roots_;
  Program program_;
};

}  // namespace

Program fuse(const Graph& graph) {
  Program program = Fuser(graph).run();
  plan(graph, program);
  return program;
}

}  // namespace axc
