#define AXC_CHIP_AX630C
#include "ax_engine_api.h"
#include "axc_errors.h"
#include "chip/chip.h"

const axc::Chip axc::kChip{"AX630C", 2, 2};

extern "C" {

AX_S32 AX_ENGINE_GetTotalOps(AX_VOID) { return 0; }
AX_S32 AX_ENGINE_GetThrottle(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }
AX_S32 AX_ENGINE_SetThrottle(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }
AX_S32 AX_ENGINE_GetThrottleConfig(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }
AX_S32 AX_ENGINE_DestroyKernelHandle(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }

}  // extern "C"
