// Other files with the extension .axmodel: the vendor's, and placeholders such as Git LFS pointers.
#pragma once

#include <optional>
#include <string>

#include "protobuf.h"

namespace axc {

// Throws Failure for a Git LFS pointer and for an encrypted model.
void refuse_stand_ins(Bytes file);

// The compiler version in a vendor's doc_string, such as "4.1-patch1"; empty if there is none.
std::string vendor_version(std::string_view doc_string);

// The NPU mode of a vendor's axmodel: 0 NPU1, 1 NPU2, 2 NPU3; nothing for other producers. Throws Failure if the metadata
// is damaged or has no mode.
std::optional<int> vendor_model_type(Bytes file);

}  // namespace axc
