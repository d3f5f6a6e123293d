// The subset of ONNX's schema that axmodels use. Names and data point into the file's bytes.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "protobuf.h"

namespace axc {

// TensorProto.DataType
enum class Type : int {
  None = 0, Float = 1, Uint8 = 2, Int8 = 3, Int32 = 6, Int64 = 7, Bool = 9, Float16 = 10, Uint32 = 12, BFloat16 = 16,
  Float8E4M3 = 17, Float8E5M2 = 19, Uint4 = 21, Int4 = 22,
};

// Bits per element; 0 for a type that axmodels do not use.
int bits_of(Type type);
bool is_float(Type type);    // types that a hidden state may have
bool is_integer(Type type);  // with 8 bits or more
std::string name_of(Type type);

struct Tensor {
  std::string_view name;
  Type type = Type::None;
  std::vector<int64_t> dims;
  Bytes data;
  const uint8_t* bytes() const { return data.data(); }
};

// A dimension of an input or output: a number (`name` is empty), or a name whose size each group defines.
struct NamedDim {
  int64_t size = 0;
  std::string_view name;
};

struct TensorInfo {
  std::string_view name;
  Type type = Type::None;
  std::vector<NamedDim> shape;
};

struct Attribute {
  int kind = 0;  // AttributeProto.AttributeType: 1 float, 2 int, 3 string, 7 ints
  float real = 0;
  int64_t integer = 0;
  std::vector<int64_t> integers;
  std::string_view text;
};

struct Node {
  std::string_view op;
  std::vector<std::string_view> inputs, outputs;
  std::map<std::string_view, Attribute> attributes;
};

struct Onnx {
  int64_t ir_version = 0;
  std::string_view producer, producer_version, doc_string;
  int64_t opset = 0;
  std::map<std::string_view, std::string_view> metadata;
  std::vector<Node> nodes;
  std::vector<TensorInfo> inputs, outputs;
  std::map<std::string_view, Tensor> initializers;
};

// Parses a file. Throws Failure unless it is a complete ModelProto.
Onnx read_onnx(Bytes file);

}  // namespace axc
