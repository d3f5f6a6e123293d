// What tells one chip's libraries from another's.
#pragma once

namespace axc {

struct Chip {
  const char* name;
  int npu_modes;    // AX_ENGINE_Init takes 0 .. npu_modes - 1
  int model_types;  // how many cores, or parts of one, a model may be for
};

extern const Chip kChip;

}  // namespace axc
