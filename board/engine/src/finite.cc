#include "finite.h"

#include <cstdint>

namespace axc {
namespace {

// Adding the exponent's lowest bit carries into the sign bit only if all exponent bits are set.
template <class Word>
bool all_finite(const void* data, size_t count, Word exponent) {
  const Word* bits = static_cast<const Word*>(data);
  const Word lowest = static_cast<Word>(exponent & -exponent), sign = static_cast<Word>(Word{1} << (8 * sizeof(Word) - 1));
  Word carries = 0;
  for (size_t i = 0; i < count; ++i) carries = static_cast<Word>(carries | ((bits[i] & exponent) + lowest));
  return !(carries & sign);
}

bool all_finite(const void* data, size_t count, Type type) {
  switch (type) {
    case Type::Float: return all_finite<uint32_t>(data, count, 0x7F800000);
    case Type::Float16: return all_finite<uint16_t>(data, count, 0x7C00);
    case Type::BFloat16: return all_finite<uint16_t>(data, count, 0x7F80);
    default: return true;
  }
}

}  // namespace

std::optional<NotFinite> first_not_finite(const Model& model, uint32_t tokens, uint32_t history,
                                          const std::vector<void*>& outputs) {
  std::optional<NotFinite> first;
  for (size_t output = 0; output < outputs.size(); ++output) {
    const Value& value = model.graph.values[model.graph.outputs[output]];
    const size_t element = static_cast<size_t>(bits_of(value.type)) / 8;
    const size_t count = model.bytes(model.graph.outputs[output], tokens, history) / element;
    const size_t width = value.width() ? value.width() : count, bytes = width * element;
    const uint8_t* rows = static_cast<const uint8_t*>(outputs[output]);
    if (!rows || all_finite(rows, count, value.type)) continue;
    size_t row = 0;
    while (all_finite(rows + row * bytes, width, value.type)) ++row;
    if (!first || row < first->row) first = {output, row};
  }
  return first;
}

}  // namespace axc
