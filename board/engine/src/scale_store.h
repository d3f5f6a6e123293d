// Scales and zero points of weights in the layout of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "kernels/kernels.h"
#include "onnx.h"

namespace axc {

// Provides scales: those in the file if the kernels can read their layout, else converted copies, shared by weights with
// the same tensor.
class ScaleStore {
 public:
  // `limit`: maximum bytes of all copies.
  explicit ScaleStore(size_t limit = 0) : limit_(limit) {}

  // Adds scales to a weight of integer levels whose `block` is the file's. A block size without an integer kernel is split
  // into one that has a kernel, if possible. Returns false if the copies would exceed the limit.
  bool complete(Matrix& weight, const Tensor& scales, const Tensor* zeros);

 private:
  using Key = std::tuple<const Tensor*, size_t, size_t, size_t>;  // tensor; columns, block and group of the weight

  const uint8_t* spread(const Matrix& weight, const Tensor& tensor, size_t group);

  std::map<Key, std::unique_ptr<uint8_t[]>> arrays_;
  size_t bytes_ = 0, limit_;
};

}  // namespace axc
