// Plain NEON, for the Cortex-A53: 128-bit vectors, integer products in 16 bits.
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 4, kVectors = 2, kFloatRows = 6;
constexpr size_t kIntRows = 6, kIntPanel = 8, kPrefetched = 0;

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() { return true; }

}  // namespace
}  // namespace axc

#include "integer_dot.h"
#include "table.h"

namespace axc {
constinit const Kernels kNeon = table("neon", runs_here);
}
