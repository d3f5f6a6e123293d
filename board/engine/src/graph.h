// A checked graph: every operator is known, every value has its type and shape, with M and T symbolic.
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
  int maker = -1;                  // index of the node it comes from; -1: an input or a constant
  const Tensor* tensor = nullptr;  // of a constant
  int input = -1, output = -1;     // position among the graph's inputs, outputs
  std::vector<int> users;          // needed operations
  std::optional<std::vector<Dim>> known;  // the elements of a short list of integers, where the graph tells them

  // Of the last dimension; 0 where M or T decides it, or there is none.
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

// Throws Failure for an operator, attribute, type or shape that the format does not allow. `model` must stay.
Graph build_graph(const Axmodel& model);

}  // namespace axc
