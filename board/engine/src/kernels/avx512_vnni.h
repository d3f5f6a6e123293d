// Many tokens by byte products, whatever the CPU.
#pragma once

#include "avx512_bytes.h"

namespace axc {
namespace {

constexpr size_t kIntRows = 6;

int32_t store_levels(const int16_t* levels, const Activations&, Arithmetic order, uint8_t* out) {
  return store_bytes(levels, order, out);
}

template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, uint8_t* panel) {
  pack_bytes_int8(w, stride, rows, columns, panel);
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, uint8_t* panel) {
  pack_bytes_int4(w, stride, rows, panel);
}

template <size_t kRows, bool kScaled, Precision kPrecision>
constexpr auto int_tile = byte_tile<kRows, kScaled, kPrecision>;

}  // namespace
}  // namespace axc
