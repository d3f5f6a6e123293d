// Emulates CMM, memory shared with an NPU: ordinary pages with invented physical addresses. libax_sys exports it to
// libax_engine.
#pragma once

#include <cstdint>

extern "C" {
// Bytes from `address` to the end of its block; 0 if it is in no block.
uint64_t axc_sys_room(const void* address);
// The virtual address of a physical one; null if it is in no block.
void* axc_sys_virtual(uint64_t physical);
// Whether AX_SYS_Init has been called.
int axc_sys_ready(void);
}
