// libax_engine: the vendor's C interface to the inference engine, declared from its documented layout.
#pragma once

#include "ax_base_type.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void* AX_ENGINE_HANDLE;
typedef void* AX_ENGINE_CONTEXT_T;
typedef void* AX_ENGINE_EXECUTION_CONTEXT;
typedef AX_U32 AX_ENGINE_NPU_SET_T;  // a bit for each core
typedef AX_U32 AX_KERNEL_HANDLE;

#ifdef AXC_CHIP_AX630C
typedef enum {
  AX_ENGINE_VIRTUAL_NPU_DISABLE = 0,
  AX_ENGINE_VIRTUAL_NPU_ENABLE = 1,
  AX_ENGINE_VIRTUAL_NPU_BUTT = 2,
} AX_ENGINE_NPU_MODE_T;

// Half of the core, or all of it.
typedef enum {
  AX_ENGINE_MODEL_TYPE0 = 0,
  AX_ENGINE_MODEL_TYPE1 = 1,
  AX_ENGINE_MODEL_TYPE_BUTT = 2,
} AX_ENGINE_MODEL_TYPE_T;
#else
typedef enum {
  AX_ENGINE_VIRTUAL_NPU_DISABLE = 0,
  AX_ENGINE_VIRTUAL_NPU_STD = 1,
  AX_ENGINE_VIRTUAL_NPU_BIG_LITTLE = 2,
  AX_ENGINE_VIRTUAL_NPU_LITTLE_BIG = 3,
  AX_ENGINE_VIRTUAL_NPU_BUTT = 4,
} AX_ENGINE_NPU_MODE_T;

// One, two or three cores.
typedef enum {
  AX_ENGINE_MODEL_TYPE0 = 0,
  AX_ENGINE_MODEL_TYPE1 = 1,
  AX_ENGINE_MODEL_TYPE2 = 2,
  AX_ENGINE_MODEL_TYPE_BUTT = 3,
} AX_ENGINE_MODEL_TYPE_T;
#endif

typedef enum {
  AX_ENGINE_TENSOR_LAYOUT_UNKNOWN = 0,
  AX_ENGINE_TENSOR_LAYOUT_NHWC = 1,
  AX_ENGINE_TENSOR_LAYOUT_NCHW = 2,
} AX_ENGINE_TENSOR_LAYOUT_T;

typedef enum { AX_ENGINE_MT_PHYSICAL = 0, AX_ENGINE_MT_VIRTUAL = 1, AX_ENGINE_MT_OCM = 2 } AX_ENGINE_MEMORY_TYPE_T;

typedef enum {
  AX_ENGINE_DT_UNKNOWN = 0,
  AX_ENGINE_DT_UINT8 = 1,
  AX_ENGINE_DT_UINT16 = 2,
  AX_ENGINE_DT_FLOAT32 = 3,
  AX_ENGINE_DT_SINT16 = 4,
  AX_ENGINE_DT_SINT8 = 5,
  AX_ENGINE_DT_SINT32 = 6,
  AX_ENGINE_DT_UINT32 = 7,
  AX_ENGINE_DT_FLOAT64 = 8,
  AX_ENGINE_DT_BFLOAT16 = 9,
  AX_ENGINE_DT_UINT10_PACKED = 100,
  AX_ENGINE_DT_UINT12_PACKED = 101,
  AX_ENGINE_DT_UINT14_PACKED = 102,
  AX_ENGINE_DT_UINT16_PACKED = 103,
} AX_ENGINE_DATA_TYPE_T;

typedef enum {
  AX_ENGINE_CS_FEATUREMAP = 0,
  AX_ENGINE_CS_RAW10 = 1,
  AX_ENGINE_CS_RAW12 = 2,
  AX_ENGINE_CS_RAW16 = 3,
  AX_ENGINE_CS_NV12 = 4,
  AX_ENGINE_CS_NV21 = 5,
  AX_ENGINE_CS_RGB = 6,
  AX_ENGINE_CS_BGR = 7,
  AX_ENGINE_CS_RGBA = 8,
  AX_ENGINE_CS_GRAY = 9,
  AX_ENGINE_CS_YUV444 = 10,
  AX_ENGINE_CS_RAW14 = 11,
  AX_ENGINE_CS_RAW8 = 12,
} AX_ENGINE_COLOR_SPACE_T;

typedef struct {
  AX_ENGINE_NPU_MODE_T eHardMode;
  AX_U32 reserve[8];
} AX_ENGINE_NPU_ATTR_T;

typedef struct {
  AX_ENGINE_COLOR_SPACE_T eColorSpace;
  AX_U64 u64Reserved[18];
} AX_ENGINE_IOMETA_EX_T;

typedef struct {
  AX_CHAR* pName;  // one pointer for all groups of a handle; clients compare it
  AX_S32* pShape;
  AX_U8 nShapeSize;
  AX_ENGINE_TENSOR_LAYOUT_T eLayout;
  AX_ENGINE_MEMORY_TYPE_T eMemoryType;
  AX_ENGINE_DATA_TYPE_T eDataType;
  AX_ENGINE_IOMETA_EX_T* pExtraMeta;
  AX_U32 nSize;
  AX_U32 nQuantizationValue;
  AX_S32* pStride;
  AX_U64 u64Reserved[9];
} AX_ENGINE_IOMETA_T;

typedef struct {
  AX_ENGINE_IOMETA_T* pInputs;
  AX_U32 nInputSize;
  AX_ENGINE_IOMETA_T* pOutputs;
  AX_U32 nOutputSize;
  AX_U32 nMaxBatchSize;
  AX_BOOL bDynamicBatchSize;
  AX_U64 u64Reserved[11];
} AX_ENGINE_IO_INFO_T;

