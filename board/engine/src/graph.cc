#include "graph.h"

#include <algorithm>
#include <map>

#include "operators/operator.h"

namespace axc {
namespace {

constexpr int64_t kWidest = int64_t{1} << 31;  // constant dimension
constexpr size_t kMostKnown = 64;              // elements of an integer list that is evaluated at load time

struct Builder {
  Graph graph;
  std::map<std::string_view, int> names;

  int add(Value value, std::string_view name) {
    const int index = static_cast<int>(graph.values.size());
    if (name.empty() || !names.emplace(name, index).second) illegal("two values are named " + std::string(name));
    value.name = name;
    graph.values.push_back(std::move(value));
    return index;
  }
};

const Operator& operator_of(const Node& node) {
  for (const Operator& row : operators()) {
    if (row.name == node.op) return row;
  }
  unsupported("operator " + std::string(node.op.substr(0, 40)));
}

void check_attributes(const Node& node, const Operator& row) {
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
  if (dim.name.empty() && dim.size >= 0 && dim.size < kWidest) return {dim.size};
  if (dim.name == "M") return {0, 1, 0};
  if (dim.name == "T") return {0, 0, 1};
  if (dim.name == "T+M") return {0, 1, 1};
  illegal(std::string(tensor) + " has dimension " + (dim.name.empty() ? std::to_string(dim.size) : std::string(dim.name)));
}

Shape shape_of(const TensorInfo& info) {
  Shape shape;
  for (const NamedDim& dim : info.shape) shape.push_back(dim_of(dim, info.name));
  return shape;
}

std::optional<std::vector<Dim>> elements_of(const Tensor& tensor) {
  const size_t count = tensor.type == Type::Int64 && tensor.dims.size() <= 1 ? tensor.data.size() / 8 : kMostKnown + 1;
  if (count > kMostKnown) return {};
  std::vector<Dim> elements(count);
  for (size_t i = 0; i < count; ++i) std::memcpy(&elements[i].fixed, tensor.bytes() + 8 * i, 8);
  return elements;
}

void check_result(const Operation& operation, const Infer::Result& result) {
  const auto refuse = [&](const std::string& why) {
    illegal(std::string(operation.node->op) + " gives " + text_of(result.shape) + ": " + why);
  };
  if (!bits_of(result.type) || bits_of(result.type) < 8) refuse("type " + name_of(result.type));
  if (result.shape.size() > kMostRank) refuse("rank " + std::to_string(result.shape.size()));
  int64_t elements = 1;
  for (const Dim& dim : result.shape) {
    const int64_t parts = std::abs(dim.fixed) + dim.tokens + dim.history;
    if (dim.tokens < 0 || dim.history < 0 || dim.least() < 0 || parts >= kWidest) refuse("a dimension is out of range");
    if (__builtin_mul_overflow(elements, std::max<int64_t>(parts, 1), &elements) || elements > int64_t{1} << 40) {
      refuse("too large");
    }
  }
}

void add_operation(Builder& b, const Node& node) {
  const Operator& row = operator_of(node);
  check_attributes(node, row);
  const int index = static_cast<int>(b.graph.operations.size());
  Operation operation{&row, {}, {}, &node, false};
  if (node.outputs.empty() || node.inputs.size() < row.least || node.inputs.size() > row.most) {
    illegal(std::string(node.op) + " has " + std::to_string(node.inputs.size()) + " inputs and " +
            std::to_string(node.outputs.size()) + " outputs, expected " + std::to_string(row.least) + " to " +
            std::to_string(row.most) + " inputs and at least one output");
  }
  for (const std::string_view name : node.inputs) {
    const auto found = b.names.find(name);
    if (!name.empty() && found == b.names.end()) {
      illegal(std::string(node.op) + " reads " + std::string(name) + ", which nothing before it writes");
    }
    operation.inputs.push_back(name.empty() ? -1 : found->second);
    if (name.empty() && operation.inputs.size() <= row.least) {
      illegal(std::string(node.op) + " lacks input " + std::to_string(operation.inputs.size() - 1));
    }
  }
  Infer infer(b.graph, operation);
  row.infer(infer);
  if (node.outputs.size() > infer.results.size()) infer.refuse("outputs");
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    Infer::Result& result = infer.results[i];
    check_result(operation, result);
    if (node.outputs[i].empty()) {
      operation.outputs.push_back(-1);
      continue;
    }
    Value value;
    value.type = result.type;
    value.shape = std::move(result.shape);
    value.known = std::move(result.known);
    value.maker = index;
    operation.outputs.push_back(b.add(std::move(value), node.outputs[i]));
  }
  b.graph.operations.push_back(std::move(operation));
}

// Marks the operations that the outputs depend on, and records their users; others are ignored.
void find_needed(Graph& graph) {
  std::vector<bool> wanted(graph.values.size());
  for (const int output : graph.outputs) wanted[output] = true;
  for (int index = static_cast<int>(graph.operations.size()) - 1; index >= 0; --index) {
    Operation& operation = graph.operations[index];
    operation.needed = std::any_of(operation.outputs.begin(), operation.outputs.end(),
                                   [&](int value) { return value >= 0 && wanted[value]; });
    if (!operation.needed) continue;
    for (const int input : operation.inputs) {
      if (input < 0) continue;
      wanted[input] = true;
      graph.values[input].users.push_back(index);
    }
  }
}

}  // namespace

const Attribute* Operation::attribute(std::string_view name) const {
  const auto found = node->attributes.find(name);
  return found == node->attributes.end() ? nullptr : &found->second;
}

int64_t Operation::integer(std::string_view name, int64_t otherwise) const {
  const Attribute* found = attribute(name);
  return found ? found->integer : otherwise;
}

float Operation::real(std::string_view name, float otherwise) const {
  const Attribute* found = attribute(name);
  return found ? found->real : otherwise;
}

std::string_view Operation::text(std::string_view name, std::string_view otherwise) const {
  const Attribute* found = attribute(name);
  return found ? found->text : otherwise;
}

Graph build_graph(const Axmodel& model) {
  Builder b;
  for (const TensorInfo& info : model.onnx.inputs) {
    Value value;
    value.type = info.type;
    value.shape = shape_of(info);
    value.input = static_cast<int>(b.graph.inputs.size());
    if (bits_of(info.type) < 8) illegal("input " + std::string(info.name) + " has type " + name_of(info.type));
    b.graph.inputs.push_back(b.add(std::move(value), info.name));
  }
  for (const auto& [name, tensor] : model.onnx.initializers) {
    Value value;
    value.type = tensor.type;
    for (const int64_t dim : tensor.dims) value.shape.push_back(Dim{dim});
    value.tensor = &tensor;
    value.known = elements_of(tensor);
    b.add(std::move(value), name);
  }
  for (const Node& node : model.onnx.nodes) add_operation(b, node);
  for (const TensorInfo& info : model.onnx.outputs) {
    const auto found = b.names.find(info.name);
    if (found == b.names.end()) illegal("no node writes output " + std::string(info.name));
    Value& value = b.graph.values[found->second];
    if (value.maker < 0 || value.output >= 0 || value.type != info.type || value.shape != shape_of(info)) {
      illegal("output " + std::string(info.name) + " is declared otherwise than computed: " + name_of(value.type) +
              text_of(value.shape));
    }
    value.output = static_cast<int>(b.graph.outputs.size());
    b.graph.outputs.push_back(found->second);
  }
  if (b.graph.inputs.empty() || b.graph.outputs.empty()) illegal("no inputs or no outputs");
  find_needed(b.graph);
  return std::move(b.graph);
}

}  // namespace axc
