#include "graph.h"

#include <algorithm>
#include <array>
#include <map>
#include <span>

namespace axc {
namespace {

constexpr int kFloat = 1, kInt = 2, kInts = 7;  // AttributeProto.AttributeType
constexpr int64_t kWidest = 1 << 24;            // of any constant dimension

struct AttributeRow {
  std::string_view name;
  int kind;
};

struct Builder {
  Graph graph;
  std::map<std::string_view, int> names;

  Value& in(const Operation& operation, size_t index) { return graph.values[operation.inputs[index]]; }

  int add(Value value, std::string_view name) {
    const int index = static_cast<int>(graph.values.size());
    if (name.empty() || !names.emplace(name, index).second) illegal("two values are named " + std::string(name));
    value.name = name;
    graph.values.push_back(std::move(value));
    return index;
  }
};

[[noreturn]] void misfit(const Operation& operation, const std::string& why) {
  illegal(std::string(operation.node->op) + " of " + std::string(operation.node->outputs[0]) + ": " + why);
}

void expect(bool holds, const Operation& operation, const char* why) {
  if (!holds) misfit(operation, why);
}

struct Result {
  Type type;
  Shape shape;
};

// What each operator gives; one result for each output.
using Infer = std::vector<Result> (*)(Builder&, const Operation&);

bool is_last_axis(const Operation& operation, const Value& value) {
  const int64_t axis = operation.integer("axis", -1);
  return axis == -1 || axis == static_cast<int64_t>(value.shape.size()) - 1;
}

std::vector<Result> infer_cast(Builder& b, const Operation& operation) {
  const Value& x = b.in(operation, 0);
  const Type to = static_cast<Type>(operation.integer("to", 0));
  const bool weight = x.tensor && bits_of(x.type) <= 16;
  const bool fits = ((is_float(x.type) || weight) && is_float(to)) || (x.type == Type::Uint32 && to == Type::Int64) ||
                    (x.type == Type::Int64 && to == Type::Int32);
  expect(fits, operation, "types");
  return {{to, x.shape}};
}

std::vector<Result> infer_rms_norm(Builder& b, const Operation& operation) {
  const Value &x = b.in(operation, 0), &scale = b.in(operation, 1);
  expect(x.type == Type::Float && scale.type == Type::Float && scale.tensor, operation, "types");
  expect(scale.shape.size() == 1 && scale.shape[0] == x.shape.back(), operation, "shapes");
  expect(is_last_axis(operation, x) && operation.integer("stash_type", 1) == 1, operation, "attributes");
  return {{Type::Float, x.shape}};
}

std::vector<Result> infer_dequantize(Builder& b, const Operation& operation) {
  const Value &w = b.in(operation, 0), &scale = b.in(operation, 1);
  expect(w.tensor && (w.type == Type::Int8 || w.type == Type::Int4), operation, "types");
  expect(scale.tensor && scale.type == Type::Float && w.shape.size() == 2, operation, "types");
  const int64_t rows = w.shape[0].fixed, columns = w.shape[1].fixed;
  const int64_t axis = operation.integer("axis", 1), block = operation.integer("block_size", 0);
  if (axis == 0 && block == 0) {
    expect(scale.tensor->dims == std::vector<int64_t>{rows}, operation, "scales");
  } else {
    expect(axis == 1 && block > 0 && columns % block == 0, operation, "attributes");
    expect(scale.tensor->dims == std::vector<int64_t>{rows, columns / block}, operation, "scales");
  }
  return {{Type::Float, w.shape}};
}

std::vector<Result> infer_transpose(Builder& b, const Operation& operation) {
  const Value& x = b.in(operation, 0);
  const auto perm = operation.node->attributes.find("perm");
  const bool swaps = perm == operation.node->attributes.end() || perm->second.integers == std::vector<int64_t>{1, 0};
  expect(x.shape.size() == 2 && swaps, operation, "perm");
  return {{x.type, {x.shape[1], x.shape[0]}}};
}

std::vector<Result> infer_matmul(Builder& b, const Operation& operation) {
  const Value &x = b.in(operation, 0), &w = b.in(operation, 1);
  expect(x.type == Type::Float && w.type == Type::Float, operation, "types");
  expect(x.shape.size() == 3 && w.shape.size() == 2 && x.shape[2] == w.shape[0], operation, "shapes");
  return {{Type::Float, {x.shape[0], x.shape[1], w.shape[1]}}};
}

// Add and Mul: two values of one shape, or a value and a constant vector as wide as its rows, in either order.
std::vector<Result> infer_binary(Builder& b, const Operation& operation) {
  const Value &first = b.in(operation, 0), &second = b.in(operation, 1);
  const Value &x = first.tensor ? second : first, &y = first.tensor ? first : second;
  expect(x.type == Type::Float && y.type == Type::Float, operation, "types");
  const bool vector = y.tensor && y.shape.size() == 1 && y.shape[0] == x.shape.back();
  expect(!x.tensor && (vector || (!y.tensor && x.shape == y.shape)), operation, "shapes");
  return {{Type::Float, x.shape}};
}

std::vector<Result> infer_rotary(Builder& b, const Operation& operation) {
  const Value &x = b.in(operation, 0), &cos = b.in(operation, 1), &sin = b.in(operation, 2), &at = b.in(operation, 3);
  expect(x.type == Type::Float && cos.type == Type::Float && sin.type == Type::Float && at.type == Type::Int64, operation,
         "types");
  expect(cos.tensor && sin.tensor && cos.shape.size() == 2 && cos.shape == sin.shape, operation, "tables");
  const int64_t heads = operation.integer("num_heads", 0);
  expect(operation.integer("interleaved", 0) == 0 && operation.integer("rotary_embedding_dim", 0) == 0, operation,
         "attributes");
  expect(x.shape.size() == 3 && heads > 0 && heads < kWidest && cos.shape[0].fixed > 0 &&
             x.shape[2] == Dim{2 * heads * cos.shape[1].fixed},
         operation, "heads");
  expect(at.shape == Shape{x.shape[0], x.shape[1]}, operation, "positions");
  return {{Type::Float, x.shape}};
}

std::vector<Result> infer_concat(Builder& b, const Operation& operation) {
  const Value &x = b.in(operation, 0), &y = b.in(operation, 1);
  expect(is_float(x.type) && x.type == y.type && operation.integer("axis", 0) == 1, operation, "types or axis");
  expect(x.shape.size() == 3 && y.shape.size() == 3 && x.shape[0] == y.shape[0] && x.shape[2] == y.shape[2], operation,
         "shapes");
  const Dim &p = x.shape[1], &q = y.shape[1];
  return {{x.type, {x.shape[0], Dim{p.fixed + q.fixed, p.tokens + q.tokens, p.history + q.history}, x.shape[2]}}};
}

// The one element of a constant int64 [1].
int64_t scalar(const Value& value, const Operation& operation) {
  expect(value.tensor && value.type == Type::Int64 && value.tensor->dims == std::vector<int64_t>{1}, operation, "constant");
  int64_t number = 0;
  std::memcpy(&number, value.tensor->bytes(), sizeof number);
  return number;
}

std::vector<Result> infer_unsqueeze(Builder& b, const Operation& operation) {
  const Value& x = b.in(operation, 0);
  expect(x.shape.size() == 3 && scalar(b.in(operation, 1), operation) == 1, operation, "axes");
  return {{x.type, {x.shape[0], Dim{1}, x.shape[1], x.shape[2]}}};
}

std::vector<Result> infer_attention(Builder& b, const Operation& operation) {
  const Value &q = b.in(operation, 0), &k = b.in(operation, 1), &v = b.in(operation, 2), &mask = b.in(operation, 3);
  for (size_t i = 0; i < 4; ++i) expect(b.in(operation, i).type == Type::Float, operation, "types");
  const int64_t heads = operation.integer("q_num_heads", 0), kv_heads = operation.integer("kv_num_heads", 0);
  expect(q.shape.size() == 3 && k.shape.size() == 3 && k.shape == v.shape && q.shape[0] == Dim{1} && k.shape[0] == Dim{1},
         operation, "shapes");
  expect(heads > 0 && kv_heads > 0 && heads < kWidest && heads % kv_heads == 0 && q.shape[2].fixed % heads == 0 &&
             k.shape[2].fixed * (heads / kv_heads) == q.shape[2].fixed && q.shape[2].fixed > 0,
         operation, "heads");
  expect(mask.shape == Shape{q.shape[0], Dim{1}, q.shape[1], k.shape[1]}, operation, "mask");
  return {{Type::Float, q.shape}};
}

std::vector<Result> infer_sigmoid(Builder& b, const Operation& operation) {
  expect(b.in(operation, 0).type == Type::Float, operation, "types");
  return {{Type::Float, b.in(operation, 0).shape}};
}

std::vector<Result> infer_softmax(Builder& b, const Operation& operation) {
  const Value& x = b.in(operation, 0);
  expect(x.type == Type::Float && x.shape.size() == 3 && is_last_axis(operation, x), operation, "type or axis");
  return {{Type::Float, x.shape}};
}

std::vector<Result> infer_top_k(Builder& b, const Operation& operation) {
  const Value& x = b.in(operation, 0);
  const int64_t k = scalar(b.in(operation, 1), operation);
  expect(x.type == Type::Float && x.shape.size() == 3 && is_last_axis(operation, x), operation, "type or axis");
  expect(operation.integer("largest", 1) == 1 && operation.integer("sorted", 1) == 1, operation, "attributes");
  expect(k > 0 && k <= x.shape[2].fixed, operation, "k");
  const Shape shape{x.shape[0], x.shape[1], Dim{k}};
  return {{Type::Float, shape}, {Type::Int64, shape}};
}

struct OpRow {
  std::string_view name;
  Op op;
  size_t inputs;
  Infer infer;
  std::array<AttributeRow, 4> attributes;
};

constexpr OpRow kOps[] = {
    {"Cast", Op::Cast, 1, infer_cast, {{{"to", kInt}}}},
    {"RMSNormalization", Op::RMSNormalization, 2, infer_rms_norm, {{{"axis", kInt}, {"epsilon", kFloat}, {"stash_type", kInt}}}},
    {"DequantizeLinear", Op::DequantizeLinear, 2, infer_dequantize, {{{"axis", kInt}, {"block_size", kInt}}}},
    {"Transpose", Op::Transpose, 1, infer_transpose, {{{"perm", kInts}}}},
    {"MatMul", Op::MatMul, 2, infer_matmul, {}},
    {"Add", Op::Add, 2, infer_binary, {}},
    {"Mul", Op::Mul, 2, infer_binary, {}},
    {"RotaryEmbedding", Op::RotaryEmbedding, 4, infer_rotary,
     {{{"num_heads", kInt}, {"interleaved", kInt}, {"rotary_embedding_dim", kInt}}}},
    {"Concat", Op::Concat, 2, infer_concat, {{{"axis", kInt}}}},
    {"Unsqueeze", Op::Unsqueeze, 2, infer_unsqueeze, {}},
    {"Attention", Op::Attention, 4, infer_attention, {{{"q_num_heads", kInt}, {"kv_num_heads", kInt}, {"scale", kFloat}}}},
    {"Sigmoid", Op::Sigmoid, 1, infer_sigmoid, {}},
    {"Softmax", Op::Softmax, 1, infer_softmax, {{{"axis", kInt}}}},
    {"TopK", Op::TopK, 2, infer_top_k, {{{"axis", kInt}, {"largest", kInt}, {"sorted", kInt}}}},
};

const OpRow& row_of(const Node& node) {
  for (const OpRow& row : kOps) {
    if (row.name == node.op) return row;
  }
  unsupported("operator " + std::string(node.op.substr(0, 40)));
}

void check_attributes(const Node& node, const OpRow& row) {
  for (const auto& [name, attribute] : node.attributes) {
    const auto known = std::find_if(row.attributes.begin(), row.attributes.end(),
                                    [&name = name](const AttributeRow& entry) { return entry.name == name; });
    if (known == row.attributes.end() || name.empty() || known->kind != attribute.kind) {
      unsupported(std::string(node.op) + " with attribute " + std::string(name.substr(0, 40)));
    }
  }
}

// A declared dimension: a number, "M", "T" or "T+M".
Dim dim_of(const NamedDim& dim, std::string_view tensor) {
  if (dim.name.empty() && dim.size > 0 && dim.size < kWidest) return {dim.size};
  if (dim.name == "M") return {0, 1, 0};
  if (dim.name == "T") return {0, 0, 1};
  if (dim.name == "T+M") return {0, 1, 1};
  illegal(std::string(tensor) + " has dimension " + (dim.name.empty() ? std::to_string(dim.size) : std::string(dim.name)));
}

Shape shape_of(const TensorInfo& info) {
  if (info.shape.size() < 2) illegal(std::string(info.name) + " has rank " + std::to_string(info.shape.size()));
  Shape shape;
  for (const NamedDim& dim : info.shape) shape.push_back(dim_of(dim, info.name));
  if (shape[0] != Dim{1}) illegal(std::string(info.name) + " has a batch other than 1");
  return shape;
}

void add_operation(Builder& b, const Node& node) {
  const OpRow& row = row_of(node);
  check_attributes(node, row);
  const int index = static_cast<int>(b.graph.operations.size());
  Operation operation{row.op, {}, {}, &node, false};
  if (node.outputs.empty() || node.inputs.size() != row.inputs) illegal(std::string(node.op) + " has other inputs");
  for (const std::string_view name : node.inputs) {
    const auto found = b.names.find(name);
    if (found == b.names.end()) illegal(std::string(node.op) + " reads " + std::string(name) + " before it is made");
    operation.inputs.push_back(found->second);
  }
  const std::vector<Result> results = row.infer(b, operation);
  if (results.size() != node.outputs.size()) misfit(operation, "outputs");
  for (size_t i = 0; i < results.size(); ++i) {
    Value value;
    value.type = results[i].type;
    value.shape = results[i].shape;
    value.maker = index;
    operation.outputs.push_back(b.add(std::move(value), node.outputs[i]));
  }
  b.graph.operations.push_back(std::move(operation));
}

// Follows the outputs back to the operations they need; what nobody needs has no say.
void find_needed(Graph& graph) {
  std::vector<bool> wanted(graph.values.size());
  for (const int output : graph.outputs) wanted[output] = true;
  for (int index = static_cast<int>(graph.operations.size()) - 1; index >= 0; --index) {
    Operation& operation = graph.operations[index];
    operation.needed = std::any_of(operation.outputs.begin(), operation.outputs.end(), [&](int value) { return wanted[value]; });
    if (!operation.needed) continue;
    for (const int input : operation.inputs) {
      wanted[input] = true;
      graph.values[input].users.push_back(index);
    }
  }
}

}  // namespace

int64_t Operation::integer(std::string_view name, int64_t otherwise) const {
  const auto found = node->attributes.find(name);
  return found == node->attributes.end() ? otherwise : found->second.integer;
}

float Operation::real(std::string_view name, float otherwise) const {
  const auto found = node->attributes.find(name);
  return found == node->attributes.end() ? otherwise : found->second.real;
}

Graph build_graph(const Axmodel& model) {
  Builder b;
  for (const TensorInfo& info : model.onnx.inputs) {
    Value value;
    value.type = info.type;
    value.shape = shape_of(info);
    value.input = static_cast<int>(b.graph.inputs.size());
    if (!is_float(info.type) && info.type != Type::Uint32) illegal("input " + std::string(info.name) + " has another type");
    b.graph.inputs.push_back(b.add(std::move(value), info.name));
  }
  for (const auto& [name, tensor] : model.onnx.initializers) {
    Value value;
    value.type = tensor.type;
    if (tensor.dims.empty() || tensor.dims.size() > 2) illegal("initializer " + std::string(name) + " has another rank");
    for (const int64_t dim : tensor.dims) {
      if (dim < 1 || dim >= kWidest) illegal("initializer " + std::string(name) + " is empty or too wide");
      value.shape.push_back(Dim{dim});
    }
    value.tensor = &tensor;
    b.add(std::move(value), name);
  }
  for (const Node& node : model.onnx.nodes) add_operation(b, node);
  for (const TensorInfo& info : model.onnx.outputs) {
    const auto found = b.names.find(info.name);
    if (found == b.names.end()) illegal("output " + std::string(info.name) + " is not made");
    Value& value = b.graph.values[found->second];
    if (value.maker < 0 || value.output >= 0 || value.type != info.type || value.shape != shape_of(info)) {
      illegal("output " + std::string(info.name) + " is not what is made");
    }
    value.output = static_cast<int>(b.graph.outputs.size());
    b.graph.outputs.push_back(found->second);
  }
  if (b.graph.inputs.empty() || b.graph.outputs.empty()) illegal("no inputs or no outputs");
  find_needed(b.graph);
  return std::move(b.graph);
}

}  // namespace axc
