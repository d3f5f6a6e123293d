// One line on stderr that says why a model was refused, for programs that print only error codes.
#pragma once

#include <string>

namespace axc {

constexpr const char* kQuiet = "AXC_QUIET";  // environment variable; any value but empty or 0 disables the lines

// Writes what was seen and what was expected; nothing if the same file was just reported.
void report_refused(const std::string& seen);

}  // namespace axc
