// Shapes as functions of M and T: a model is checked and planned once, and runs with any number of tokens and history.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace axc {

constexpr size_t kMostRank = 8;

// fixed + tokens * M + history * T; M is at least 1, T at least 0.
struct Dim {
  int64_t fixed = 0;
  int64_t tokens = 0;
  int64_t history = 0;

  bool operator==(const Dim&) const = default;
  auto operator<=>(const Dim&) const = default;
  bool constant() const { return tokens == 0 && history == 0; }
  int64_t at(uint64_t m, uint64_t t) const {
    return fixed + tokens * static_cast<int64_t>(m) + history * static_cast<int64_t>(t);
  }
  int64_t least() const { return fixed + tokens; }  // if no coefficient is negative

  Dim operator+(const Dim& other) const { return {fixed + other.fixed, tokens + other.tokens, history + other.history}; }
  Dim operator-(const Dim& other) const { return {fixed - other.fixed, tokens - other.tokens, history - other.history}; }
  Dim operator*(int64_t factor) const { return {fixed * factor, tokens * factor, history * factor}; }
};

using Shape = std::vector<Dim>;

// A product of dimensions: `scale` times the symbolic ones, each divided by its greatest common divisor, sorted.
struct Extent {
  int64_t scale = 1;
  std::vector<Dim> parts;

  bool operator==(const Extent&) const = default;

  Extent() = default;
  explicit Extent(const Shape& shape) {
    for (const Dim& dim : shape) multiply(dim);
  }
  void multiply(Dim dim) {
    const int64_t divisor = dim.constant() ? dim.fixed : std::gcd(std::gcd(dim.fixed, dim.tokens), dim.history);
    if (__builtin_mul_overflow(scale, divisor, &scale)) scale = INT64_MAX;
    if (!dim.constant()) {
      parts.push_back({dim.fixed / divisor, dim.tokens / divisor, dim.history / divisor});
      std::sort(parts.begin(), parts.end());
    }
  }
};

std::string text_of(const Dim& dim);      // "3", "M", "T+M", "2*M-1"
std::string text_of(const Shape& shape);  // "[1, M, 64]"

}  // namespace axc
