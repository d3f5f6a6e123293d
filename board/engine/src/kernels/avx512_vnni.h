// Many tokens by products of bytes.
#pragma once

#include "avx512_bytes.h"

#include "integer_rows.h"

namespace axc {
namespace {

inline void dots(const Matrix& w, size_t row, const Activations& a, size_t token, float* out) {
  (a.precision == Precision::Bits8 ? dots_in<Precision::Bits8> : dots_in<Precision::Bits16>)(w, row, a, token, out);
}

constexpr size_t kIntRows = 6;

void store_levels(const int16_t* levels, const Activations& of, Arithmetic order, uint8_t* out, int32_t* sums) {
  of.rows > kTokensByDot ? store_unsigned(levels, of.precision, order, out) : store_bytes(levels, of.group, order, out, sums);
}

template <Precision>
void pack_int8(const int8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  pack_bytes_int8(w, stride, rows, columns, group, panel);
}

template <Precision>
void pack_int4(const uint8_t* w, size_t stride, size_t rows, size_t columns, size_t group, uint8_t* panel) {
  pack_bytes_int4(w, stride, rows, columns, group, panel);
}

template <size_t kRows, size_t kGroup, Precision kPrecision>
constexpr auto int_tile = bytes_tile<kRows, kGroup, kPrecision>;

}  // namespace
}  // namespace axc
