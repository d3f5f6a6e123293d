#include "vendor.h"

#include <algorithm>
#include <array>
#include <vector>

namespace axc {
namespace {

constexpr size_t kMostMetadata = 16 << 20;  // base64 characters
constexpr size_t kLongestVersion = 40;

std::string_view text_of(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

// RFC 4648, section 4, with padding.
std::vector<uint8_t> decode_base64(std::string_view text) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  if (text.size() > kMostMetadata || text.size() % 4) illegal("metadata extra_data is not base64");
  std::vector<uint8_t> out;
  out.reserve(text.size() / 4 * 3);
  for (size_t at = 0; at < text.size(); at += 4) {
    const size_t padding = at + 4 < text.size() || text[at + 3] != '=' ? 0 : text[at + 2] == '=' ? 2 : 1;
    uint32_t word = 0;
    for (size_t i = 0; i < 4; ++i) {
      const size_t digit = i < 4 - padding ? kDigits.find(text[at + i]) : 0;
      if (digit == std::string_view::npos) illegal("metadata extra_data is not base64");
      word = word << 6 | static_cast<uint32_t>(digit);
    }
    for (size_t i = 0; i < 3 - padding; ++i) out.push_back(static_cast<uint8_t>(word >> (16 - 8 * i)));
  }
  return out;
}

// Field 4 of the metadata is a message whose field 3 is the mode; NPU1, the default, is omitted.
int npu_mode(std::string_view extra_data) {
  const std::vector<uint8_t> decoded = decode_base64(extra_data);
  uint64_t mode = 0;
  Reader reader{Bytes(decoded)};
  for (Field field; reader.next(field);) {
    if (field.number != 4) continue;
    Reader inner(field.bytes());
    for (Field entry; inner.next(entry);) {
      if (entry.number == 3) mode = static_cast<uint64_t>(entry.integer());
    }
  }
  if (mode > 2) illegal("NPU mode " + std::to_string(mode) + " in metadata extra_data");
  return static_cast<int>(mode);
}

}  // namespace

void refuse_stand_ins(Bytes file) {
  constexpr std::array<uint8_t, 4> kEncrypted{0xDE, 0xAD, 0xBE, 0xEF};
  if (text_of(file).starts_with("version https://git-lfs")) {
    illegal("a Git LFS pointer of " + std::to_string(file.size()) + " bytes, not the file itself, which `git lfs pull` fetches");
  }
  if (file.size() >= kEncrypted.size() && std::equal(kEncrypted.begin(), kEncrypted.end(), file.begin())) {
    unsupported("an encrypted model (it begins with DE AD BE EF)");
  }
}

std::string vendor_version(std::string_view doc_string) {
  constexpr std::string_view kLabel = "Version:";
  const size_t at = doc_string.find(kLabel);
  if (at == std::string_view::npos) return {};
  std::string_view rest = doc_string.substr(at + kLabel.size());
  rest = rest.substr(0, rest.find('\n'));
  rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
  return std::string(rest.substr(0, kLongestVersion));
}

std::optional<int> vendor_model_type(Bytes file) {
  std::string_view producer, extra_data;
  Reader reader(file);
  for (Field field; reader.next(field);) {
    if (field.number == 2) producer = field.text();
    if (field.number == 7 && producer != "Pulsar2") return {};
    if (field.number != 14) continue;
    std::string_view key, value;
    Reader entry(field.bytes());
    for (Field part; entry.next(part);) {
      if (part.number == 1) key = part.text();
      if (part.number == 2) value = part.text();
    }
    if (key == "extra_data") extra_data = value;
  }
  if (producer != "Pulsar2") return {};
  if (extra_data.empty()) illegal("an axmodel of Pulsar2 without metadata extra_data, which says its NPU mode");
  return npu_mode(extra_data);
}

}  // namespace axc
