// A model in the C interface: a handle with contexts and descriptions of inputs and outputs.
#pragma once

#include <deque>
#include <memory>
#include <string>

#include "ax_engine_api.h"
#include "model.h"

namespace axc {

// The description of one group. It owns what its pointers point to, so it must not move.
class GroupInfo {
 public:
  GroupInfo(const Model& model, const Group& group);
  GroupInfo(const GroupInfo&) = delete;
  AX_ENGINE_IO_INFO_T info{};

 private:
  AX_ENGINE_IOMETA_T meta(const Model& model, int value, const Group& group);

  std::deque<std::vector<AX_S32>> shapes_;
  std::vector<AX_ENGINE_IOMETA_T> inputs_, outputs_;
};

struct Handle {
  Model model;
  std::deque<GroupInfo> groups;
  std::deque<char> contexts;  // contexts have no state; their addresses identify them
  std::string tools_version;
  AX_ENGINE_NPU_SET_T affinity = 0;

  explicit Handle(Mapping mapping);

  // Runs with the client's buffers; returns the address of each output, null if it was not delivered. Throws Failure if a
  // buffer is missing or too small.
  std::vector<void*> run(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool outputs_may_miss) const;

  // The same for rows of several sequences, stacked. The buffers of inputs that depend on history are not read.
  std::vector<void*> run(std::span<const Segment> segments, uint32_t tokens, const AX_ENGINE_IO_T& io) const;

 private:
  void expect_shape(const AX_ENGINE_IO_T& io) const;
  std::vector<const void*> inputs(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool stacked) const;
  std::vector<void*> outputs(uint32_t tokens, uint32_t history, const AX_ENGINE_IO_T& io, bool may_miss) const;
};

}  // namespace axc
