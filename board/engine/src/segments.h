// Runs that take rows of several sequences: their rows are stacked, and only attention tells them apart.
#pragma once

#include <cstddef>

#include "program.h"

namespace axc {

// Rows of one sequence in a run: `tokens` of them after `history` cached ones.
struct Segment {
  size_t tokens, history;
  const uint8_t* mask;        // [tokens, history + tokens]
  uint8_t *k_cache, *v_cache;  // rows [0, history) are read
  bool keeps;                 // whether the new rows are written to the caches, behind `history`
};

// Whether a program computes each row by itself in all steps but one attention, whose caches and mask are inputs of the
// graph and nobody else's.
bool takes_segments(const Graph& graph, const Program& program);

// Whether a program has an attention.
bool attends(const Program& program);

}  // namespace axc
