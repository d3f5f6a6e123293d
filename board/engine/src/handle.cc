#include "handle.h"

#include <algorithm>

#include "cmm.h"

namespace axc {
namespace {

struct TypeRow {
  Type type;
  AX_ENGINE_DATA_TYPE_T shown;
};

// The interface has no code for float16.
constexpr TypeRow kTypes[] = {
    {Type::Float, AX_ENGINE_DT_FLOAT32},
    {Type::BFloat16, AX_ENGINE_DT_BFLOAT16},
    {Type::Uint32, AX_ENGINE_DT_UINT32},
    {Type::Int32, AX_ENGINE_DT_SINT32},
};

AX_ENGINE_DATA_TYPE_T shown(Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.shown;
  }
  return AX_ENGINE_DT_UNKNOWN;
}

// Whether a group without history ignores an input.
bool is_cache(const Value& value) { return value.shape.size() == 3 && value.shape[1] == Dim{0, 0, 1}; }

bool grows_with_history(const Value& value) {
  return std::any_of(value.shape.begin(), value.shape.end(), [](const Dim& dim) { return dim.history != 0; });
}

size_t hidden_size(const Model& model) {
  for (const int input : model.graph.inputs) {
    if (model.graph.values[input].name == "input") return model.graph.values[input].width();
  }
  return 1;
}

// A buffer may be larger than the tensor. nSize is ignored, since clients leave it unset.
void* memory_of(const AX_ENGINE_IO_BUFFER_T& buffer, uint64_t bytes, const std::string& name) {
  void* address = buffer.pVirAddr;
  if (!address && buffer.phyAddr) address = axc_sys_virtual(buffer.phyAddr);
  if (!address) return nullptr;
  const uint64_t room = axc_sys_room(address);
  if (room && room < bytes) {
    illegal("the buffer of " + name + " has " + std::to_string(room) + " bytes, the tensor " + std::to_string(bytes));
  }
  return address;
}

}  // namespace

GroupInfo::GroupInfo(const Model& model, const Group& group) {
  for (const int value : model.graph.inputs) inputs_.push_back(meta(model, value, group));
  for (const int value : model.graph.outputs) outputs_.push_back(meta(model, value, group));
  info.pInputs = inputs_.data();
  info.nInputSize = static_cast<AX_U32>(inputs_.size());
  info.pOutputs = outputs_.data();
  info.nOutputSize = static_cast<AX_U32>(outputs_.size());
  info.nMaxBatchSize = 1;
}

AX_ENGINE_IOMETA_T GroupInfo::meta(const Model& model, int index, const Group& group) {
  const Value& value = model.graph.values[index];
  AX_ENGINE_IOMETA_T meta{};
  std::vector<AX_S32>& shape = shapes_.emplace_back();
  uint64_t bytes = model.bytes(index, group.tokens, group.history);
  if (is_cache(value) && group.history == 0) {  // described as the vendor does: one row of the hidden size
    shape = {1, 1, static_cast<AX_S32>(hidden_size(model))};
    bytes = hidden_size(model) * static_cast<uint64_t>(bits_of(value.type)) / 8;
  } else {
    for (const Dim& dim : value.shape) shape.push_back(static_cast<AX_S32>(dim.at(group.tokens, group.history)));
  }
  meta.pName = const_cast<char*>(value.name.c_str());  // owned by the graph; the same in all groups
  meta.pShape = shape.data();
  meta.nShapeSize = static_cast<AX_U8>(shape.size());
  meta.eDataType = shown(value.type);
  meta.nSize = static_cast<AX_U32>(bytes);
  return meta;
}

Handle::Handle(Mapping mapping) : model(std::move(mapping)) {
  for (const Group& group : model.axmodel.groups) groups.emplace_back(model, group);
  tools_version = std::string(model.axmodel.onnx.producer) + " " + std::string(model.axmodel.onnx.producer_version);
}

void Handle::expect_shape(const AX_ENGINE_IO_T& io) const {
  const Graph& graph = model.graph;
  if (!io.pInputs || !io.pOutputs) throw Failure(AXC_ENGINE_NULL, "no array of buffers");
  if (io.nInputSize != graph.inputs.size() || io.nOutputSize != graph.outputs.size()) {
    illegal(std::to_string(io.nInputSize) + " inputs and " + std::to_string(io.nOutputSize) + " outputs, the model has " +
            std::to_string(graph.inputs.size()) + " and " + std::to_string(graph.outputs.size()));
  }
  if (io.nBatchSize > 1) unsupported("a batch of " + std::to_string(io.nBatchSize));
}

std::vector<const void*> Handle::inputs(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool stacked) const {
  const Graph& graph = model.graph;
  std::vector<const void*> found;
  for (size_t i = 0; i < graph.inputs.size(); ++i) {
    const Value& value = graph.values[graph.inputs[i]];
    const bool unread = stacked ? grows_with_history(value) : is_cache(value) && history == 0;
    found.push_back(unread ? nullptr : memory_of(io.pInputs[i], model.bytes(graph.inputs[i], tokens, history), value.name));
    if (!found.back() && !unread) throw Failure(AXC_ENGINE_NULL, "input " + value.name + " has no buffer");
  }
  return found;
}

std::vector<void*> Handle::outputs(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool may_miss) const {
  const Graph& graph = model.graph;
  std::vector<void*> found;
  for (size_t i = 0; i < graph.outputs.size(); ++i) {
    const Value& value = graph.values[graph.outputs[i]];
    found.push_back(memory_of(io.pOutputs[i], model.bytes(graph.outputs[i], tokens, history), value.name));
    if (!found.back() && !may_miss) throw Failure(AXC_ENGINE_NULL, "output " + value.name + " has no buffer");
  }
  return found;
}

std::vector<void*> Handle::run(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool outputs_may_miss) const {
  expect_shape(io);
  const std::vector<const void*> from = inputs(tokens, history, io, false);
  const std::vector<void*> to = outputs(tokens, history, io, outputs_may_miss);
  axc::run(model, tokens, history, from, to);
  return to;
}

std::vector<void*> Handle::run(std::span<const Segment> segments, uint32_t tokens, const AX_ENGINE_IO_T& io) const {
  expect_shape(io);
  const std::vector<const void*> from = inputs(tokens, 0, io, true);
  const std::vector<void*> to = outputs(tokens, 0, io, true);
  axc::run(model, segments, from, to);
  return to;
}

}  // namespace axc
