// What this CPU can and the system lets it.
#pragma once

#include <initializer_list>
#include <string_view>

namespace axc {

// Whether all of these can be used: fma, f16c, avx2, avx512f, -dq, -bw, -vl, -vnni, -bf16, without the dash.
bool cpu_has(std::initializer_list<std::string_view> names);

bool is_amd();

}  // namespace axc
