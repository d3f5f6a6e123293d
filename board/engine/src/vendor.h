// Files that carry the extension and are not ours: the vendor's axmodels, and what stands in for an axmodel.
#pragma once

#include <optional>
#include <string>

#include "protobuf.h"

namespace axc {

// Throws Failure for a Git LFS pointer and for an encrypted model.
void refuse_stand_ins(Bytes file);

// The version in a vendor's doc_string, "4.1-patch1"; empty when it has none.
std::string vendor_version(std::string_view doc_string);

// The NPU mode a vendor's axmodel is compiled for: 0 NPU1, 1 NPU2, 2 NPU3. Nothing for a file of another producer.
// Throws Failure for one that is damaged or does not say.
std::optional<int> vendor_model_type(Bytes file);

}  // namespace axc
