#include "onnx.h"

#include "shape.h"
#include "vendor.h"

#include <array>

namespace axc {
namespace {

constexpr size_t kAlignment = 64;   // alignment of raw data in the file, in bytes
constexpr size_t kMostItems = 1 << 16;  // limit on nodes, tensors, inputs and attributes of a model

struct TypeRow {
  Type type;
  int bits;
  const char* name;
};

constexpr std::array<TypeRow, 13> kTypes{{
    {Type::Float, 32, "FLOAT"},
    {Type::Uint8, 8, "UINT8"},
    {Type::Int8, 8, "INT8"},
    {Type::Int32, 32, "INT32"},
    {Type::Int64, 64, "INT64"},
    {Type::Bool, 8, "BOOL"},
    {Type::Float16, 16, "FLOAT16"},
    {Type::Uint32, 32, "UINT32"},
    {Type::BFloat16, 16, "BFLOAT16"},
    {Type::Float8E4M3, 8, "FLOAT8E4M3FN"},
    {Type::Float8E5M2, 8, "FLOAT8E5M2"},
    {Type::Uint4, 4, "UINT4"},
    {Type::Int4, 4, "INT4"},
}};

template <class List>
auto& grow(List& list) {
  if (list.size() >= kMostItems) illegal("more than " + std::to_string(kMostItems) + " parts of one kind");
  return list.emplace_back();
}

// A repeated int64, packed or not.
void append_integers(const Field& field, std::vector<int64_t>& out) {
  if (field.wire == Wire::Varint) {
    grow(out) = field.integer();
    return;
  }
  Reader packed(field.bytes());
  while (!packed.done()) grow(out) = static_cast<int64_t>(packed.varint());
}

Type type_of(int64_t number) { return number > 0 && number < 64 ? static_cast<Type>(number) : Type::None; }

NamedDim read_dim(Bytes bytes) {
  NamedDim dim;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    if (field.number == 1) dim = {field.integer(), {}};
    if (field.number == 2) dim = {0, field.text()};
  }
  return dim;
}

void read_tensor_type(Bytes bytes, TensorInfo& info) {
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    if (field.number == 1) info.type = type_of(field.integer());
    if (field.number != 2) continue;
    Reader shape(field.bytes());
    for (Field dim; shape.next(dim);) {
      if (dim.number == 1) grow(info.shape) = read_dim(dim.bytes());
    }
  }
}

TensorInfo read_info(Bytes bytes) {
  TensorInfo info;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    if (field.number == 1) info.name = field.text();
    if (field.number != 2) continue;
    Reader type(field.bytes());
    for (Field inner; type.next(inner);) {
      if (inner.number == 1) read_tensor_type(inner.bytes(), info);
    }
  }
  if (info.shape.size() > kMostRank) illegal("a tensor of rank " + std::to_string(info.shape.size()));
  return info;
}

Tensor read_tensor(Bytes bytes, const uint8_t* file) {
  Tensor tensor;
  bool raw = false;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: append_integers(field, tensor.dims); break;
      case 2: tensor.type = type_of(field.integer()); break;
      case 8: tensor.name = field.text(); break;
      case 9: tensor.data = field.bytes(), raw = true; break;
      case 12: break;  // doc_string, used as padding
      default: unsupported("initializer " + std::string(tensor.name) + " has field " + std::to_string(field.number));
    }
  }
  const std::string name(tensor.name);
  const int bits = bits_of(tensor.type);
  if (!bits) unsupported("initializer " + name + " has " + name_of(tensor.type));
  if (!raw || tensor.dims.size() > kMostRank) illegal("initializer " + name + " has no raw data, or too high a rank");
  uint64_t count = 1;
  for (const int64_t dim : tensor.dims) {
    if (dim < 0 || dim > INT32_MAX || (count *= static_cast<uint64_t>(dim)) > (uint64_t{1} << 33)) {
      illegal("initializer " + name + " has dimension " + std::to_string(dim));
    }
  }
  if ((count * bits + 7) / 8 != tensor.data.size()) {
    illegal("initializer " + name + " has " + std::to_string(tensor.data.size()) + " bytes for " + std::to_string(count) +
            " elements of " + name_of(tensor.type));
  }
  if ((tensor.data.data() - file) % kAlignment) illegal("initializer " + name + " is not aligned in the file");
  return tensor;
}

