// The metadata of axmodel format version 1.
#pragma once

#include <vector>

#include "onnx.h"

namespace axc {

struct Group {
  uint32_t tokens;   // M
  uint32_t history;  // T; 0: the group has no cache input
};

struct Axmodel {
  Onnx onnx;
  bool layer = false;  // otherwise the post model
  std::vector<Group> groups;
};

constexpr uint32_t kMostTokens = 1 << 24;  // limit for M and T

// Throws Failure if the file is not an axmodel of version 1.
Axmodel read_axmodel(Bytes file);

}  // namespace axc
