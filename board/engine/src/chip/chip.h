// The differences between the chips' libraries.
#pragma once

namespace axc {

struct Chip {
  const char* name;
  int npu_modes;    // AX_ENGINE_Init accepts 0 .. npu_modes - 1
  int model_types;  // number of core configurations that a model can be compiled for
};

extern const Chip kChip;

}  // namespace axc
