#include <algorithm>

#include "program.h"

namespace axc {
namespace {

constexpr size_t kAlignment = 64;

struct Life {
  int first = -1, last = -1;  // steps
};

bool overlap(const Life& a, const Life& b) { return a.first <= b.last && b.first <= a.last; }

}  // namespace

void plan(const Graph& graph, Program& program) {
  std::vector<Life> lives(graph.values.size());
  const std::vector<int>& owner = program.stands_for;
  for (int index = 0; index < static_cast<int>(program.steps.size()); ++index) {
    touch(
        program.steps[index], [&](int value) { lives[owner[value]].last = index; },
        [&](int value) {
          Life& life = lives[owner[value]];
          if (life.first < 0) life.first = index;
          life.last = index;
        });
  }
  program.slots.assign(graph.values.size(), {});
  std::vector<int> placed;
  for (int value = 0; value < static_cast<int>(graph.values.size()); ++value) {
    const Life& life = lives[value];
    if (life.first < 0) continue;
    const Value& made = graph.values[value];
    const size_t bytes = made.width() * static_cast<size_t>(bits_of(made.type)) / 8;
    const size_t width = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    // The lowest place that is free for the value's whole life; `placed` is ordered by offset.
    size_t offset = 0;
    for (const int neighbour : placed) {
      const Slot& slot = program.slots[neighbour];
      if (!overlap(life, lives[neighbour]) || offset + width <= slot.offset) continue;
      offset = std::max(offset, slot.offset + slot.width);
    }
    program.slots[value] = {offset, width};
    program.bytes_per_token = std::max(program.bytes_per_token, offset + width);
    placed.push_back(value);
    std::sort(placed.begin(), placed.end(), [&](int a, int b) { return program.slots[a].offset < program.slots[b].offset; });
  }
}

}  // namespace axc
