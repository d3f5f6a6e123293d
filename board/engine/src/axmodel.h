// axmodel format version 1: what the metadata of a file says.
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
  bool layer = false;  // else post
  std::vector<Group> groups;
};

constexpr uint32_t kMostTokens = 1 << 24;  // of M and of T

// Throws Failure when the file is not an axmodel of version 1.
Axmodel read_axmodel(Bytes file);

}  // namespace axc
