// Whether what a model computed is finite. In the types of a hidden state an infinity or a NaN has an exponent of ones.
#pragma once

#include <optional>
#include <vector>

#include "model.h"

namespace axc {

struct NotFinite {
  size_t output, row;
};

// The first row of the delivered outputs that holds an infinity or a NaN. A null output was not delivered.
std::optional<NotFinite> first_not_finite(const Model& model, uint32_t tokens, uint32_t history, const std::vector<void*>& outputs);

}  // namespace axc
