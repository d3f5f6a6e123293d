// Checks sizes and offsets of the C interface's structs against the documented ones.
#include <cstddef>

#include "ax_engine_api.h"

static_assert(sizeof(void*) == 8 && sizeof(AX_ENGINE_NPU_MODE_T) == 4 && sizeof(AX_ENGINE_DATA_TYPE_T) == 4);

static_assert(sizeof(AX_ENGINE_NPU_ATTR_T) == 36 && alignof(AX_ENGINE_NPU_ATTR_T) == 4);
static_assert(offsetof(AX_ENGINE_NPU_ATTR_T, reserve) == 4);

static_assert(sizeof(AX_ENGINE_IOMETA_EX_T) == 152 && offsetof(AX_ENGINE_IOMETA_EX_T, u64Reserved) == 8);

static_assert(sizeof(AX_ENGINE_IOMETA_T) == 128 && alignof(AX_ENGINE_IOMETA_T) == 8);
static_assert(offsetof(AX_ENGINE_IOMETA_T, pShape) == 8 && offsetof(AX_ENGINE_IOMETA_T, nShapeSize) == 16);
static_assert(offsetof(AX_ENGINE_IOMETA_T, eLayout) == 20 && offsetof(AX_ENGINE_IOMETA_T, eMemoryType) == 24);
static_assert(offsetof(AX_ENGINE_IOMETA_T, eDataType) == 28 && offsetof(AX_ENGINE_IOMETA_T, pExtraMeta) == 32);
static_assert(offsetof(AX_ENGINE_IOMETA_T, nSize) == 40 && offsetof(AX_ENGINE_IOMETA_T, nQuantizationValue) == 44);
static_assert(offsetof(AX_ENGINE_IOMETA_T, pStride) == 48 && offsetof(AX_ENGINE_IOMETA_T, u64Reserved) == 56);

static_assert(sizeof(AX_ENGINE_IO_INFO_T) == 128);
static_assert(offsetof(AX_ENGINE_IO_INFO_T, nInputSize) == 8 && offsetof(AX_ENGINE_IO_INFO_T, pOutputs) == 16);
static_assert(offsetof(AX_ENGINE_IO_INFO_T, nOutputSize) == 24 && offsetof(AX_ENGINE_IO_INFO_T, nMaxBatchSize) == 28);
static_assert(offsetof(AX_ENGINE_IO_INFO_T, bDynamicBatchSize) == 32 && offsetof(AX_ENGINE_IO_INFO_T, u64Reserved) == 40);

static_assert(sizeof(AX_ENGINE_IO_BUFFER_T) == 128);
static_assert(offsetof(AX_ENGINE_IO_BUFFER_T, pVirAddr) == 8 && offsetof(AX_ENGINE_IO_BUFFER_T, nSize) == 16);
static_assert(offsetof(AX_ENGINE_IO_BUFFER_T, pStride) == 24 && offsetof(AX_ENGINE_IO_BUFFER_T, nStrideSize) == 32);
static_assert(offsetof(AX_ENGINE_IO_BUFFER_T, u64Reserved) == 40);

static_assert(sizeof(AX_ENGINE_IO_SETTING_T) == 64 && offsetof(AX_ENGINE_IO_SETTING_T, u64Reserved) == 8);

static_assert(sizeof(AX_ENGINE_IO_T) == 128);
static_assert(offsetof(AX_ENGINE_IO_T, nInputSize) == 8 && offsetof(AX_ENGINE_IO_T, pOutputs) == 16);
static_assert(offsetof(AX_ENGINE_IO_T, nOutputSize) == 24 && offsetof(AX_ENGINE_IO_T, nBatchSize) == 28);
static_assert(offsetof(AX_ENGINE_IO_T, pIoSetting) == 32 && offsetof(AX_ENGINE_IO_T, nParallelRun) == 40);
static_assert(offsetof(AX_ENGINE_IO_T, u64Reserved) == 48);

static_assert(sizeof(AX_ENGINE_HANDLE_EXTRA_T) == 48 && offsetof(AX_ENGINE_HANDLE_EXTRA_T, pName) == 8);
static_assert(offsetof(AX_ENGINE_HANDLE_EXTRA_T, reserve) == 16);
static_assert(sizeof(AX_ENGINE_CMM_INFO) == 4);
