// What runs: a short list of fused steps over the values of a graph.
#pragma once

#include <variant>
#include <vector>

#include "graph.h"
#include "kernels/kernels.h"

namespace axc {

// The fields named x, to, ... are indices of values; `to` is written.
struct Convert {
  int x, to;
};

struct Norm {
  int x, to;
  const float* scale;
  float epsilon;
};

// One weight of a projection: to = x w^T + bias + residual.
struct Part {
  Matrix weight;
  const float* bias;
  int residual;  // -1: none
  int to;
};

// Weights that share an input.
struct Project {
  int x;
  std::vector<Part> parts;
  int gated = -1;  // not -1: the parts are a gate and its `up`, and of both only silu(gate) * up is kept, here
};

struct Rotate {
  int x, indices, to;
  const float *cos, *sin;  // [positions, half]
  size_t positions, heads, half;
};

struct Attend {
  int q, k_cache, k, v_cache, v, mask, to;
  size_t heads, kv_heads, head_dim;
  float scale;
};

struct Swiglu {
  int gate, up, to;
};

struct Binary {
  int a, b, to;
  bool product;         // else a sum
  const float* vector;  // in place of b
};

struct Unary {
  int x, to;
  bool softmax;  // else a sigmoid
};

struct TopK {
  int x, values, indices;  // indices: int32, -1 when nobody asks
  size_t k;
};

using Step = std::variant<Project, Attend, Norm, Rotate, Swiglu, Convert, Binary, Unary, TopK>;
constexpr const char* kStepNames[] = {"linear", "attention", "norm", "rotary", "swiglu", "cast", "elementwise", "softmax", "topk"};
static_assert(std::size(kStepNames) == std::variant_size_v<Step>);

// Where a value lies in the workspace: `offset` and `width` are bytes for each token; width 0: nowhere.
struct Slot {
  size_t offset = 0;
  size_t width = 0;
};

struct Program {
  std::vector<Step> steps;
  std::vector<int> stands_for;  // of every value, the one whose memory it has: usually itself
  std::vector<Slot> slots;      // of every value
  size_t bytes_per_token = 0;  // of the workspace
};

// Recognises the steps in a graph and lays out the memory between them. Throws Failure for what it cannot run.
Program fuse(const Graph& graph);

// Fills slots and bytes_per_token; values whose lives do not overlap share memory.
void plan(const Graph& graph, Program& program);

// Calls `reads(value)` and `writes(value)` for what a step touches.
template <class Reads, class Writes>
void touch(const Step& step, Reads reads, Writes writes) {
  struct Visitor {
    Reads reads;
    Writes writes;
    void operator()(const Convert& s) { reads(s.x), writes(s.to); }
    void operator()(const Norm& s) { reads(s.x), writes(s.to); }
    void operator()(const Project& s) {
      reads(s.x);
      for (const Part& part : s.parts) {
        if (part.residual >= 0) reads(part.residual);
        if (s.gated < 0) writes(part.to);
      }
      if (s.gated >= 0) writes(s.gated);
    }
    void operator()(const Rotate& s) { reads(s.x), reads(s.indices), writes(s.to); }
    void operator()(const Attend& s) {
      for (const int value : {s.q, s.k_cache, s.k, s.v_cache, s.v, s.mask}) reads(value);
      writes(s.to);
    }
    void operator()(const Swiglu& s) { reads(s.gate), reads(s.up), writes(s.to); }
    void operator()(const Binary& s) {
      reads(s.a), writes(s.to);
      if (s.b >= 0) reads(s.b);
    }
    void operator()(const Unary& s) { reads(s.x), writes(s.to); }
    void operator()(const TopK& s) {
      reads(s.x), writes(s.values);
      if (s.indices >= 0) writes(s.indices);
    }
  };
  std::visit(Visitor{reads, writes}, step);
}

}  // namespace axc
