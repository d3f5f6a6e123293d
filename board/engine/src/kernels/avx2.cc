// AVX2 with FMA: 256-bit vectors; integer products in 16 bits.
#include "cpu_x86.h"
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 8, kVectors = 2, kFloatRows = 5;
constexpr int32_t kOffset8 = 0, kOffset4 = 0;
constexpr size_t kIntRows = 5, kIntPanel = 16;

bool runs_here() { return cpu_has({"avx2", "fma"}); }

}  // namespace
}  // namespace axc

#include "words.h"
#include "table.h"

namespace axc {
constinit const Kernels kAvx2 = table("avx2", runs_here);
}
