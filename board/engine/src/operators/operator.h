// An operator of the format: its type inference and its plain kernel for any rank.
// docs/adding-an-operator.md explains how to add one.
#pragma once

#include <array>
#include <span>

#include "../graph.h"
#include "../kernels/kernels.h"
#include "../runtime.h"
#include "view.h"

namespace axc {

// An operation during type inference, which calls out() for each output, in order.
class Infer {
 public:
  struct Result {
    Type type;
    Shape shape;
    std::optional<std::vector<Dim>> known;
  };

  Infer(const Graph& graph, const Operation& operation) : operation(operation), graph_(graph) {}

  size_t inputs() const { return operation.inputs.size(); }
  bool has(size_t index) const { return index < inputs() && operation.inputs[index] >= 0; }
  const Value& in(size_t index) const { return graph_.values[operation.inputs[index]]; }
  Type type(size_t index) const { return in(index).type; }
  const Shape& shape(size_t index) const { return in(index).shape; }
  size_t rank(size_t index) const { return shape(index).size(); }

  // Normalises an axis from [-rank, rank) to [0, rank).
  size_t axis(int64_t given, size_t rank) const;
  size_t axis(std::string_view attribute, int64_t otherwise, size_t rank) const {
    return axis(operation.integer(attribute, otherwise), rank);
  }
  // The elements of an integer list that must be known at load time.
  const std::vector<Dim>& known(size_t index) const;
  std::vector<int64_t> numbers(size_t index) const;

  void expect(bool holds, const std::string& why) const {
    if (!holds) refuse(why);
  }
  [[noreturn]] void refuse(const std::string& why) const;

  void out(Type type, Shape shape, std::optional<std::vector<Dim>> known = {}) {
    results.push_back({type, std::move(shape), std::move(known)});
  }

  const Operation& operation;
  std::vector<Result> results;

 private:
  const Graph& graph_;
};

// The broadcast shape of two.
Shape broadcast(const Infer& infer, const Shape& a, const Shape& b);

// An operation during a run, as a plain kernel sees it.
struct Call {
  const Graph& graph;
  const Operation& operation;
  size_t tokens, history;
  std::span<const View> in, out;
  const Kernels& kernels;
  Pool& pool;
  Arena& memory;

  bool has(size_t index) const { return index < in.size() && in[index].type != Type::None; }
  bool gives(size_t index) const { return index < out.size() && out[index].type != Type::None; }
  // An element of a list that Infer::known() accepted.
  int64_t number(size_t input, size_t index) const {
    return (*graph.values[operation.inputs[input]].known)[index].at(tokens, history);
  }
  size_t numbers(size_t input) const { return graph.values[operation.inputs[input]].known->size(); }
  size_t axis(std::string_view attribute, int64_t otherwise, size_t rank) const {
    const int64_t given = operation.integer(attribute, otherwise);
    return static_cast<size_t>(given < 0 ? given + static_cast<int64_t>(rank) : given);
  }
  [[noreturn]] void fail(const std::string& why) const;

  // Uninitialised memory for each thread, valid until the next call of scratch().
  template <class T>
  auto scratch(size_t count) const {
    const size_t step = (count * sizeof(T) + 63) / 64 * 64;
    uint8_t* start = memory.reserve(step * pool.size());
    return [start, step](size_t thread) { return reinterpret_cast<T*>(start + thread * step); };
  }

  // Calls body(first, last, thread) for ranges of about `grain` items that cover [0, count). It must not throw.
  template <class Body>
  void each(size_t count, size_t grain, const Body& body) const {
    grain = grain ? grain : 1;
    const size_t pieces = (count + grain - 1) / grain;
    pool.each(pieces, [&](size_t piece, size_t thread) {
      body(piece * grain, std::min(count, (piece + 1) * grain), thread);
    });
  }
};

constexpr size_t kPiece = 16384;  // elements per item of the thread pool

struct AttributeRow {
  std::string_view name;
  int kind;  // AttributeProto.AttributeType
};

struct Operator {
  std::string_view name;
  size_t least, most;  // number of inputs
  size_t outputs;      // maximum number of outputs
  void (*infer)(Infer&);
  void (*run)(const Call&);
  std::array<AttributeRow, 8> attributes;
};

// Every operator of the format.
std::span<const Operator> operators();

// The kernel of operators that only change the shape; the planner makes their output a view instead.
void run_copy(const Call& call);

}  // namespace axc
