#include "shape.h"

namespace axc {

std::string text_of(const Dim& dim) {
  std::string text;
  const auto add = [&](int64_t factor, const char* name) {
    if (!factor) return;
    if (factor < 0 || !text.empty()) text += factor < 0 ? "-" : "+";
    if (factor != 1 && factor != -1) text += std::to_string(std::abs(factor)) + "*";
    text += name;
  };
  add(dim.history, "T");
  add(dim.tokens, "M");
  if (text.empty()) return std::to_string(dim.fixed);
  if (dim.fixed) text += (dim.fixed < 0 ? "-" : "+") + std::to_string(std::abs(dim.fixed));
  return text;
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (const Dim& dim : shape) text += (text.size() > 1 ? ", " : "") + text_of(dim);
  return text + "]";
}

}  // namespace axc
