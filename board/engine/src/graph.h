// A checked graph: every operator is known and every value has a type and a shape, with M and T symbolic.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "axmodel.h"
#include "shape.h"

namespace axc {

struct Operator;

struct Value {
  std::string name;
  Type type = Type::None;
  Shape shape;
  int maker = -1;                  // index of the operation that writes it; -1: an input or a constant
  const Tensor* tensor = nullptr;  // if it is a constant
  int input = -1, output = -1;     // position in the graph's inputs or outputs; -1: neither
  std::vector<int> users;          // indices of needed operations that read it
  std::optional<std::vector<Dim>> known;  // elements of a short integer list, if they are known at load time

  // Size of the last dimension; 0 if it depends on M or T, or for a scalar.
  size_t width() const { return !shape.empty() && shape.back().constant() ? static_cast<size_t>(shape.back().fixed) : 0; }
};

struct Operation {
  const Operator* op;
  std::vector<int> inputs, outputs;  // indices of values; -1: not given
  const Node* node;
  bool needed = false;  // an output depends on it

  bool is(std::string_view name) const { return node->op == name; }
  int64_t integer(std::string_view name, int64_t otherwise) const;
  float real(std::string_view name, float otherwise) const;
  std::string_view text(std::string_view name, std::string_view otherwise) const;
  const Attribute* attribute(std::string_view name) const;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Operation> operations;
  std::vector<int> inputs, outputs;  // indices of values
};

// Throws Failure for an operator, attribute, type or shape that the format does not allow. Keeps references to `model`.
Graph build_graph(const Axmodel& model);

}  // namespace axc
