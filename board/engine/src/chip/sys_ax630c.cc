#define AXC_CHIP_AX630C
#include "ax_sys_api.h"

extern "C" AX_CHIP_TYPE_E AX_SYS_GetChipType(void) { return AX630C_CHIP; }
