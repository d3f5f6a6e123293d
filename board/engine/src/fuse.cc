#include <algorithm>
#include <cmath>
#include <optional>

#include "program.h"

namespace axc {
namespace {

const float* floats(const Tensor& tensor) { return reinterpret_cast<const float*>(tensor.bytes()); }

class Fuser {
 public:
  explicit Fuser(const Graph& graph) : graph_(graph), absorbed_(graph.operations.size()), ready_(graph.values.size()) {
    for (const int input : graph.inputs) ready_[input] = true;
  }

  Program run() {
    find_aliases();
    const int count = static_cast<int>(graph_.operations.size());
    for (int index = 0; index < count; ++index) absorbed_[index] = !graph_.operations[index].needed;
    for (int index = 0; index < count; ++index) match(index);
    for (int index = 0; index < count; ++index) {
      const auto root = roots_.find(index);
      if (root != roots_.end()) {
        emit(root->second);
      } else if (!absorbed_[index]) {
        emit_alone(graph_.operations[index]);
      }
    }
    for (const int output : graph_.outputs) {
      if (!ready_[output]) fail(value(output), "is not computed");
    }
    return std::move(program_);
  }

 private:
  const Value& value(int index) const { return graph_.values[index]; }
  const Operation* maker(int index) const {
    return value(index).maker < 0 ? nullptr : &graph_.operations[value(index).maker];
  }
  [[noreturn]] void fail(const Value& seen, const char* why) const { unsupported("value " + seen.name + " " + why); }

  // The operation that alone uses a value, which is no output.
  const Operation* only_user(int index) const {
    const Value& seen = value(index);
    return seen.output < 0 && seen.users.size() == 1 ? &graph_.operations[seen.users[0]] : nullptr;
  }
  int index_of(const Operation& operation) const { return static_cast<int>(&operation - graph_.operations.data()); }
  bool is(const Operation* operation, Op op) const { return operation && operation->op == op; }
  // The constant vector that is added or multiplied, and the value it meets; null and -1 for two values.
  std::pair<const Tensor*, int> vector_of(const Operation& operation) const {
    for (const int index : operation.inputs) {
      if (value(index).tensor) return {value(index).tensor, other(operation, index)};
    }
    return {nullptr, -1};
  }
  static int other(const Operation& operation, int index) {
    return operation.inputs[0] == index ? operation.inputs[1] : operation.inputs[0];
  }

  // A float32 output that is the cast of a float32 value is that value.
  void find_aliases() {
    for (int index = 0; index < static_cast<int>(graph_.values.size()); ++index) program_.stands_for.push_back(index);
    for (const Operation& operation : graph_.operations) {
      const int x = operation.inputs[0], to = operation.outputs[0];
      const bool same = operation.needed && operation.op == Op::Cast && value(x).type == value(to).type && maker(x);
      if (!same || value(x).output >= 0 || program_.stands_for[x] != x) continue;
      program_.stands_for[x] = to;
    }
  }

  // A pattern is emitted where its last operation stands, and takes the place of the others.
  void claim(const Operation& root, Step step) {
    absorbed_[index_of(root)] = true;
    roots_.emplace(index_of(root), std::move(step));
  }
  void absorb(const Operation& operation) { absorbed_[index_of(operation)] = true; }
  bool free(const Operation* operation) const { return operation && !absorbed_[index_of(*operation)]; }

  void match(int index) {
    const Operation& operation = graph_.operations[index];
    if (absorbed_[index]) return;
    switch (operation.op) {
      case Op::MatMul: match_linear(operation); break;
      case Op::Mul: match_swiglu(operation); break;
      case Op::RotaryEmbedding: match_rotary(operation); break;
      case Op::Attention: match_attention(operation); break;
      case Op::TopK: match_top_k(operation); break;
      default: break;
    }
  }

  // [DequantizeLinear | Cast] -> Transpose -> MatMul [-> Add bias] [-> Add residual]
  void match_linear(const Operation& matmul) {
    Part part{matrix(matmul.inputs[1]), nullptr, -1, matmul.outputs[0]};
    const Operation* root = &matmul;
    const Operation* add = only_user(part.to);
    if (is(add, Op::Add) && free(add) && vector_of(*add).first) {
      part.bias = floats(*vector_of(*add).first);
      absorb(*root);
      root = add, part.to = add->outputs[0];
      add = only_user(part.to);
    }
    if (is(add, Op::Add) && free(add) && !vector_of(*add).first) {  // the only user, so of two different values
      part.residual = other(*add, part.to);
      absorb(*root);
      root = add, part.to = add->outputs[0];
    }
    claim(*root, Project{matmul.inputs[0], {part}});
  }

