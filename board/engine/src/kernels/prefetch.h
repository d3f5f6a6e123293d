// Prefetching into the second-level cache.
#pragma once

#include "vectors.h"

namespace axc {
namespace {

// Every line that holds one of these bytes: rows of weights begin anywhere in a line.
inline void fetch(const uint8_t* from, size_t bytes) {
  constexpr size_t kLine = 64;
  const uint8_t* const end = from + bytes;
  for (from -= reinterpret_cast<uintptr_t>(from) % kLine; from < end; from += kLine) __builtin_prefetch(from, 0, 2);
}

// Prefetches the part of a weight that is packed next, a few rows before each tile: its rows are too far apart for the
// hardware prefetcher, and all of them at once would delay the tiles.
class Prefetcher {
 public:
  // Columns [first, first + columns) of at most `most` rows from `row` on, spread over the given number of tiles.
  Prefetcher(const Matrix& w, size_t row, size_t end, size_t most, size_t first, size_t columns, size_t tiles)
      : stride_(w.stride()), data_(w.data + row * stride_ + first * stride_ / w.columns),
        bytes_(least(columns, w.columns - first) * stride_ / w.columns), rows_(row < end ? least(most, end - row) : 0),
        step_((rows_ + tiles - 1) / tiles) {}

  void some() {
    for (const size_t last = least(next_ + step_, rows_); next_ < last; ++next_) fetch(data_ + next_ * stride_, bytes_);
  }

 private:
  size_t stride_;
  const uint8_t* data_;
  size_t bytes_, rows_, step_, next_ = 0;
};

// What is read two parts behind the columns [first, first + columns) of the panel at `row`: its next columns, the job's
// next rows, or the thread's next weight. When few tokens share a panel, one part ahead would arrive too late.
inline Prefetcher behind(const LinearJob& job, size_t row, size_t last, size_t most, size_t first, size_t columns, size_t tiles) {
  const Matrix& w = *job.weight;
  size_t at = first + 2 * columns;
  if (at < w.columns) return {w, row, last, most, at, columns, tiles};
  at -= (w.columns + columns - 1) / columns * columns;
  const bool here = row + most < last;
  const Matrix& next = here ? w : *job.next;
  return {next, here ? row + most : job.next_row, here ? last : next.rows, most, at < next.columns ? at : 0, columns, tiles};
}

}  // namespace
}  // namespace axc
