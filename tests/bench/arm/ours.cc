// One product of 8 rows of a weight with some tokens, between two marks in the trace of its instructions.
// Arguments: type of the weight (s8: one scale a row; b8: 8 bits in groups; s4), columns that share a scale, columns,
// tokens, bits of the activations.
#include "kernels.h"
#include "freestanding.h"

namespace axc {
int bits_of(Type type) { return type == Type::Int4 ? 4 : type == Type::Int8 ? 8 : type == Type::Float16 ? 16 : 32; }
}  // namespace axc

int traced(char** arguments) {
  using namespace axc;
  const bool by_row = arguments[1][0] == 's' && arguments[1][1] == '8', four = arguments[1][1] == '4';
  const size_t group = number(arguments[2]), columns = number(arguments[3]), tokens = number(arguments[4]), rows = 8;
  const Precision precision = number(arguments[5]) == 8 ? Precision::Bits8 : Precision::Bits16;
  const Arithmetic arithmetic = by_row ? Arithmetic::Int8 : four ? Arithmetic::Int4 : Arithmetic::Int8Blocks;

  const size_t block = by_row ? columns : group;
  float* scales = zeros<float>(rows * columns / block + 16);
  Matrix weight{arithmetic, four ? Type::Int4 : Type::Int8, zeros<uint8_t>(rows * columns), rows, columns};
  weight.block = block, weight.blocks = columns / block, weight.scale_type = Type::Float, weight.scales = scales;

  float *x = zeros<float>(tokens * columns), *y = zeros<float>(tokens * rows);
  Activations levels{precision, tokens, columns, by_row ? kBlock : group, nullptr, nullptr, nullptr, nullptr};
  const size_t entries = tokens * levels.blocks();
  levels.levels = zeros<uint8_t>(entries * kLevelBytes + 64);
  levels.scales = zeros<float>(entries * levels.groups() + 16);
  levels.sums = zeros<int32_t>(entries * levels.groups() + 16);
  uint8_t* scratch = zeros<uint8_t>(kLinearScratch);
  const LinearJob job{&weight, tokens, x, &levels, nullptr, nullptr, y, rows, 0, &weight, 0};
  trace_begin();
  KERNELS.linear(job, 0, rows, scratch);
  trace_end();
  return 0;
}
