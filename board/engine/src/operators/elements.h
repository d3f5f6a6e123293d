// Loops over the elements of broadcast tensors in short runs, converted to one type.
#pragma once

#include <cstring>

#include "operator.h"

namespace axc {

constexpr size_t kRun = 512;  // elements converted at once

// Loads `count` elements with the given stride as Number: float for floats, int64_t for integers and booleans. Returns a
// pointer to them, in the tensor or in `buffer`.
template <class Number>
const Number* load_run(const Kernels& kernels, const View& view, size_t offset, size_t stride, size_t count, Number* buffer);

// The inverse of load_run; integers wrap around, as in the standard.
template <class Number>
void store_run(const Kernels& kernels, const View& view, size_t offset, size_t count, const Number* from);

// Dimensions of a result and the strides of each operand along them; adjacent dimensions are merged if all strides allow.
template <size_t kOperands>
struct Walk {
  size_t rank = 0;
  std::array<size_t, kMostRank + 1> dims{};
  std::array<std::array<size_t, kMostRank + 1>, kOperands> strides{};

  Walk(const View& result, const std::array<const View*, kOperands>& operands) {
    for (size_t axis = 0; axis < result.rank; ++axis) {
      std::array<size_t, kOperands> step{};
      for (size_t i = 0; i < kOperands; ++i) {
        const View& seen = *operands[i];
        const size_t missing = result.rank - seen.rank;
        const bool moves = axis >= missing && seen.dims[axis - missing] != 1;
        step[i] = moves ? seen.product(axis - missing + 1, seen.rank) : 0;
      }
      add(result.dims[axis], step);
    }
    if (!rank) add(1, {});
  }

  void add(size_t length, const std::array<size_t, kOperands>& step) {
    if (length == 1 && rank) return;
    bool joins = rank > 0;
    for (size_t i = 0; i < kOperands && joins; ++i) joins = strides[i][rank - 1] == step[i] * length;
    if (!joins && rank == 1 && dims[0] == 1) rank = 0, joins = false;
    if (!joins) ++rank;
    dims[rank - 1] = joins ? dims[rank - 1] * length : length;
    for (size_t i = 0; i < kOperands; ++i) strides[i][rank - 1] = step[i];
  }

  // body(first element of the result, offsets, count): runs along the last dimension, shared among threads.
  template <class Body>
  void each(const Call& call, const Body& body) const {
    const size_t inner = dims[rank - 1];
    size_t outer = 1;
    for (size_t i = 0; i + 1 < rank; ++i) outer *= dims[i];
    if (!inner || !outer) return;
    const size_t runs = (inner + kRun - 1) / kRun;
    call.each(outer * runs, kPiece / std::min(inner, kRun), [&](size_t first, size_t last, size_t) {
      for (size_t item = first; item < last; ++item) {
        const size_t start = item % runs * kRun;
        std::array<size_t, kOperands> offsets{};
        size_t left = item / runs;
        for (size_t axis = rank - 1; axis--;) {
          for (size_t i = 0; i < kOperands; ++i) offsets[i] += left % dims[axis] * strides[i][axis];
          left /= dims[axis];
        }
        for (size_t i = 0; i < kOperands; ++i) offsets[i] += start * strides[i][rank - 1];
        body(item / runs * inner + start, offsets, std::min(kRun, inner - start));
      }
    });
  }
  size_t stride(size_t operand) const { return strides[operand][rank - 1]; }
};

}  // namespace axc
