// What runs: a list of steps over the values of a graph, fused ones where a pattern was recognised, the plain kernels of
// the operators everywhere else.
#pragma once

#include <variant>
#include <vector>

#include "graph.h"
#include "kernels/kernels.h"
#include "operators/operator.h"
#include "operators/rotary.h"
#include "scale_store.h"

namespace axc {

// The fields named x, to, ... are indices of values; `to` is written, -1 is none.

// One weight of a Linear: to = x w^T + bias + residual.
struct Part {
  Matrix weight;
  const float* bias;
  int residual;
  int to;
};

// Weights that share an input.
struct Linear {
  int x;
  std::vector<Part> parts;
  int gated = -1;  // not -1: the parts are a gate and its `up`, and of both only their product is kept, here
  Activation activation = Activation::Silu;
};

// Grouped-query attention over a cache and the current rows.
struct Attention {
  int q, k_cache, k, v_cache, v, mask, to;
  size_t heads, kv_heads, head_dim;
  float scale, softcap;
};

// The scale and epsilon of an RMS norm; no scale: none.
struct Scaling {
  const float* scale = nullptr;
  float epsilon = 0;
};

// RMS norms of rows, `residual` added.
struct Norm {
  int x, residual, to;
  size_t width;
  Scaling scaling;
};

// Where the cosines and sines of a token are: in its row of `cos` and `sin`; in the row of its position; or, where there
// are low tables, those of the sum of two angles, of the position's quotient by `divisor` and of its remainder.
struct Angles {
  int cos, sin, cos_low, sin_low;  // -1: no low tables
  int positions;                   // int64 or uint32; -1: each token has its row
  size_t reach, divisor;           // positions below `reach` have rows

  bool operator==(const Angles&) const = default;
};

// A rotation of heads, each normalised before where there is a norm.
struct Rotary {
  int x, to;
  Rotation rotation;
  Angles angles;
  Scaling norm;
};

// A cast between floats.
struct Convert {
  int x, to;
};

// activation(gate) * up
struct Gated {
  int gate, up, to;
  Activation activation;
};

// An operation as it is; its operands are in the program from `first` on, inputs before outputs.
struct Plain {
  int operation;
  size_t first = 0;
};

using Step = std::variant<Linear, Attention, Rotary, Gated, Norm, Convert, Plain>;
constexpr const char* kFusedNames[] = {"linear", "attention", "rotary", "gated", "norm", "cast"};
static_assert(std::size(kFusedNames) + 1 == std::variant_size_v<Step>);

// Where a value lies: `offset` and `width` are bytes for each unit of an area; width 0: nowhere.
struct Slot {
  size_t area = 0, offset = 0, width = 0;
};

// Memory for values whose sizes grow alike: `width` bytes for each unit, and `parts` multiplied are the units.
struct Area {
  std::vector<Dim> parts;
  size_t width = 0;
};

// What a plain step needs to know of a value, in one place: what was read between two tokens has driven the graph from
// the caches.
struct Operand {
  Type type = Type::None;            // None: not given
  int input = -1, output = -1;       // of the value whose memory it has
  bool unread = false;               // an output of the graph that no operation reads
  const uint8_t* constant = nullptr;
  Slot slot;
  size_t rank = 0;
  std::array<Dim, kMostRank> dims{};
};

struct Program {
  std::vector<Step> steps;
  std::vector<int> stands_for;  // of every value, the one whose memory it has: usually itself
  std::vector<Slot> slots;      // of every value
  std::vector<Area> areas;
  std::vector<Operand> operands;  // of plain steps
  size_t most_tensors = 0;      // inputs and outputs of one plain step
  ScaleStore scales;            // of weights

  // Bytes of all areas. Throws Failure where that is more than any machine has.
  size_t bytes(uint64_t tokens, uint64_t history) const;
};

// Recognises patterns in a graph and lays out the memory between the steps.
Program fuse(const Graph& graph);

// Fills slots, areas and operands; values whose lives do not overlap share memory.
void plan(const Graph& graph, Program& program);

// Calls `reads(value)` and `writes(value)` for what a step touches.
template <class Reads, class Writes>
void touch(const Graph& graph, const Step& step, Reads reads, Writes writes) {
  struct Visitor {
    const Graph& graph;
    Reads reads;
    Writes writes;
    void read_if(int value) {
      if (value >= 0) reads(value);
    }
    void operator()(const Linear& s) {
      reads(s.x);
      for (const Part& part : s.parts) {
        read_if(part.residual);
        if (s.gated < 0) writes(part.to);
      }
      if (s.gated >= 0) writes(s.gated);
    }
    void operator()(const Attention& s) {
      for (const int value : {s.q, s.k_cache, s.k, s.v_cache, s.v, s.mask}) reads(value);
      writes(s.to);
    }
    void operator()(const Rotary& s) {
      const Angles& at = s.angles;
      for (const int value : {s.x, at.cos, at.sin, at.cos_low, at.sin_low, at.positions}) read_if(value);
      writes(s.to);
    }
    void operator()(const Norm& s) { reads(s.x), read_if(s.residual), writes(s.to); }
    void operator()(const Convert& s) { reads(s.x), writes(s.to); }
    void operator()(const Gated& s) { reads(s.gate), reads(s.up), writes(s.to); }
    void operator()(const Plain& s) {
      const Operation& operation = graph.operations[s.operation];
      for (const int value : operation.inputs) read_if(value);
      for (const int value : operation.outputs) {
        if (value >= 0) writes(value);
      }
    }
  };
  std::visit(Visitor{graph, reads, writes}, step);
}

}  // namespace axc
