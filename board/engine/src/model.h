// A loaded axmodel: its bytes, mapped or copied, and its program.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>

#include "axmodel.h"
#include "program.h"
#include "segments.h"

namespace axc {

// The memory that holds a model's file.
class Mapping {
 public:
  // Maps a file; processes share the pages. Throws Failure.
  static Mapping of_file(const std::string& path);
  // Copies, with the alignment of a mapped file. Throws std::bad_alloc.
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
  bool takes_segments;  // see segments.h
  Precision precision = Precision::Bits16;  // of activations that integer weights are multiplied with

  // Throws Failure for a file that is not an axmodel this engine can run.
  explicit Model(Mapping mapping);
  Model(const Model&) = delete;

  // Bytes of an input or output with `tokens` and `history`.
  uint64_t bytes(int value, uint32_t tokens, uint32_t history) const;
};

// Runs a model on `tokens` rows after `history` cached ones. Inputs that depend on history may be null if it is 0; null
// outputs are not delivered. Throws Failure for a position outside the rotary tables, std::bad_alloc.
void run(const Model& model, size_t tokens, size_t history, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs);

// Runs a model that takes segments on the rows of all of them, stacked. Inputs that depend on history are not read.
void run(const Model& model, std::span<const Segment> segments, const std::vector<const void*>& inputs,
         const std::vector<void*>& outputs);

}  // namespace axc
