// Drives the C interface as the vendor's C++ runner does: buffers from `new` without zeroing, sizes only from the
// group's description, caches shared by all groups and larger than a tensor, dynamic unloading.
// Arguments: an axmodel with a decode group 0 and a prefill group 1; how many times to load and unload it.
#include <ax_engine_api.h>
#include <ax_sys_api.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#define CHECK(call)                                                                       \
  do {                                                                                    \
    const long long seen_ = static_cast<long long>(call);                                 \
    if (!seen_) std::printf("line %d: %s does not hold\n", __LINE__, #call), std::exit(1); \
  } while (0)

namespace {

const AX_S8* tag(const char* name) { return reinterpret_cast<const AX_S8*>(name); }

struct Buffers {
  AX_ENGINE_IO_T io;
  std::map<std::string, AX_ENGINE_IO_BUFFER_T*> named;
};

// The members a careless client leaves as they are hold garbage.
AX_ENGINE_IO_BUFFER_T* careless(AX_U32 count) {
  auto* buffers = new AX_ENGINE_IO_BUFFER_T[count];
  std::memset(static_cast<void*>(buffers), 0xA5, count * sizeof *buffers);
  return buffers;
}

Buffers prepare(const AX_ENGINE_IO_INFO_T* info, const std::map<std::string, AX_ENGINE_IO_BUFFER_T*>& shared, bool null_caches) {
  Buffers made;
  std::memset(static_cast<void*>(&made.io), 0, sizeof made.io);
  made.io.nInputSize = info->nInputSize;
  made.io.nOutputSize = info->nOutputSize;
  made.io.pInputs = careless(info->nInputSize);
  made.io.pOutputs = careless(info->nOutputSize);
  const auto fill = [&](const AX_ENGINE_IOMETA_T& meta, AX_ENGINE_IO_BUFFER_T& buffer, bool cached) {
    const std::string name = meta.pName;
    made.named[name] = &buffer;
    if (null_caches && (name == "K_cache" || name == "V_cache")) {
      buffer.phyAddr = 0;
      buffer.pVirAddr = nullptr;
    } else if (const auto found = shared.find(name); found != shared.end()) {
      buffer.phyAddr = found->second->phyAddr;
      buffer.pVirAddr = found->second->pVirAddr;
      buffer.nSize = 2 * meta.nSize + 64;  // an aliased buffer may say more than the tensor has
    } else {
      const auto allocate = cached ? AX_SYS_MemAllocCached : AX_SYS_MemAlloc;
      CHECK(allocate(&buffer.phyAddr, &buffer.pVirAddr, 2 * meta.nSize + 64, 128, tag("npu")) == 0);
      CHECK(reinterpret_cast<size_t>(buffer.pVirAddr) % 128 == 0);
      std::memset(buffer.pVirAddr, 0, meta.nSize);
    }
  };
  for (AX_U32 i = 0; i < info->nInputSize; ++i) fill(info->pInputs[i], made.io.pInputs[i], false);
  for (AX_U32 i = 0; i < info->nOutputSize; ++i) fill(info->pOutputs[i], made.io.pOutputs[i], true);
  return made;
}

AX_ENGINE_HANDLE load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  auto* bytes = new std::vector<char>(std::istreambuf_iterator<char>(file), {});
  AX_ENGINE_HANDLE handle = nullptr;
  CHECK(AX_ENGINE_CreateHandle(&handle, bytes->data(), static_cast<AX_U32>(bytes->size())) == 0);
  std::memset(bytes->data(), 0, bytes->size());  // the data may go right after the call
  delete bytes;
  return handle;
}

// Counted page by page: what statm and status say may be off by dozens of pages for each processor.
size_t resident_kb() {
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string word; rollup >> word;) {
    size_t kb = 0;
    if (word == "Rss:" && rollup >> kb) return kb;
  }
  return 0;
}

std::vector<char> content(const AX_ENGINE_IO_BUFFER_T& buffer, AX_U32 size) {
  const char* from = static_cast<const char*>(buffer.pVirAddr);
  return {from, from + size};
}

