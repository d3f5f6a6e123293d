// A checked graph: every operator is known, every value has its type and shape, with M and T symbolic.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "axmodel.h"

namespace axc {

// fixed + tokens * M + history * T
struct Dim {
  int64_t fixed = 0;
  int64_t tokens = 0;
  int64_t history = 0;

  bool operator==(const Dim&) const = default;
  bool constant() const { return tokens == 0 && history == 0; }
  uint64_t at(uint64_t m, uint64_t t) const { return fixed + tokens * m + history * t; }
};

using Shape = std::vector<Dim>;

struct Value {
  std::string name;
  Type type = Type::None;
  Shape shape;
  int maker = -1;                  // index of the node it comes from; -1: an input or a constant
  const Tensor* tensor = nullptr;  // of a constant
  int input = -1, output = -1;     // position among the graph's inputs, outputs
  std::vector<int> users;          // needed operations

  size_t width() const { return static_cast<size_t>(shape.back().fixed); }  // of the last dimension
};

enum class Op {
  Cast, RMSNormalization, DequantizeLinear, Transpose, MatMul, Add, RotaryEmbedding, Concat, Unsqueeze, Attention,
  Sigmoid, Mul, Softmax, TopK,
};

struct Operation {
  Op op;
  std::vector<int> inputs, outputs;  // indices of values
  const Node* node;
  bool needed = false;  // an output depends on it

  int64_t integer(std::string_view name, int64_t otherwise) const;
  float real(std::string_view name, float otherwise) const;
};

struct Graph {
  std::vector<Value> values;
  std::vector<Operation> operations;
  std::vector<int> inputs, outputs;  // indices of values
};

// Throws Failure for an operator, attribute, type or shape that the format does not allow. `model` must stay.
Graph build_graph(const Axmodel& model);

}  // namespace axc
