#include "elements.h"

namespace axc {
namespace {

template <class Stored, class Number>
void gather(const uint8_t* data, size_t offset, size_t stride, size_t count, Number* to) {
  const Stored* from = reinterpret_cast<const Stored*>(data) + offset;
  for (size_t i = 0; i < count; ++i) to[i] = static_cast<Number>(from[i * stride]);
}

template <class Stored>
void scatter(uint8_t* data, size_t offset, size_t count, const int64_t* from) {
  Stored* to = reinterpret_cast<Stored*>(data) + offset;
  for (size_t i = 0; i < count; ++i) to[i] = static_cast<Stored>(from[i]);
}

}  // namespace

template <>
const int64_t* load_run(const Kernels&, const View& view, size_t offset, size_t stride, size_t count, int64_t* buffer) {
  switch (view.type) {
    case Type::Int64:
      if (stride == 1) return reinterpret_cast<const int64_t*>(view.data) + offset;
      gather<int64_t>(view.data, offset, stride, count, buffer);
      break;
    case Type::Int32: gather<int32_t>(view.data, offset, stride, count, buffer); break;
    case Type::Uint32: gather<uint32_t>(view.data, offset, stride, count, buffer); break;
    case Type::Int8: gather<int8_t>(view.data, offset, stride, count, buffer); break;
    default: gather<uint8_t>(view.data, offset, stride, count, buffer); break;
  }
  return buffer;
}

template <>
const float* load_run(const Kernels& kernels, const View& view, size_t offset, size_t stride, size_t count, float* buffer) {
  if (view.type == Type::Float) {
    if (stride == 1) return view.floats() + offset;
    gather<float>(view.data, offset, stride, count, buffer);
  } else if (stride == 1) {
    kernels.widen(view.type, view.data + offset * view.element(), count, buffer);
  } else if (view.element() == 2) {
    uint16_t halves[kRun];
    gather<uint16_t>(view.data, offset, stride, count, halves);
    kernels.widen(view.type, halves, count, buffer);
  } else {
    uint8_t bytes[kRun];
    gather<uint8_t>(view.data, offset, stride, count, bytes);
    kernels.widen(view.type, bytes, count, buffer);
  }
  return buffer;
}

template <>
void store_run(const Kernels&, const View& view, size_t offset, size_t count, const int64_t* from) {
  switch (view.type) {
    case Type::Int64: scatter<int64_t>(view.data, offset, count, from); break;
    case Type::Int32: scatter<int32_t>(view.data, offset, count, from); break;
    case Type::Uint32: scatter<uint32_t>(view.data, offset, count, from); break;
    case Type::Int8: scatter<int8_t>(view.data, offset, count, from); break;
    default: scatter<uint8_t>(view.data, offset, count, from); break;
  }
}

template <>
void store_run(const Kernels& kernels, const View& view, size_t offset, size_t count, const float* from) {
  if (view.type == Type::Float && from == view.floats() + offset) return;  // computed in place
  kernels.narrow(view.type, from, count, view.data + offset * view.element());
}

}  // namespace axc