// Inputs with positions, bfloat16 values around 1 and a mask that shows everything.
void set_inputs(Buffers& buffers, const AX_ENGINE_IO_INFO_T* info, AX_U32 position) {
  for (AX_U32 i = 0; i < info->nInputSize; ++i) {
    const AX_ENGINE_IOMETA_T& meta = info->pInputs[i];
    AX_ENGINE_IO_BUFFER_T& buffer = buffers.io.pInputs[i];
    if (!buffer.pVirAddr) continue;
    const std::string name = meta.pName;
    for (AX_U32 at = 0; name == "indices" && at < meta.nSize / 4; ++at) static_cast<AX_U32*>(buffer.pVirAddr)[at] = position + at;
    for (AX_U32 at = 0; name != "indices" && name != "mask" && at < meta.nSize / 2; ++at) {
      static_cast<AX_U16*>(buffer.pVirAddr)[at] = static_cast<AX_U16>(0x3F00 + at * 37 % 256 + (at % 3 ? 0x8000 : 0));
    }
    CHECK(AX_SYS_MflushCache(buffer.phyAddr, buffer.pVirAddr, meta.nSize) == 0);
  }
}

}  // namespace

int main(int, char** argv) {
  AX_ENGINE_NPU_ATTR_T attr;
  AX_ENGINE_HANDLE early = nullptr;
  CHECK(AX_ENGINE_GetVNPUAttr(&attr) != 0);
  CHECK(static_cast<AX_U32>(AX_ENGINE_CreateHandle(&early, "x", 1)) == 0x80060012u);
  std::memset(&attr, 0, sizeof attr);
  AX_SYS_Init();
  CHECK(AX_ENGINE_Init(&attr) == 0);
  attr.eHardMode = AX_ENGINE_VIRTUAL_NPU_BUTT;
  CHECK(AX_ENGINE_GetVNPUAttr(&attr) == 0 && attr.eHardMode == AX_ENGINE_VIRTUAL_NPU_DISABLE);

  AX_ENGINE_HANDLE handle = load(argv[1]);
  AX_ENGINE_CONTEXT_T context = nullptr;
  CHECK(AX_ENGINE_CreateContext(handle) == 0 && AX_ENGINE_CreateContextV2(handle, &context) == 0 && context);
  AX_U32 groups = 0;
  CHECK(AX_ENGINE_GetGroupIOInfoCount(handle, &groups) == 0 && groups >= 2);
  AX_ENGINE_IO_INFO_T *decode = nullptr, *prefill = nullptr;
  CHECK(AX_ENGINE_GetGroupIOInfo(handle, 0, &decode) == 0 && AX_ENGINE_GetGroupIOInfo(handle, 1, &prefill) == 0);
  CHECK(static_cast<AX_U32>(AX_ENGINE_GetGroupIOInfo(handle, groups, &prefill)) == 0x80060017u);
  CHECK(AX_ENGINE_GetGroupIOInfo(handle, 1, &prefill) == 0);
  for (AX_U32 i = 0; i < 2; ++i) {  // dummies: one row, as wide as the hidden state
    const AX_ENGINE_IOMETA_T &meta = prefill->pInputs[i], &hidden = prefill->pInputs[3];
    CHECK(meta.nShapeSize == 3 && meta.pShape[1] == 1 && meta.pShape[2] == hidden.pShape[2]);
    CHECK(meta.eDataType == AX_ENGINE_DT_BFLOAT16 && prefill->pInputs[2].eDataType == AX_ENGINE_DT_UINT32);
  }

  Buffers first = prepare(decode, {}, false);
  Buffers second = prepare(prefill, {}, true);
  set_inputs(first, decode, 7);
  set_inputs(second, prefill, 0);
  CHECK(AX_ENGINE_RunSync(handle, &first.io) == 0);
  const AX_U32 size = decode->pOutputs[2].nSize;
  const std::vector<char> expected = content(first.io.pOutputs[2], size);
  CHECK(AX_SYS_MinvalidateCache(first.io.pOutputs[2].phyAddr, first.io.pOutputs[2].pVirAddr, size) == 0);
  CHECK(expected != std::vector<char>(size));
  std::memset(first.io.pOutputs[2].pVirAddr, 0, size);
  CHECK(AX_ENGINE_RunGroupIOSync(handle, context, 0, &first.io) == 0);
  CHECK(content(first.io.pOutputs[2], size) == expected);
  CHECK(AX_ENGINE_RunGroupIOSync(handle, context, 1, &second.io) == 0);
  const std::vector<char> prefilled = content(second.io.pOutputs[2], prefill->pOutputs[2].nSize);
  CHECK(prefilled != std::vector<char>(prefilled.size()));

  // The same with buffers of group 0 where the names agree, the short IO_T of another client, and misuse.
  Buffers third = prepare(prefill, {{"K_cache", first.named["K_cache"]}, {"V_cache", first.named["V_cache"]}}, false);
  set_inputs(third, prefill, 0);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  AX_U64 physical = 0;
  void* block = nullptr;
  CHECK(AX_SYS_MemAlloc(&physical, &block, static_cast<AX_U32>(page), 0, tag("edge")) == 0);
  void* last = static_cast<char*>(block) + page - 120;  // behind it lies nothing
  std::memcpy(last, &third.io, 120);
  CHECK(AX_ENGINE_RunGroupIOSync(handle, context, 1, static_cast<AX_ENGINE_IO_T*>(last)) == 0);
  CHECK(content(third.io.pOutputs[2], prefill->pOutputs[2].nSize) == prefilled);
  CHECK(AX_SYS_MemFree(physical, block) == 0 && AX_SYS_MemFree(physical, block) != 0);
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunGroupIOSync(handle, &physical, 0, &first.io)) == 0x80060017u);
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunSync(&physical, &first.io)) == 0x80060017u);
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunSync(handle, nullptr)) == 0x8006000Bu);
  void* kept = first.io.pInputs[3].pVirAddr;
  first.io.pInputs[3].pVirAddr = nullptr, first.io.pInputs[3].phyAddr = 0;
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunSync(handle, &first.io)) == 0x8006000Bu);
  AX_U64 tiny_physical = 0;
  CHECK(AX_SYS_MemAlloc(&tiny_physical, &first.io.pInputs[3].pVirAddr, 16, 128, tag("npu")) == 0);
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunSync(handle, &first.io)) == 0x8006000Au);
  first.io.pInputs[3].pVirAddr = kept;
  static_cast<AX_U32*>(first.io.pInputs[2].pVirAddr)[0] = 0xFFFFFFFF;
  CHECK(static_cast<AX_U32>(AX_ENGINE_RunSync(handle, &first.io)) == 0x8006000Au);
  static_cast<AX_U32*>(first.io.pInputs[2].pVirAddr)[0] = 7;
  CHECK(AX_ENGINE_DestroyHandle(handle) == 0 && AX_ENGINE_DestroyHandle(handle) != 0);

  // Loaded again and again, with only a V2 context and the buffers of before.
  size_t settled = 0;
  const int cycles = std::atoi(argv[2]);
  for (int cycle = 0; cycle < cycles; ++cycle) {
    handle = load(argv[1]);
    CHECK(AX_ENGINE_CreateContextV2(handle, &context) == 0);
    if (cycle % 50 == 0) {
      std::memset(first.io.pOutputs[2].pVirAddr, 0, size);
      CHECK(AX_ENGINE_RunSync(handle, &first.io) == 0);
      CHECK(content(first.io.pOutputs[2], size) == expected);
    }
    CHECK(AX_ENGINE_DestroyHandle(handle) == 0);
    if (cycle == cycles / 2) settled = resident_kb();
  }
  const size_t after = resident_kb();
  std::printf("resident after half and all of %d cycles: %zu kB, %zu kB\n", cycles, settled, after);
  CHECK(AX_ENGINE_Deinit() == 0 && AX_SYS_Deinit() == 0);
  CHECK(AX_ENGINE_GetVNPUAttr(&attr) != 0);
  std::puts("done");
}
