// AVX-512 with VNNI.
#include "avx512_vnni.h"

namespace axc {
namespace {

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() { return has_avx512(); }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kAvx512 = table("avx512", runs_here);
}
