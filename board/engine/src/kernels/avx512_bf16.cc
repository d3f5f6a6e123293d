// AVX-512 with VNNI and products of bfloat16.
#include "avx512_bfloat16.h"
#include "avx512_vnni.h"

namespace axc {
namespace {

bool runs_here() { return has_avx512() && cpu_has({"avx512bf16"}); }

}  // namespace
}  // namespace axc

#include "table.h"

namespace axc {
constinit const Kernels kAvx512Bf16 = table("avx512_bf16", runs_here);
}
