// A tensor in memory.
#pragma once

#include <array>

#include "../onnx.h"
#include "../shape.h"

namespace axc {

// Dense, in C order.
struct View {
  Type type = Type::None;  // None: not given
  uint8_t* data = nullptr;
  size_t rank = 0;
  std::array<size_t, kMostRank> dims{};

  size_t count() const { return product(0, rank); }
  size_t product(size_t first, size_t last) const {
    size_t product = 1;
    for (size_t i = first; i < last; ++i) product *= dims[i];
    return product;
  }
  size_t element() const { return static_cast<size_t>(bits_of(type)) / 8; }  // bytes; not for 4-bit types
  float* floats() const { return reinterpret_cast<float*>(data); }
};

}  // namespace axc
