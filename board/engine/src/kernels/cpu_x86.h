// Features that the CPU has and the system enables.
#pragma once

#include <initializer_list>
#include <string_view>

namespace axc {

// Whether all of these can be used: fma, f16c, avx2, avx512f, and avx512 with dq, bw, vl, vnni or bf16 appended.
bool cpu_has(std::initializer_list<std::string_view> names);

bool is_amd();

}  // namespace axc
