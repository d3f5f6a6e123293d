// libFuzzer over the loader; what loads is run once in its smallest group.
#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "handle.h"
#include "kernels/kernels.h"

namespace {

constexpr uint64_t kMostBytes = 1 << 20;  // of a tensor that is run

bool run_smallest(const axc::Handle& handle) {
  const axc::Model& model = handle.model;
  const auto group = std::min_element(model.axmodel.groups.begin(), model.axmodel.groups.end(),
                                      [](const axc::Group& a, const axc::Group& b) { return a.tokens < b.tokens; });
  std::vector<std::vector<uint8_t>> memory;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  if (group->tokens > 64 || model.program.bytes(group->tokens, group->history) > kMostBytes) return false;
  for (const std::vector<int>& list : {model.graph.inputs, model.graph.outputs}) {
    for (const int value : list) {
      const uint64_t bytes = model.bytes(value, group->tokens, group->history);
      if (bytes > kMostBytes) return false;
      memory.emplace_back(bytes);
    }
  }
  for (size_t i = 0; i < memory.size(); ++i) {
    if (i < model.graph.inputs.size()) {
      inputs.push_back(memory[i].data());
    } else {
      outputs.push_back(memory[i].data());
    }
  }
  axc::run(model, group->tokens, group->history, inputs, outputs);
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    run_smallest(axc::Handle(axc::Mapping::copy_of({data, size})));
  } catch (const axc::Failure&) {
  } catch (const std::bad_alloc&) {
  }
  return 0;
}
