// Shares buffers between shape groups as M5Stack's context runner does: which input is a cache is known by comparing the
// pointers of the names, and the groups in the middle take the last one's buffers by their index.
// Arguments: an axmodel with a decode group and at least three prefill groups; a file to write an output to.
#include <ax_engine_api.h>
#include <ax_ivps_api.h>
#include <ax_sys_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#define CHECK(call)                                                                            \
  do {                                                                                         \
    if (!(call)) std::printf("line %d: %s does not hold\n", __LINE__, #call), std::exit(1); \
  } while (0)

namespace {

using Buffers = std::vector<AX_ENGINE_IO_BUFFER_T>;

void allocate(AX_ENGINE_IO_BUFFER_T& buffer, AX_U32 size) {
  buffer.nSize = size;
  const AX_S8* tag = reinterpret_cast<const AX_S8*>("npu");
  CHECK(AX_SYS_MemAllocCached(&buffer.phyAddr, &buffer.pVirAddr, size, 128, tag) == 0);
  std::memset(buffer.pVirAddr, 0, size);
}

// Values around 1 of one kind for each tensor, positions behind the history, a mask that shows everything.
void fill(const AX_ENGINE_IOMETA_T& meta, AX_ENGINE_IO_BUFFER_T& buffer, AX_U32 history) {
  const std::string name = meta.pName;
  for (AX_U32 i = 0; name == "indices" && i < meta.nSize / 4; ++i) static_cast<AX_U32*>(buffer.pVirAddr)[i] = history + i;
  for (AX_U32 i = 0; name != "indices" && name != "mask" && i < meta.nSize / 2; ++i) {
    const AX_U32 kind = static_cast<AX_U32>(name[0]) + i;
    static_cast<AX_U16*>(buffer.pVirAddr)[i] = static_cast<AX_U16>(0x3F00 + kind * 37 % 256 + (kind % 3 ? 0x8000 : 0));
  }
}

}  // namespace

int main(int, char** argv) {
  AX_ENGINE_NPU_ATTR_T attr;
  std::memset(&attr, 0, sizeof attr);
  CHECK(AX_SYS_Init() == 0 && AX_ENGINE_Init(&attr) == 0);
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  AX_ENGINE_HANDLE handle = nullptr;
  AX_ENGINE_CONTEXT_T context = nullptr;
  CHECK(AX_ENGINE_CreateHandle(&handle, bytes.data(), static_cast<AX_U32>(bytes.size())) == 0);
  CHECK(AX_ENGINE_CreateContext(handle) == 0 && AX_ENGINE_CreateContextV2(handle, &context) == 0);

  AX_U32 groups = 0;
  CHECK(AX_ENGINE_GetGroupIOInfoCount(handle, &groups) == 0 && groups >= 4);
  std::vector<AX_ENGINE_IO_INFO_T*> infos(groups);
  for (AX_U32 g = 0; g < groups; ++g) CHECK(AX_ENGINE_GetGroupIOInfo(handle, g, &infos[g]) == 0);

  // One pointer for each name of the handle, however it is asked for.
  AX_ENGINE_IO_INFO_T* alone = nullptr;
  CHECK(AX_ENGINE_GetIOInfo(handle, &alone) == 0);
  infos.push_back(alone);
  std::set<std::string> names;
  std::set<const void*> pointers;
  for (const AX_ENGINE_IO_INFO_T* info : infos) {
    for (AX_U32 i = 0; i < info->nInputSize; ++i) names.insert(info->pInputs[i].pName), pointers.insert(info->pInputs[i].pName);
    for (AX_U32 i = 0; i < info->nOutputSize; ++i) names.insert(info->pOutputs[i].pName), pointers.insert(info->pOutputs[i].pName);
  }
  CHECK(names.size() == 8 && pointers.size() == names.size());
  infos.pop_back();

  // The decode group has buffers of its own; the last one all but the caches; those between, the last one's.
  std::vector<Buffers> inputs(groups), outputs(groups);
  const AX_U32 last = groups - 1;
  for (const AX_U32 g : {AX_U32{0}, last}) {
    inputs[g].resize(infos[g]->nInputSize);
    outputs[g].resize(infos[g]->nOutputSize);
    for (AX_U32 i = 0; i < infos[g]->nOutputSize; ++i) allocate(outputs[g][i], infos[g]->pOutputs[i].nSize);
    for (AX_U32 i = 0; i < infos[g]->nInputSize; ++i) {
      const AX_ENGINE_IOMETA_T& meta = infos[g]->pInputs[i];
      if (g) {
        for (AX_U32 j = 0; j < infos[0]->nInputSize; ++j) {
          const bool cache = std::string(meta.pName).find("_cache") != std::string::npos;
          if (cache && meta.pName == infos[0]->pInputs[j].pName) inputs[g][i] = inputs[0][j];  // pointers, not text
        }
      }
      const bool cache = std::string(meta.pName).find("_cache") != std::string::npos;
      if (!g || !cache) allocate(inputs[g][i], meta.nSize);
      CHECK(inputs[g][i].pVirAddr);  // else: no name of group 0 has this pointer
      fill(meta, inputs[g][i], g ? 32 : 255);
    }
  }
  for (AX_U32 g = 1; g < last; ++g) inputs[g] = inputs[last], outputs[g] = outputs[last];

  for (AX_U32 g = 0; g < groups; ++g) {
    AX_ENGINE_IO_T io;
    std::memset(&io, 0, sizeof io);
    io.pInputs = inputs[g].data(), io.nInputSize = infos[g]->nInputSize;
    io.pOutputs = outputs[g].data(), io.nOutputSize = infos[g]->nOutputSize;
    std::memset(io.pOutputs[2].pVirAddr, 0, infos[g]->pOutputs[2].nSize);
    CHECK(AX_ENGINE_RunGroupIOSync(handle, context, g, &io) == 0);
    if (g != 2) continue;
    std::ofstream out(argv[2], std::ios::binary);
    for (AX_U32 i = 0; i < io.nInputSize; ++i) out.write(static_cast<char*>(io.pInputs[i].pVirAddr), infos[g]->pInputs[i].nSize);
    out.write(static_cast<char*>(io.pOutputs[2].pVirAddr), infos[g]->pOutputs[2].nSize);
  }
  CHECK(names.count(infos[0]->pInputs[0].pName));  // still there before DestroyHandle
  CHECK(AX_ENGINE_DestroyHandle(handle) == 0 && AX_ENGINE_Deinit() == 0 && AX_SYS_Deinit() == 0);
  std::puts("done");
}
