#include "scale_store.h"

#include <cstring>
#include <numeric>

namespace axc {
namespace {

// Copies one element; 4-bit elements become int8_t.
void copy_element(const Tensor& tensor, size_t index, uint8_t* to) {
  if (tensor.type == Type::Int4) {
    *to = static_cast<uint8_t>(((tensor.bytes()[index / 2] >> index % 2 * 4 & 15) ^ 8) - 8);
  } else {
    const size_t bytes = static_cast<size_t>(bits_of(tensor.type)) / 8;
    std::memcpy(to, tensor.bytes() + index * bytes, bytes);
  }
}

size_t groups_of(const Matrix& weight, size_t group) { return (weight.columns + group - 1) / group; }

}  // namespace

bool ScaleStore::complete(Matrix& weight, const Tensor& scales, const Tensor* zeros) {
  const bool by_row = weight.block >= weight.columns;
  size_t group = weight.block;
  const bool levels = weight.type == Type::Int8 || weight.type == Type::Int4;
  if (!levels) {
    weight.arithmetic = Arithmetic::Float;
  } else if (by_row && weight.type == Type::Int8 && !zeros) {
    weight.arithmetic = Arithmetic::Int8;
  } else {
    const size_t common = by_row ? kBlock : std::gcd(weight.block, kBlock);
    if (common >= kLeastGroup) {
      weight.arithmetic = weight.type == Type::Int4 ? Arithmetic::Int4 : Arithmetic::Int8Blocks;
      group = common;
    }
  }
  weight.scale_type = scales.type;
  weight.scales = group == weight.block ? scales.bytes() : spread(weight, scales, group);
  if (!weight.scales) return false;
  if (zeros) {
    const bool in_place = group == weight.block && zeros->type == Type::Int8;
    weight.zeros = reinterpret_cast<const int8_t*>(in_place ? zeros->bytes() : spread(weight, *zeros, group));
    if (!weight.zeros) return false;
  }
  weight.block = group;
  weight.blocks = groups_of(weight, group);
  return true;
}

// Repeats the elements of `tensor` for blocks of `group` columns; `group` divides the weight's block, or exceeds a row.
const uint8_t* ScaleStore::spread(const Matrix& weight, const Tensor& tensor, size_t group) {
  std::unique_ptr<uint8_t[]>& array = arrays_[{&tensor, weight.columns, weight.block, group}];
  if (array) return array.get();
  const size_t element = (static_cast<size_t>(bits_of(tensor.type)) + 7) / 8, from = weight.blocks;
  const size_t to = groups_of(weight, group), bytes = weight.rows * to * element;
  if (bytes > limit_ - bytes_) return nullptr;
  array = std::make_unique<uint8_t[]>(bytes);
  bytes_ += bytes;
  for (size_t row = 0; row < weight.rows; ++row) {
    for (size_t i = 0; i < to; ++i) {
      copy_element(tensor, row * from + i * group / weight.block, array.get() + (row * to + i) * element);
    }
  }
  return array.get();
}

}  // namespace axc
