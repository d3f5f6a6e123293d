// A mutator that knows where messages lie in an axmodel. Bytes changed blindly break a length or an alignment, and the
// loader looks no further; here a part of a message is changed and the file is written anew around it.
#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "protobuf.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t capacity);

namespace {

using axc::Bytes;
using axc::Field;
using axc::Wire;

constexpr size_t kAlignment = 64;  // of raw data in the file
constexpr uint32_t kDocString = 12, kRawData = 9, kDims = 1;

// https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
enum class Kind { Leaf, Model, Graph, Node, Tensor, Info, Type, TensorType, Shape, Dim, Attribute, Opset, Entry };

struct Inside {
  Kind outer;
  uint32_t number;
  Kind inner;
};

constexpr std::array kInside{
    Inside{Kind::Model, 7, Kind::Graph},      Inside{Kind::Model, 8, Kind::Opset},
    Inside{Kind::Model, 14, Kind::Entry},     Inside{Kind::Graph, 1, Kind::Node},
    Inside{Kind::Graph, 5, Kind::Tensor},     Inside{Kind::Graph, 11, Kind::Info},
    Inside{Kind::Graph, 12, Kind::Info},      Inside{Kind::Node, 5, Kind::Attribute},
    Inside{Kind::Info, 2, Kind::Type},        Inside{Kind::Type, 1, Kind::TensorType},
    Inside{Kind::TensorType, 2, Kind::Shape}, Inside{Kind::Shape, 1, Kind::Dim},
};

Kind inside(Kind outer, uint32_t number) {
  const auto found = std::find_if(kInside.begin(), kInside.end(),
                                  [&](const Inside& row) { return row.outer == outer && row.number == number; });
  return found == kInside.end() ? Kind::Leaf : found->inner;
}

struct Part {
  uint32_t number = 0;
  Wire wire = Wire::Varint;
  Kind kind = Kind::Leaf;
  uint64_t scalar = 0;
  std::vector<uint8_t> bytes;  // of a leaf
  std::vector<Part> parts;     // of a message
};

std::vector<Part> parse(Bytes bytes, Kind kind) {
  std::vector<Part> parts;
  axc::Reader reader(bytes);
  for (Field field; reader.next(field);) {
    Part& part = parts.emplace_back();
    part.number = field.number;
    part.wire = field.wire;
    part.scalar = field.scalar;
    part.kind = field.wire == Wire::Length ? inside(kind, field.number) : Kind::Leaf;
    if (part.kind == Kind::Leaf) {
      part.bytes.assign(field.body.begin(), field.body.end());
    } else {
      part.parts = parse(field.body, part.kind);
    }
  }
  return parts;
}

void put_varint(std::vector<uint8_t>& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<uint8_t>(value | 0x80));
  out.push_back(static_cast<uint8_t>(value));
}

size_t width(uint64_t value) { return value < 0x80 ? 1 : 1 + width(value >> 7); }

std::vector<uint8_t> write(const std::vector<Part>& parts, Kind kind, size_t at);

// `at` is where the tag will lie in the file: inside tensors the padding depends on it.
void put(std::vector<uint8_t>& out, const Part& part, size_t at) {
  put_varint(out, uint64_t{part.number} << 3 | static_cast<uint64_t>(part.wire));
  const size_t start = at + width(uint64_t{part.number} << 3);
  switch (part.wire) {
    case Wire::Varint: put_varint(out, part.scalar); return;
    case Wire::Fixed32:
    case Wire::Fixed64:
      for (int i = 0; i < (part.wire == Wire::Fixed32 ? 4 : 8); ++i) out.push_back(static_cast<uint8_t>(part.scalar >> 8 * i));
      return;
    case Wire::Length: break;
  }
  std::vector<uint8_t> body = part.bytes;
  if (part.kind != Kind::Leaf) {
    for (size_t guess = 1; guess <= 5; ++guess) {  // bytes of the length, which the padding depends on
      body = write(part.parts, part.kind, start + guess);
      if (width(body.size()) == guess) break;
    }
  }
  put_varint(out, body.size());
  out.insert(out.end(), body.begin(), body.end());
}

