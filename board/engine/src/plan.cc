#include <algorithm>

#include "program.h"

namespace axc {
namespace {

constexpr size_t kAlignment = 64;

struct Life {
  int first = -1, last = -1;  // steps
};

bool overlap(const Life& a, const Life& b) { return a.first <= b.last && b.first <= a.last; }

// The area of values that grow by `parts`.
size_t area_of(Program& program, const std::vector<Dim>& parts) {
  for (size_t i = 0; i < program.areas.size(); ++i) {
    if (program.areas[i].parts == parts) return i;
  }
  program.areas.push_back({parts, 0});
  return program.areas.size() - 1;
}

Operand operand_of(const Graph& graph, const Program& program, int index) {
  Operand operand;
  if (index < 0) return operand;
  const Value& value = graph.values[index];
  const int owner = program.stands_for[index];
  const Value& memory = graph.values[owner];
  operand.type = value.type;
  operand.input = memory.input, operand.output = memory.output;
  operand.unread = value.output >= 0 && value.users.empty();
  operand.constant = memory.tensor ? memory.tensor->bytes() : nullptr;
  operand.slot = program.slots[owner];
  operand.rank = value.shape.size();
  std::copy(value.shape.begin(), value.shape.end(), operand.dims.begin());
  return operand;
}

}  // namespace

void plan(const Graph& graph, Program& program) {
  std::vector<Life> lives(graph.values.size());
  const std::vector<int>& owner = program.stands_for;
  for (int index = 0; index < static_cast<int>(program.steps.size()); ++index) {
    touch(
        graph, program.steps[index], [&](int value) { lives[owner[value]].last = index; },
        [&](int value) {
          Life& life = lives[owner[value]];
          if (life.first < 0) life.first = index;
          life.last = index;
        });
  }
  program.slots.assign(graph.values.size(), {});
  std::vector<int> placed;  // ordered by offset
  for (int value = 0; value < static_cast<int>(graph.values.size()); ++value) {
    const Life& life = lives[value];
    if (life.first < 0) continue;
    const Value& made = graph.values[value];
    const Extent extent(made.shape);
    const size_t bytes = static_cast<size_t>(extent.scale) * static_cast<size_t>(bits_of(made.type)) / 8;
    const size_t width = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t area = area_of(program, extent.parts);
    // The lowest place that is free for the value's whole life.
    size_t offset = 0;
    for (const int neighbour : placed) {
      const Slot& slot = program.slots[neighbour];
      if (slot.area != area || !overlap(life, lives[neighbour]) || offset + width <= slot.offset) continue;
      offset = std::max(offset, slot.offset + slot.width);
    }
    program.slots[value] = {area, offset, width};
    program.areas[area].width = std::max(program.areas[area].width, offset + width);
    const auto before = [&](size_t at, int other) { return at < program.slots[other].offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), offset, before), value);
  }
  for (Step& step : program.steps) {
    Plain* plain = std::get_if<Plain>(&step);
    if (!plain) continue;
    plain->first = program.operands.size();
    const Operation& operation = graph.operations[plain->operation];
    for (const std::vector<int>& list : {operation.inputs, operation.outputs}) {
      for (const int index : list) program.operands.push_back(operand_of(graph, program, index));
    }
  }
}

size_t Program::bytes(uint64_t tokens, uint64_t history) const {
  uint64_t total = 0;
  for (const Area& area : areas) {
    uint64_t size = area.width;
    for (const Dim& part : area.parts) {
      if (__builtin_mul_overflow(size, static_cast<uint64_t>(part.at(tokens, history)), &size)) size = UINT64_MAX;
    }
    if (__builtin_add_overflow(total, size, &total) || total > uint64_t{1} << 46) {
      illegal("more than 64 TiB of intermediate values");
    }
  }
  return static_cast<size_t>(total);
}

}  // namespace axc
