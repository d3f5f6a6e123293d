// Standard C++ and the compiler's 16-byte vectors: runs everywhere.
#include "kernels.h"

namespace axc {
namespace {

constexpr size_t kWidth = 4, kVectors = 2, kFloatRows = 4;
constexpr size_t kIntRows = 4, kIntPanel = 8, kPrefetched = 0;

constexpr bool kRoundsBfloat16 = false;
constexpr LinearKernel kBfloat16Linear = nullptr;

bool runs_here() { return true; }

}  // namespace
}  // namespace axc

#include "integer_dot.h"
#include "table.h"

namespace axc {
constinit const Kernels kPortable = table("portable", runs_here);
}
