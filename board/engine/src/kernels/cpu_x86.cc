// Detects CPU features by cpuid, and whether the system enables them. __builtin_cpu_supports reports none with compilers
// that lack its runtime, such as zig's.
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID; volume 1, 13.3 for XCR0.
#include "cpu_x86.h"

#include <cpuid.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace axc {
namespace {

enum Register { Eax, Ebx, Ecx, Edx };

constexpr uint64_t kYmm = 0b110, kZmm = 0b11100110;  // the registers' bits in XCR0

struct Feature {
  std::string_view name;
  uint32_t leaf, subleaf;
  Register where;
  int bit;
  uint64_t state;  // XCR0
};

constexpr std::array kFeatures{
    Feature{"fma", 1, 0, Ecx, 12, kYmm},        Feature{"f16c", 1, 0, Ecx, 29, kYmm},
    Feature{"avx2", 7, 0, Ebx, 5, kYmm},
    Feature{"avx512f", 7, 0, Ebx, 16, kZmm},    Feature{"avx512dq", 7, 0, Ebx, 17, kZmm},
    Feature{"avx512bw", 7, 0, Ebx, 30, kZmm},   Feature{"avx512vl", 7, 0, Ebx, 31, kZmm},
    Feature{"avx512vnni", 7, 0, Ecx, 11, kZmm}, Feature{"avx512bf16", 7, 1, Eax, 5, kZmm},
};

bool bit_of(uint32_t leaf, uint32_t subleaf, Register where, int bit) {
  std::array<uint32_t, 4> seen{};
  return __get_cpuid_count(leaf, subleaf, &seen[Eax], &seen[Ebx], &seen[Ecx], &seen[Edx]) && seen[where] >> bit & 1;
}

uint64_t enabled_state() {
  if (!bit_of(1, 0, Ecx, 27)) return 0;  // OSXSAVE
  uint32_t low = 0, high = 0;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

}  // namespace

bool is_amd() {
  std::array<uint32_t, 4> seen{};
  __get_cpuid(0, &seen[Eax], &seen[Ebx], &seen[Ecx], &seen[Edx]);
  return seen[Ebx] == signature_AMD_ebx && seen[Edx] == signature_AMD_edx && seen[Ecx] == signature_AMD_ecx;
}

bool cpu_has(std::initializer_list<std::string_view> names) {
  const uint64_t state = enabled_state();
  return std::all_of(names.begin(), names.end(), [state](std::string_view name) {
    const auto row = std::find_if(kFeatures.begin(), kFeatures.end(), [name](const Feature& f) { return f.name == name; });
    return row != kFeatures.end() && (state & row->state) == row->state && bit_of(row->leaf, row->subleaf, row->where, row->bit);
  });
}

}  // namespace axc
