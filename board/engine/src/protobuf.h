// A bounds-checked, zero-copy reader of the protobuf wire format.
// https://protobuf.dev/programming-guides/encoding
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "failure.h"

namespace axc {

using Bytes = std::span<const uint8_t>;

enum class Wire { Varint = 0, Fixed64 = 1, Length = 2, Fixed32 = 5 };

// One field of a message; accessors throw Failure if the field has another wire type.
struct Field {
  uint32_t number;
  Wire wire;
  uint64_t scalar;
  Bytes body;

  int64_t integer() const { return static_cast<int64_t>(expect(Wire::Varint).scalar); }
  float real() const { return std::bit_cast<float>(static_cast<uint32_t>(expect(Wire::Fixed32).scalar)); }
  Bytes bytes() const { return expect(Wire::Length).body; }
  std::string_view text() const {
    const Bytes& seen = bytes();
    return {reinterpret_cast<const char*>(seen.data()), seen.size()};
  }

 private:
  const Field& expect(Wire wanted) const {
    if (wire != wanted) illegal("field " + std::to_string(number) + " has wire type " + std::to_string(int(wire)));
    return *this;
  }
};

class Reader {
 public:
  explicit Reader(Bytes bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  // Reads the next field; false at the end of the message.
  bool next(Field& field) {
    if (at_ == end_) return false;
    const uint64_t tag = varint();
    field = {static_cast<uint32_t>(tag >> 3), static_cast<Wire>(tag & 7), 0, {}};
    if (tag >> 3 == 0 || tag >> 3 > 0x1FFFFFFF) illegal("field number " + std::to_string(tag >> 3));
    switch (field.wire) {
      case Wire::Varint: field.scalar = varint(); break;
      case Wire::Fixed64: field.scalar = fixed(8); break;
      case Wire::Fixed32: field.scalar = fixed(4); break;
      case Wire::Length: {
        const uint64_t length = varint();
        field.body = take(length);
        break;
      }
      default: illegal("wire type " + std::to_string(tag & 7));
    }
    return true;
  }

  bool done() const { return at_ == end_; }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      const uint8_t byte = take(1)[0];
      if (shift == 63 && byte > 1) illegal("a varint of more than 64 bits");
      value |= uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    illegal("a varint of more than 10 bytes");
  }

 private:
  Bytes take(uint64_t length) {
    const auto left = static_cast<uint64_t>(end_ - at_);
    if (length > left) illegal("a field of " + std::to_string(length) + " bytes where " + std::to_string(left) + " are left");
    const Bytes taken(at_, static_cast<size_t>(length));
    at_ += length;
    return taken;
  }

  uint64_t fixed(size_t width) {
    uint64_t value = 0;
    std::memcpy(&value, take(width).data(), width);  // all supported machines are little-endian
    return value;
  }

  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace axc
