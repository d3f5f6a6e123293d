// Runs one group of an axmodel: inputs from a file, one behind the other, outputs to another. Prints the kernels' name.
// Arguments: axmodel, group, input file, output file, bits of activations.
#include <ax_sys_api.h>
#include <axc_engine.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

namespace {

void expect(bool holds, const char* what) {
  if (!holds) std::printf("%s: %s\n", what, axc_last_error()), std::exit(1);
}

std::vector<AX_ENGINE_IO_BUFFER_T> buffers(const AX_ENGINE_IOMETA_T* metas, AX_U32 count) {
  std::vector<AX_ENGINE_IO_BUFFER_T> made(count);
  for (AX_U32 i = 0; i < count; ++i) {
    made[i].nSize = metas[i].nSize;
    expect(AX_SYS_MemAlloc(&made[i].phyAddr, &made[i].pVirAddr, metas[i].nSize, 128, nullptr) == 0, "MemAlloc");
  }
  return made;
}

}  // namespace

int main(int, char** argv) {
  AX_ENGINE_NPU_ATTR_T attr;
  std::memset(&attr, 0, sizeof attr);
  expect(AX_SYS_Init() == 0 && AX_ENGINE_Init(&attr) == 0, "Init");
  AX_ENGINE_HANDLE handle = nullptr;
  AX_ENGINE_CONTEXT_T context = nullptr;
  AX_ENGINE_IO_INFO_T* info = nullptr;
  const AX_U32 group = static_cast<AX_U32>(std::atoi(argv[2]));
  expect(axc_open(&handle, argv[1]) == 0 && AX_ENGINE_CreateContextV2(handle, &context) == 0, "open");
  expect(axc_set_activation_bits(handle, static_cast<AX_U32>(std::atoi(argv[5]))) == 0, "axc_set_activation_bits");
  expect(AX_ENGINE_GetGroupIOInfo(handle, group, &info) == 0, "GetGroupIOInfo");
  std::vector<AX_ENGINE_IO_BUFFER_T> inputs = buffers(info->pInputs, info->nInputSize);
  std::vector<AX_ENGINE_IO_BUFFER_T> outputs = buffers(info->pOutputs, info->nOutputSize);
  std::ifstream from(argv[3], std::ios::binary);
  for (const auto& buffer : inputs) from.read(static_cast<char*>(buffer.pVirAddr), buffer.nSize);
  expect(from.good(), "the input file");
  AX_ENGINE_IO_T io;
  std::memset(&io, 0, sizeof io);
  io.pInputs = inputs.data(), io.nInputSize = info->nInputSize;
  io.pOutputs = outputs.data(), io.nOutputSize = info->nOutputSize;
  expect(AX_ENGINE_RunGroupIOSync(handle, context, group, &io) == 0, "run");
  std::ofstream to(argv[4], std::ios::binary);
  for (const auto& buffer : outputs) to.write(static_cast<const char*>(buffer.pVirAddr), buffer.nSize);
  std::puts(axc_isa());
}