typedef struct {
  AX_U64 phyAddr;
  AX_VOID* pVirAddr;
  AX_U32 nSize;
  AX_S32* pStride;
  AX_U8 nStrideSize;
  AX_U64 u64Reserved[11];
} AX_ENGINE_IO_BUFFER_T;

typedef struct {
  AX_U32 nWbtIndex;
  AX_U64 u64Reserved[7];
} AX_ENGINE_IO_SETTING_T;

typedef struct {
  AX_ENGINE_IO_BUFFER_T* pInputs;
  AX_U32 nInputSize;
  AX_ENGINE_IO_BUFFER_T* pOutputs;
  AX_U32 nOutputSize;
  AX_U32 nBatchSize;
  AX_ENGINE_IO_SETTING_T* pIoSetting;
  AX_U32 nParallelRun;
  AX_U64 u64Reserved[10];  // some clients pass 8 bytes less: nothing behind nParallelRun is read
} AX_ENGINE_IO_T;

typedef struct {
  AX_ENGINE_NPU_SET_T nNpuSet;
  AX_S8* pName;
  AX_U32 reserve[8];
} AX_ENGINE_HANDLE_EXTRA_T;

typedef struct {
  AX_U32 nCMMSize;
} AX_ENGINE_CMM_INFO, AX_ENGINE_CMM_INFO_T;

const AX_CHAR* AX_ENGINE_GetVersion(AX_VOID);
AX_S32 AX_ENGINE_Init(AX_ENGINE_NPU_ATTR_T* pNpuAttr);
AX_S32 AX_ENGINE_GetVNPUAttr(AX_ENGINE_NPU_ATTR_T* pNpuAttr);
AX_S32 AX_ENGINE_Deinit(AX_VOID);
AX_S32 AX_ENGINE_NPUReset(AX_VOID);

AX_S32 AX_ENGINE_GetModelType(const AX_VOID* pData, AX_U32 nDataSize, AX_ENGINE_MODEL_TYPE_T* pModelType);
AX_S32 AX_ENGINE_CreateHandle(AX_ENGINE_HANDLE* pHandle, const AX_VOID* pData, AX_U32 nDataSize);
AX_S32 AX_ENGINE_CreateHandleV2(AX_ENGINE_HANDLE* pHandle, const AX_VOID* pData, AX_U32 nDataSize,
                                AX_ENGINE_HANDLE_EXTRA_T* pExtraParam);
AX_S32 AX_ENGINE_DestroyHandle(AX_ENGINE_HANDLE nHandle);
AX_S32 AX_ENGINE_CreateContext(AX_ENGINE_HANDLE nHandle);
AX_S32 AX_ENGINE_CreateContextV2(AX_ENGINE_HANDLE nHandle, AX_ENGINE_CONTEXT_T* pContext);

AX_S32 AX_ENGINE_GetIOInfo(AX_ENGINE_HANDLE nHandle, AX_ENGINE_IO_INFO_T** pIO);
AX_S32 AX_ENGINE_GetGroupIOInfoCount(AX_ENGINE_HANDLE nHandle, AX_U32* pCount);
AX_S32 AX_ENGINE_GetGroupIOInfo(AX_ENGINE_HANDLE nHandle, AX_U32 nIndex, AX_ENGINE_IO_INFO_T** pIO);
AX_S32 AX_ENGINE_GetHandleModelType(AX_ENGINE_HANDLE nHandle, AX_ENGINE_MODEL_TYPE_T* pModelType);
const AX_CHAR* AX_ENGINE_GetModelToolsVersion(AX_ENGINE_HANDLE nHandle);
AX_S32 AX_ENGINE_GetCMMUsage(AX_ENGINE_HANDLE nHandle, AX_ENGINE_CMM_INFO* pCMMInfo);
AX_S32 AX_ENGINE_SetAffinity(AX_ENGINE_HANDLE nHandle, AX_ENGINE_NPU_SET_T nNpuSet);
AX_S32 AX_ENGINE_GetAffinity(AX_ENGINE_HANDLE nHandle, AX_ENGINE_NPU_SET_T* pNpuSet);

AX_S32 AX_ENGINE_RunSync(AX_ENGINE_HANDLE handle, AX_ENGINE_IO_T* pIO);
AX_S32 AX_ENGINE_RunSyncV2(AX_ENGINE_HANDLE handle, AX_ENGINE_CONTEXT_T context, AX_ENGINE_IO_T* pIO);
AX_S32 AX_ENGINE_RunGroupIOSync(AX_ENGINE_HANDLE handle, AX_ENGINE_CONTEXT_T context, AX_U32 nIndex,
                                AX_ENGINE_IO_T* pIO);

// Every vendor's library has these three, no public header has: they are there to be linked, look at no argument and
// return "not supported".
AX_S32 AX_ENGINE_CloneHandle(AX_VOID);
AX_S32 AX_ENGINE_GetExtraData(AX_VOID);
AX_S32 AX_ENGINE_GetVNPUInfo(AX_VOID);

#ifdef AXC_CHIP_AX630C
// Its presence is how clients tell an AX630C from an AX650.
AX_S32 AX_ENGINE_GetTotalOps(AX_VOID);
// As little is public about these as about AX_ENGINE_CloneHandle.
AX_S32 AX_ENGINE_GetThrottle(AX_VOID);
AX_S32 AX_ENGINE_SetThrottle(AX_VOID);
AX_S32 AX_ENGINE_GetThrottleConfig(AX_VOID);
AX_S32 AX_ENGINE_DestroyKernelHandle(AX_VOID);
#endif

#ifdef __cplusplus
}
#endif