std::pair<std::string_view, Attribute> read_attribute(Bytes bytes) {
  std::string_view name;
  Attribute attribute;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: name = field.text(); break;
      case 2: attribute.real = field.real(); break;
      case 3: attribute.integer = field.integer(); break;
      case 4: attribute.text = field.text(); break;
      case 8: append_integers(field, attribute.integers); break;
      case 20: attribute.kind = static_cast<int>(field.integer()); break;
      default: break;
    }
  }
  return {name, attribute};
}

Node read_node(Bytes bytes) {
  Node node;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: grow(node.inputs) = field.text(); break;
      case 2: grow(node.outputs) = field.text(); break;
      case 4: node.op = field.text(); break;
      case 5:
        if (!node.attributes.insert(read_attribute(field.bytes())).second) illegal("duplicate attribute");
        break;
      case 7:
        if (!field.text().empty()) unsupported("operator domain " + std::string(field.text()));
        break;
      default: break;
    }
  }
  return node;
}

void read_graph(Bytes bytes, const uint8_t* file, Onnx& model) {
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: grow(model.nodes) = read_node(field.bytes()); break;
      case 5: {
        Tensor tensor = read_tensor(field.bytes(), file);
        const std::string_view name = tensor.name;
        if (model.initializers.size() >= kMostItems || !model.initializers.emplace(name, std::move(tensor)).second) {
          illegal("two initializers are named " + std::string(name));
        }
        break;
      }
      case 11: grow(model.inputs) = read_info(field.bytes()); break;
      case 12: grow(model.outputs) = read_info(field.bytes()); break;
      case 15: unsupported("a sparse initializer");
      default: break;
    }
  }
}

std::pair<std::string_view, std::string_view> read_entry(Bytes bytes) {
  std::pair<std::string_view, std::string_view> entry;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    if (field.number == 1) entry.first = field.text();
    if (field.number == 2) entry.second = field.text();
  }
  return entry;
}

int64_t read_opset(Bytes bytes) {
  int64_t version = 0;
  Reader reader(bytes);
  for (Field field; reader.next(field);) {
    if (field.number == 1 && !field.text().empty()) unsupported("opset domain " + std::string(field.text()));
    if (field.number == 2) version = field.integer();
  }
  return version;
}

[[noreturn]] void refuse_producer(const Onnx& model) {
  std::string who(model.producer.substr(0, 40));
  if (who != "Pulsar2") unsupported("an axmodel of " + (who.empty() ? "no producer" : who) + ", not of axc");
  const std::string version = vendor_version(model.doc_string);
  if (!version.empty()) who += " " + version;
  unsupported("an axmodel of " + who + ", not of axc: code for an NPU, which only the board's own libax_engine runs");
}

}  // namespace

int bits_of(Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.bits;
  }
  return 0;
}

bool is_float(Type type) { return type == Type::Float || type == Type::Float16 || type == Type::BFloat16; }

bool is_integer(Type type) {
  return type == Type::Uint8 || type == Type::Int8 || type == Type::Int32 || type == Type::Int64 || type == Type::Uint32;
}

std::string name_of(Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.name;
  }
  return "type " + std::to_string(static_cast<int>(type));
}

Onnx read_onnx(Bytes file) {
  refuse_stand_ins(file);
  Onnx model;
  bool graph = false;
  std::vector<Bytes> opsets;
  Reader reader(file);
  for (Field field; reader.next(field);) {
    switch (field.number) {
      case 1: model.ir_version = field.integer(); break;
      case 2: model.producer = field.text(); break;
      case 3: model.producer_version = field.text(); break;
      case 6: model.doc_string = field.text(); break;
      case 7:
        if (graph) illegal("two graphs");
        if (model.producer != "axc") refuse_producer(model);
        graph = true;
        read_graph(field.bytes(), file.data(), model);
        break;
      case 8: grow(opsets) = field.bytes(); break;
      case 14:
        if (model.metadata.size() >= kMostItems || !model.metadata.insert(read_entry(field.bytes())).second) {
          illegal("duplicate metadata");
        }
        break;
      default: break;
    }
  }
  if (!graph) illegal("no graph");
  if (opsets.size() != 1) illegal(std::to_string(opsets.size()) + " opsets");
  model.opset = read_opset(opsets[0]);
  return model;
}

}  // namespace axc
