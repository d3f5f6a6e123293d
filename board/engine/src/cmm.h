// The memory that clients believe to be contiguous and shared with an NPU: ordinary pages with made-up physical
// addresses. Exported by libax_sys for libax_engine.
#pragma once

#include <cstdint>

extern "C" {
// Bytes from `address` to the end of the block it lies in; 0 when it lies in none.
uint64_t axc_sys_room(const void* address);
// The virtual address of a physical one; null when it lies in no block.
void* axc_sys_virtual(uint64_t physical);
// Whether AX_SYS_Init has been called.
int axc_sys_ready(void);
}
