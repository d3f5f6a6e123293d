// MatMul at any rank, leading dimensions broadcast. Every sum runs over the inner dimension in order.
#include <cstring>

#include "elements.h"
#include "operators.h"

namespace axc {
namespace {

constexpr size_t kColumns = 64;  // columns of the result computed at once

// A vector on either side is a matrix with one row or one column.
struct Matrices {
  View a, b, y;
  size_t rows, inner, columns;

  explicit Matrices(const Call& call) : a(call.in[0]), b(call.in[1]), y(call.out[0]) {
    const bool row = a.rank == 1, column = b.rank == 1;
    if (row) insert(a, 0);
    if (column) insert(b, 1);
    if (row) insert(y, column ? y.rank : y.rank - 1);
    if (column) insert(y, y.rank);
    rows = a.dims[a.rank - 2], inner = a.dims[a.rank - 1], columns = b.dims[b.rank - 1];
  }

  static void insert(View& view, size_t axis) {
    for (size_t i = view.rank; i > axis; --i) view.dims[i] = view.dims[i - 1];
    view.dims[axis] = 1;
    ++view.rank;
  }
};

template <class Number>
void multiply(const Call& call, const Matrices& m) {
  using Sum = std::conditional_t<std::is_same_v<Number, float>, float, uint64_t>;
  View batch = m.y, a = m.a, b = m.b;
  batch.rank -= 2, a.rank -= 2, b.rank -= 2;
  const auto matrix = [&](const View& of, size_t index) {  // index of an operand's matrix for a batch index
    size_t at = 0, step = 1;
    for (size_t axis = batch.rank; axis--; index /= batch.dims[axis]) {
      const size_t missing = batch.rank - of.rank;
      if (axis < missing) continue;
      const size_t length = of.dims[axis - missing];
      at += length == 1 ? 0 : index % batch.dims[axis] * step;
      step *= length;
    }
    return at;
  };
  const size_t strips = (m.columns + kColumns - 1) / kColumns, items = batch.count() * m.rows * strips;
  call.each(items, kPiece / std::max<size_t>(m.inner * kColumns, 1), [&](size_t first, size_t last, size_t) {
    for (size_t item = first; item < last; ++item) {
      const size_t row = item / strips, start = item % strips * kColumns, count = std::min(kColumns, m.columns - start);
      const size_t x = (matrix(a, row / m.rows) * m.rows + row % m.rows) * m.inner;
      const size_t w = matrix(b, row / m.rows) * m.inner * m.columns + start;
      Sum sums[kColumns] = {};
      for (size_t begin = 0; begin < m.inner; begin += kRun) {
        const size_t depth = std::min(kRun, m.inner - begin);
        Number left[kRun], right[kRun];
        const Number* p = load_run(call.kernels, m.a, x + begin, 1, depth, left);
        for (size_t k = 0; k < depth; ++k) {
          const Number* q = load_run(call.kernels, m.b, w + (begin + k) * m.columns, 1, count, right);
          const Sum factor = static_cast<Sum>(p[k]);
          for (size_t j = 0; j < count; ++j) sums[j] += factor * static_cast<Sum>(q[j]);
        }
      }
      Number made[kColumns];
      for (size_t j = 0; j < count; ++j) made[j] = static_cast<Number>(sums[j]);
      store_run<Number>(call.kernels, m.y, row * m.columns + start, count, made);
    }
  });
}

}  // namespace

void infer_matmul(Infer& infer) {
  infer.expect(infer.type(0) == infer.type(1) && (is_float(infer.type(0)) || is_integer(infer.type(0))), "types");
  Shape a = infer.shape(0), b = infer.shape(1);
  infer.expect(!a.empty() && !b.empty(), "a scalar");
  const bool row = a.size() == 1, column = b.size() == 1;
  infer.expect(std::max(a.size(), b.size()) + (row || column ? 1 : 0) <= kMostRank, "rank");
  if (row) a.insert(a.begin(), Dim{1});
  if (column) b.push_back(Dim{1});
  infer.expect(a.back() == b[b.size() - 2], "shapes " + text_of(infer.shape(0)) + " and " + text_of(infer.shape(1)));
  Shape shape = broadcast(infer, {a.begin(), a.end() - 2}, {b.begin(), b.end() - 2});
  if (!row) shape.push_back(a[a.size() - 2]);
  if (!column) shape.push_back(b.back());
  infer.out(infer.type(0), shape);
}

void run_matmul(const Call& call) {
  const Matrices matrices(call);
  if (!matrices.y.count()) return;
  is_float(matrices.y.type) ? multiply<float>(call, matrices) : multiply<int64_t>(call, matrices);
}

}  // namespace axc
