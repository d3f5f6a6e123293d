// Scales and zero points of weights as the kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "kernels/kernels.h"
#include "onnx.h"

namespace axc {

// Gives weights their scales: in place where the kernels read them as they are stored, else from arrays made here, each
// once for all weights that have it.
class ScaleStore {
 public:
  // `limit`: bytes that the arrays may take.
  explicit ScaleStore(size_t limit = 0) : limit_(limit) {}

  // Completes a weight of integer levels whose `block` is that of the file. A block that is no group of integer arithmetic
  // becomes several that are, where it can. False where the arrays would take too much.
  bool complete(Matrix& weight, const Tensor& scales, const Tensor* zeros);

 private:
  using Key = std::tuple<const Tensor*, size_t, size_t, size_t>;  // and columns, block and group of the weight

  const uint8_t* spread(const Matrix& weight, const Tensor& tensor, size_t group);

  std::map<Key, std::unique_ptr<uint8_t[]>> arrays_;
  size_t bytes_ = 0, limit_;
};

}  // namespace axc