  Matrix matrix(int index) {
    const Operation* transpose = maker(index);
    if (!is(transpose, Op::Transpose)) fail(value(index), "is no transposed weight");
    absorb(*transpose);
    const Value* stored = &value(transpose->inputs[0]);
    const Operation* widened = maker(transpose->inputs[0]);
    const Tensor* scales = nullptr;
    int64_t block = 0;
    if (widened && (widened->op == Op::Cast || widened->op == Op::DequantizeLinear)) {
      absorb(*widened);
      stored = &value(widened->inputs[0]);
      block = widened->integer("block_size", 0);
      if (widened->op == Op::DequantizeLinear) scales = value(widened->inputs[1]).tensor;
    }
    if (!stored->tensor || stored->tensor->dims.size() != 2) fail(*stored, "is no weight");
    const Tensor& tensor = *stored->tensor;
    Matrix matrix{Arithmetic::Float, tensor.type, tensor.bytes(), static_cast<size_t>(tensor.dims[0]),
                  static_cast<size_t>(tensor.dims[1]), nullptr, 0};
    if (scales) {
      matrix.scales = floats(*scales);
      matrix.block = block ? static_cast<size_t>(block) : matrix.columns;
    }
    if ((tensor.type == Type::Int8 || tensor.type == Type::Int4) != (scales != nullptr)) fail(*stored, "has no scales");
    if (tensor.type == Type::Int4 && (matrix.columns % 2 || matrix.block % 2)) {
      fail(*stored, "has 4-bit rows or blocks that begin inside a byte");
    }
    if (tensor.type == Type::Int8 && matrix.block == matrix.columns) matrix.arithmetic = Arithmetic::Int8;
    if (tensor.type == Type::Int4 && matrix.block == kBlock) matrix.arithmetic = Arithmetic::Int4;
    if (tensor.type == Type::BFloat16 && hidden_is_bfloat16()) matrix.arithmetic = Arithmetic::BFloat16;
    return matrix;
  }

  // Rounding activations to bfloat16 is no loss then that the hidden state does not have too.
  bool hidden_is_bfloat16() const {
    return std::any_of(graph_.inputs.begin(), graph_.inputs.end(), [this](int i) { return value(i).type == Type::BFloat16; });
  }

  // Mul(Mul(gate, Sigmoid(gate)), up)
  void match_swiglu(const Operation& outer) {
    for (const int silu : outer.inputs) {
      const Operation* inner = maker(silu);
      const bool alone = only_user(silu) == &outer && !value(other(outer, silu)).tensor;
      if (!is(inner, Op::Mul) || !free(inner) || !alone) continue;
      for (const int sigmoid : inner->inputs) {
        const Operation* source = maker(sigmoid);
        const int gate = other(*inner, sigmoid);
        if (!is(source, Op::Sigmoid) || source->inputs[0] != gate || only_user(sigmoid) != inner) continue;
        absorb(*source), absorb(*inner);
        claim(outer, Swiglu{gate, other(outer, silu), outer.outputs[0]});
        return;
      }
    }
  }

  // RotaryEmbedding [-> Cast to what the cache holds], the positions cast from the input `indices`
  void match_rotary(const Operation& rotary) {
    const Operation* positions = maker(rotary.inputs[3]);
    if (!is(positions, Op::Cast) || value(positions->inputs[0]).input < 0) fail(value(rotary.inputs[3]), "is no cast of an input");
    absorb(*positions);
    const Value& cos = value(rotary.inputs[1]);
    const size_t half = cos.width();
    Rotate step{rotary.inputs[0], positions->inputs[0], rotary.outputs[0], floats(*cos.tensor),
                floats(*value(rotary.inputs[2]).tensor), static_cast<size_t>(cos.tensor->dims[0]),
                static_cast<size_t>(rotary.integer("num_heads", 1)), half};
    const Operation* cast = only_user(step.to);
    if (!is(cast, Op::Cast)) return claim(rotary, step);
    absorb(rotary);
    step.to = cast->outputs[0];
    claim(*cast, step);
  }

  // Attention(q, Cast(Concat(K_cache, k)), Cast(Concat(V_cache, v)), Unsqueeze(Cast(mask)))
  void match_attention(const Operation& attention) {
    const auto [k_cache, k] = history(attention.inputs[1]);
    const auto [v_cache, v] = history(attention.inputs[2]);
    const Operation* unsqueeze = maker(attention.inputs[3]);
    if (!is(unsqueeze, Op::Unsqueeze)) fail(value(attention.inputs[3]), "is no mask");
    absorb(*unsqueeze);
    const int mask = before_cast(unsqueeze->inputs[0]);
    if (value(mask).input < 0 || value(mask).type != value(k).type || value(v).type != value(k).type) {
      fail(value(mask), "does not fit the cache");
    }
    const size_t heads = static_cast<size_t>(attention.integer("q_num_heads", 1));
    const size_t head_dim = value(attention.inputs[0]).width() / heads;
    const float scale = attention.real("scale", 1.0f / std::sqrt(static_cast<float>(head_dim)));
    claim(attention, Attend{attention.inputs[0], k_cache, k, v_cache, v, mask, attention.outputs[0], heads,
                            static_cast<size_t>(attention.integer("kv_num_heads", 1)), head_dim, scale});
  }

