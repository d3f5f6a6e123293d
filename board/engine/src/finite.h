// Checks outputs for infinities and NaNs, whose exponent bits are all set in every hidden state type.
#pragma once

#include <optional>
#include <vector>

#include "model.h"

namespace axc {

struct NotFinite {
  size_t output, row;
};

// The first row of the delivered outputs that holds an infinity or a NaN. Outputs that are null were not delivered.
std::optional<NotFinite> first_not_finite(const Model& model, uint32_t tokens, uint32_t history, const std::vector<void*>& outputs);

}  // namespace axc
