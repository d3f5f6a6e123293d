// A loaded axmodel: its bytes, mapped or copied, and the program made from them.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "axmodel.h"
#include "program.h"

namespace axc {

// Memory that a model's weights lie in.
class Mapping {
 public:
  // The pages of a file, shared with whoever maps it. Throws Failure.
  static Mapping of_file(const std::string& path);
  // A copy, aligned as a file would be. Throws std::bad_alloc.
  static Mapping copy_of(Bytes bytes);

  Mapping(Mapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  Mapping(const Mapping&) = delete;
  ~Mapping();
  Bytes bytes() const { return bytes_; }

 private:
  explicit Mapping(Bytes bytes) : bytes_(bytes) {}
  Bytes bytes_;
};

struct Model {
  Mapping mapping;
  Axmodel axmodel;
  Graph graph;
  Program program;
  Precision precision = Precision::Bits16;  // of activations that integer weights are multiplied with

  // Throws Failure for a file that is no axmodel this engine runs.
  explicit Model(Mapping mapping);
  Model(const Model&) = delete;

  // Bytes of an input or output with `tokens` and `history`.
  uint64_t bytes(int value, uint32_t tokens, uint32_t history) const;
};

// Runs a model on `tokens` rows after `history` cached ones. Inputs that depend on history may be null where it is 0;
// an output that is null is not delivered. Throws Failure for a position outside the rotary tables, std::bad_alloc.
void run(const Model& model, size_t tokens, size_t history, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs);

}  // namespace axc
