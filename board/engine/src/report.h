// The line on stderr for programs that do not show why a model was refused.
#pragma once

#include <string>

namespace axc {

constexpr const char* kQuiet = "AXC_QUIET";  // an environment variable; set to anything but nothing or 0: no lines

// Writes one line: what was seen and what was expected. A client's second try with the same file gives none.
void report_refused(const std::string& seen);

}  // namespace axc
