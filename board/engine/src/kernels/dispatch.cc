#include <array>
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace axc {
namespace {

// Fastest first.
constexpr auto kAll = std::to_array<const Kernels*>({
#ifdef __x86_64__
    &kAvx512Pairs, &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
#ifdef __aarch64__
    &kNeonDotprod, &kNeon,
#endif
    &kPortable,
});

const Kernels& choose() {
  const char* forced = std::getenv("AXC_ISA");
  for (const Kernels* candidate : kAll) {
    if (forced && *forced && std::string(forced) != candidate->name) continue;
    if (candidate->runs_here()) return *candidate;
    if (forced && *forced) unsupported("AXC_ISA=" + std::string(forced) + ", which this CPU does not have");
  }
  unsupported("AXC_ISA=" + std::string(forced) + ", which this engine does not have");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace axc
