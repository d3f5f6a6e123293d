// An exception with an error code of the C interface and a message; caught at the interface.
#pragma once

#include <stdexcept>
#include <string>

#include "axc_errors.h"

namespace axc {

struct Failure : std::runtime_error {
  int code;
  Failure(int code, const std::string& what) : std::runtime_error(what), code(code) {}
};

[[noreturn]] inline void illegal(const std::string& what) { throw Failure(AXC_ENGINE_ILLEGAL, what); }
[[noreturn]] inline void unsupported(const std::string& what) { throw Failure(AXC_ENGINE_UNSUPPORTED, what); }

}  // namespace axc
