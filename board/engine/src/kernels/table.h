// The table of an instruction set's functions, at the end of its file.
#pragma once

#include "attention.h"
#include "integer.h"

namespace axc {
namespace {

constexpr Kernels table(const char* name, bool (*runs_here)()) {
  return {name,       runs_here, kRoundsBfloat16, quantise, linear,    attention_scratch, attend, rms_norm,
          layer_norm, gated,     sigmoid,         tanh_of,  gelu_tanh, softmax,           rotate, widen,    narrow};
}

}  // namespace
}  // namespace axc
