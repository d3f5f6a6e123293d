// libax_sys: memory that the NPU and the CPU both see. 0 is success, anything else a code of axc_errors.h.
#pragma once

#include "ax_base_type.h"

#ifdef __cplusplus
extern "C" {
#endif

// Comes first: what allocates, synchronises or maps memory fails before it, and AX_ENGINE_Init does. Each AX_SYS_Init
// has its AX_SYS_Deinit.
AX_S32 AX_SYS_Init(void);
AX_S32 AX_SYS_Deinit(void);

// `token` names the owner. A block is zeroed, its base aligned to `align` bytes (a power of two; 0: a page).
AX_S32 AX_SYS_MemAlloc(AX_U64* phyaddr, AX_VOID** pviraddr, AX_U32 size, AX_U32 align, const AX_S8* token);
AX_S32 AX_SYS_MemAllocCached(AX_U64* phyaddr, AX_VOID** pviraddr, AX_U32 size, AX_U32 align, const AX_S8* token);
AX_S32 AX_SYS_MemFree(AX_U64 phyaddr, AX_VOID* pviraddr);
AX_S32 AX_SYS_MflushCache(AX_U64 phyaddr, AX_VOID* pviraddr, AX_U32 size);
AX_S32 AX_SYS_MinvalidateCache(AX_U64 phyaddr, AX_VOID* pviraddr, AX_U32 size);

// Another view of what is allocated: any range inside one block.
AX_VOID* AX_SYS_Mmap(AX_U64 phyaddr, AX_U32 size);
AX_VOID* AX_SYS_MmapCache(AX_U64 phyaddr, AX_U32 size);
AX_VOID* AX_SYS_MmapFast(AX_U64 phyaddr, AX_U32 size);
AX_VOID* AX_SYS_MmapCacheFast(AX_U64 phyaddr, AX_U32 size);
AX_S32 AX_SYS_Munmap(AX_VOID* pviraddr, AX_U32 size);

#ifdef AXC_CHIP_AX630C
typedef enum { NONE_CHIP_TYPE = 0, AX620Q_CHIP = 1, AX630C_CHIP = 4 } AX_CHIP_TYPE_E;
AX_CHIP_TYPE_E AX_SYS_GetChipType(void);
#endif

#ifdef __cplusplus
}
#endif