std::vector<uint8_t> write(const std::vector<Part>& parts, Kind kind, size_t at) {
  std::vector<uint8_t> out;
  for (const Part& part : parts) {
    if (kind == Kind::Tensor && part.number == kDocString) continue;
    if (kind == Kind::Tensor && part.number == kRawData && part.wire == Wire::Length) {
      const size_t lead = width(kRawData << 3) + width(part.bytes.size());
      const size_t gap = (2 * kAlignment - (at + out.size() + lead) % kAlignment) % kAlignment;
      if (gap) {
        const size_t spaces = gap >= 2 ? gap - 2 : gap + kAlignment - 2;  // the field itself takes two bytes
        put(out, {kDocString, Wire::Length, Kind::Leaf, 0, std::vector<uint8_t>(spaces, ' '), {}}, 0);
      }
    }
    put(out, part, at + out.size());
  }
  return out;
}

class Mutator {
 public:
  Mutator(std::vector<Part>& model, unsigned seed) : random_(seed) { collect(model); }

  void change() {
    if (all_.empty()) return;
    const auto [siblings, index] = all_[below(all_.size())];
    Part& part = (*siblings)[index];
    switch (below(6)) {
      case 0: siblings->erase(siblings->begin() + static_cast<ptrdiff_t>(index)); break;
      case 1: siblings->insert(siblings->begin() + static_cast<ptrdiff_t>(below(siblings->size())), Part(part)); break;
      case 2: std::swap(part, (*siblings)[below(siblings->size())]); break;
      case 3: replace(part); break;
      case 4: part.kind == Kind::Tensor ? resize(part) : content(part); break;
      default: content(part); break;
    }
  }

 private:
  size_t below(size_t bound) { return std::uniform_int_distribution<size_t>(0, bound - 1)(random_); }

  void collect(std::vector<Part>& parts) {
    for (size_t i = 0; i < parts.size(); ++i) {
      all_.push_back({&parts, i});
      collect(parts[i].parts);
    }
  }

  // With another part of the same number and kind: a name by another name, a node by another node.
  void replace(Part& part) {
    std::vector<const Part*> alike;
    for (const auto& [siblings, index] : all_) {
      const Part& other = (*siblings)[index];
      if (other.kind == part.kind && other.wire == part.wire && other.bytes.size() < 256) alike.push_back(&other);
    }
    if (!alike.empty()) part = Part(*alike[below(alike.size())]);
  }

  // Another dimension, and as much data as it asks for.
  void resize(Part& tensor) {
    constexpr std::array<uint64_t, 12> sizes{0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 129};
    std::vector<Part*> dims;
    Part* data = nullptr;
    for (Part& part : tensor.parts) {
      if (part.number == kDims && part.wire == Wire::Varint) dims.push_back(&part);
      if (part.number == kRawData) data = &part;
    }
    if (dims.empty() || !data) return;
    Part& dim = *dims[below(dims.size())];
    const uint64_t before = dim.scalar;
    dim.scalar = sizes[below(sizes.size())];
    const size_t size = before && before < data->bytes.size() * 2 + 1 ? data->bytes.size() * dim.scalar / before : 0;
    if (size < kMost) data->bytes.resize(size, 0x5A);
  }

  void content(Part& part) {
    constexpr std::array<uint64_t, 14> numbers{0, 1, 2, 3, 7, 16, 23, 127, 1 << 16, INT32_MAX, UINT32_MAX, uint64_t{1} << 33,
                                               INT64_MAX, UINT64_MAX};
    if (part.wire != Wire::Length) {
      part.scalar = below(2) ? numbers[below(numbers.size())] : part.scalar + below(5) - 2;
    } else if (part.kind == Kind::Leaf) {
      const size_t size = part.bytes.size();
      part.bytes.resize(size + 16);
      part.bytes.resize(LLVMFuzzerMutate(part.bytes.data(), size, size + 16));
    } else if (!part.parts.empty()) {
      content(part.parts[below(part.parts.size())]);
    }
  }

  static constexpr size_t kMost = 1 << 16;

  std::minstd_rand random_;
  std::vector<std::pair<std::vector<Part>*, size_t>> all_;
};

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t capacity, unsigned seed) {
  if (seed % 8 == 0) return LLVMFuzzerMutate(data, size, capacity);  // the wire format itself
  try {
    std::vector<Part> model = parse({data, size}, Kind::Model);
    for (unsigned changes = 1 + seed % 3; changes; --changes) Mutator(model, seed + changes).change();
    const std::vector<uint8_t> written = write(model, Kind::Model, 0);
    if (written.size() > capacity) return size;
    std::copy(written.begin(), written.end(), data);
    return written.size();
  } catch (const axc::Failure&) {
    return LLVMFuzzerMutate(data, size, capacity);
  }
}
