#include "axmodel.h"

#include <charconv>

namespace axc {
namespace {

constexpr int64_t kOpset = 23;
constexpr size_t kMostGroups = 1024;

std::string_view entry(const Onnx& model, std::string_view key) {
  const auto found = model.metadata.find(key);
  return found == model.metadata.end() ? std::string_view() : found->second;
}

// Parses the JSON of axmodel.groups only: a list of {"tokens": M, "history": T} with optional blanks.
class GroupsReader {
 public:
  explicit GroupsReader(std::string_view text) : text_(text) {}

  std::vector<Group> read() {
    std::vector<Group> groups;
    expect("[");
    do {
      if (groups.size() == kMostGroups) illegal("more than " + std::to_string(kMostGroups) + " groups");
      groups.push_back(group());
    } while (accept(","));
    expect("]");
    blanks();
    if (!text_.empty()) fail();
    return groups;
  }

 private:
  Group group() {
    uint32_t tokens = 0;
    uint32_t history = UINT32_MAX;
    expect("{");
    do {
      uint32_t& value = accept("\"tokens\"") ? tokens : (expect("\"history\""), history);
      expect(":");
      value = number();
    } while (accept(","));
    expect("}");
    if (!tokens || tokens >= kMostTokens || history >= kMostTokens) fail();
    return {tokens, history};
  }

  uint32_t number() {
    blanks();
    uint32_t value = 0;
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
    if (error != std::errc()) fail();
    text_.remove_prefix(static_cast<size_t>(end - text_.data()));
    return value;
  }

  bool accept(std::string_view token) {
    blanks();
    if (!text_.starts_with(token)) return false;
    text_.remove_prefix(token.size());
    return true;
  }

  void expect(std::string_view token) {
    if (!accept(token)) fail();
  }

  void blanks() {
    while (!text_.empty() && std::string_view(" \t\r\n").find(text_[0]) != std::string_view::npos) text_.remove_prefix(1);
  }

  [[noreturn]] void fail() const { illegal("metadata axmodel.groups is wrong at: " + std::string(text_.substr(0, 20))); }

  std::string_view text_;
};

}  // namespace

Axmodel read_axmodel(Bytes file) {
  Axmodel model{read_onnx(file), false, {}};
  const std::string_view version = entry(model.onnx, "axmodel.version");
  if (version != "1") unsupported("axmodel version " + std::string(version.substr(0, 20)) + ", expected 1");
  if (model.onnx.opset != kOpset) {
    unsupported("opset " + std::to_string(model.onnx.opset) + ", expected " + std::to_string(kOpset));
  }
  const std::string_view kind = entry(model.onnx, "axmodel.kind");
  if (kind != "layer" && kind != "post") illegal("axmodel.kind " + std::string(kind.substr(0, 20)) + ", expected layer or post");
  model.layer = kind == "layer";
  model.groups = GroupsReader(entry(model.onnx, "axmodel.groups")).read();
  return model;
}

}  // namespace axc