  // The input of the Cast a value comes from, if it comes from one.
  int before_cast(int index) {
    const Operation* cast = maker(index);
    if (!is(cast, Op::Cast)) return index;
    absorb(*cast);
    return cast->inputs[0];
  }

  std::pair<int, int> history(int index) {
    const int joined = before_cast(index);
    const Operation* concat = maker(joined);
    if (!is(concat, Op::Concat)) fail(value(joined), "is no history with current rows");
    absorb(*concat);
    const int past = concat->inputs[0], current = concat->inputs[1];
    const Value &p = value(past), &c = value(current);
    if (p.input < 0 || p.shape[1] != Dim{0, 0, 1} || c.shape[1] != Dim{0, 1, 0}) fail(value(joined), "is no history with current rows");
    return {past, current};
  }

  // TopK, its indices cast to int32
  void match_top_k(const Operation& top_k) {
    TopK step{top_k.inputs[0], top_k.outputs[0], -1, value(top_k.outputs[0]).width()};
    const Operation* root = &top_k;
    const int indices = top_k.outputs[1];
    if (value(indices).output >= 0 || !value(indices).users.empty()) {
      const Operation* cast = only_user(indices);
      if (!is(cast, Op::Cast)) fail(value(indices), "is int64, not cast to int32");
      absorb(*cast);
      step.indices = cast->outputs[0];
    }
    claim(*root, step);
  }

  void emit_alone(const Operation& operation) {
    const int x = operation.inputs[0], to = operation.outputs[0];
    switch (operation.op) {
      case Op::Cast:
        if (!is_float(value(x).type) || value(x).tensor) fail(value(to), "is a cast of something else than activations");
        return emit(Convert{x, to});
      case Op::RMSNormalization: {
        const float* scale = floats(*value(operation.inputs[1]).tensor);
        return emit(Norm{x, to, scale, operation.real("epsilon", 1e-5f)});
      }
      case Op::Add:
      case Op::Mul: {
        const bool product = operation.op == Op::Mul;
        const auto [vector, rows] = vector_of(operation);
        if (vector) return emit(Binary{rows, -1, to, product, floats(*vector)});
        return emit(Binary{x, operation.inputs[1], to, product, nullptr});
      }
      case Op::Sigmoid: return emit(Unary{x, to, false});
      case Op::Softmax: return emit(Unary{x, to, true});
      default: fail(value(to), "stands where it cannot be run");
    }
  }

  void emit(Step step) {
    touch(
        step, [this](int index) { check_read(index); }, [this](int index) { check_rows(index), ready_[index] = true; });
    Project* project = std::get_if<Project>(&step);
    Project* last = program_.steps.empty() ? nullptr : std::get_if<Project>(&program_.steps.back());
    if (project && last && last->gated < 0 && last->x == project->x && independent(*last, project->parts[0])) {
      last->parts.push_back(project->parts[0]);
    } else if (const Swiglu* swiglu = std::get_if<Swiglu>(&step); swiglu && last && gates(*last, *swiglu)) {
      last->gated = swiglu->to;
    } else {
      program_.steps.push_back(std::move(step));
    }
  }

  // Whether a projection makes what a SwiGLU alone reads; the gate is put first then.
  bool gates(Project& project, const Swiglu& swiglu) const {
    if (project.parts.size() != 2 || value(swiglu.gate).output >= 0 || value(swiglu.up).output >= 0) return false;
    Part &a = project.parts[0], &b = project.parts[1];
    if (a.residual >= 0 || b.residual >= 0 || a.to == b.to) return false;
    const bool both = (a.to == swiglu.gate && b.to == swiglu.up) || (a.to == swiglu.up && b.to == swiglu.gate);
    if (!both || value(swiglu.gate).users.size() != 2 || value(swiglu.up).users.size() != 1) return false;
    if (a.to == swiglu.up) std::swap(a, b);
    return true;
  }

  static bool independent(const Project& project, const Part& next) {
    for (const Part& part : project.parts) {
      if (part.to == next.residual || part.weight.arithmetic != next.weight.arithmetic) return false;
    }
    return true;
  }

  void check_read(int index) const {
    if (!ready_[index]) fail(value(index), "is read where it is not computed");
    const Value& seen = value(index);
    if (seen.input < 0) check_rows(index);
  }

  // What steps compute is a row for each token.
  void check_rows(int index) const {
    const Shape& shape = value(index).shape;
    if (shape.size() != 3 || shape[1] != Dim{0, 1, 0} || !shape[2].constant()) fail(value(index), "is not [1, M, width]");
  }

  const Graph& graph_;
  std::vector<bool> absorbed_, ready_;
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
