// What tells one chip's libraries from another's.
#pragma once

namespace axc {

struct Chip {
  const char* name;
  int npu_modes;  // AX_ENGINE_Init takes 0 .. npu_modes - 1
};

extern const Chip kChip;

}  // namespace axc
