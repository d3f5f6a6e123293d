// Patterns of row-wise operators: norms, rotary embedding, casts. A match is a step and the operation that it replaces.
#pragma once

#include <optional>
#include <utility>

#include "program.h"

namespace axc {

// Navigation between operations: makers and users of values.
class Neighbours {
 public:
  explicit Neighbours(const Graph& graph) : graph_(graph) {}

 protected:
  const Value& value(int index) const { return graph_.values[index]; }
  const Operation* maker(int index) const {
    return value(index).maker < 0 ? nullptr : &graph_.operations[value(index).maker];
  }
  // The only user of a value that is not an output of the graph.
  const Operation* only_user(int index) const {
    const Value& seen = value(index);
    return seen.output < 0 && seen.users.size() == 1 ? &graph_.operations[seen.users[0]] : nullptr;
  }
  int index_of(const Operation& operation) const { return static_cast<int>(&operation - graph_.operations.data()); }
  static bool is(const Operation* operation, std::string_view name) { return operation && operation->is(name); }
  static int other(const Operation& operation, int index) {
    return operation.inputs[0] == index ? operation.inputs[1] : operation.inputs[0];
  }

  const Graph& graph_;
};

class RowPatterns : public Neighbours {
 public:
  using Neighbours::Neighbours;
  struct Match {
    const Operation* root;
    Step step;
  };

  // A Cast between float types.
  std::optional<Match> convert(const Operation& cast) const;
  // RMSNormalization of float32 rows [-> Add to non-constant rows]; `free` tells whether an operation is not yet a root.
  template <class Free>
  std::optional<Match> norm(const Operation& operation, const Free& free) const {
    std::optional<Norm> step = norm_of(operation);
    if (!step) return {};
    const Operation* add = only_user(step->to);
    if (!is(add, "Add") || !free(*add)) return Match{&operation, *step};
    const int residual = other(*add, step->to);
    if (value(residual).tensor || value(residual).shape != value(step->to).shape) return Match{&operation, *step};
    step->residual = residual, step->to = add->outputs[0];
    return Match{add, *step};
  }
  // [RMSNormalization of heads ->] RotaryEmbedding [-> Cast to the type of the cache]
  std::optional<Match> rotary(const Operation& rotary) const;

 private:
  std::optional<Norm> norm_of(const Operation& operation) const;
  std::optional<Angles> angles(const Operation& rotary) const;
  // Rows gathered from a table at the quotient, or the remainder, of positions.
  struct Gathered {
    int table, positions;
    size_t divisor;
    bool quotient;

    bool operator==(const Gathered&) const = default;
    bool same_place(const Gathered& other) const {
      return positions == other.positions && divisor == other.divisor && quotient == other.quotient;
    }
  };
  std::optional<Gathered> gathered(int index) const;
  std::optional<std::pair<Gathered, Gathered>> product(int index) const;
  int positions_before_cast(int index) const;
};

}  // namespace axc
