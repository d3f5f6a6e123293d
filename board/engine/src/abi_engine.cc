// The C interface. Every function catches exceptions and returns their error code.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <unordered_map>

#include "axc_engine.h"
#include "chip/chip.h"
#include "cmm.h"
#include "finite.h"
#include "handle.h"
#include "report.h"
#include "runtime.h"
#include "vendor.h"

#ifndef AXC_VERSION
#define AXC_VERSION "0"
#endif

namespace {

using namespace axc;

thread_local std::string last_error;
thread_local NotFinite last_not_finite{};

class Engine {
 public:
  static Engine& instance() {
    static Engine& engine = *new Engine;  // clients may call from their own exit handlers
    return engine;
  }

  void start(AX_ENGINE_NPU_MODE_T mode) {
    const std::scoped_lock lock(mutex_);
    mode_ = mode;
  }
  void stop() {
    mode();
    const std::scoped_lock lock(mutex_);
    mode_.reset();
  }
  AX_ENGINE_NPU_MODE_T mode() const {
    const std::shared_lock lock(mutex_);
    if (!mode_) throw Failure(AXC_ENGINE_NOT_INIT, "AX_ENGINE_Init comes first");
    return *mode_;
  }

  AX_ENGINE_HANDLE add(Mapping mapping) {
    mode();
    auto handle = std::make_shared<Handle>(std::move(mapping));
    const std::scoped_lock lock(mutex_);
    Handle* key = handle.get();
    handles_.emplace(key, std::move(handle));
    return key;
  }
  void remove(AX_ENGINE_HANDLE key) {
    std::shared_ptr<Handle> last;
    const std::scoped_lock lock(mutex_);
    const auto found = handles_.find(key);
    if (found == handles_.end()) missing();
    last = std::move(found->second);
    handles_.erase(found);
  }
  std::shared_ptr<Handle> get(AX_ENGINE_HANDLE key) const {
    const std::shared_lock lock(mutex_);
    const auto found = handles_.find(key);
    if (found == handles_.end()) missing();
    return found->second;
  }
  AX_ENGINE_CONTEXT_T add_context(AX_ENGINE_HANDLE key) {
    const std::shared_ptr<Handle> handle = get(key);
    const std::scoped_lock lock(mutex_);
    return &handle->contexts.emplace_back();
  }
  // Null selects the default context.
  void check_context(const Handle& handle, AX_ENGINE_CONTEXT_T context) const {
    const std::shared_lock lock(mutex_);
    const bool known = !context || std::any_of(handle.contexts.begin(), handle.contexts.end(),
                                               [context](const char& mine) { return &mine == context; });
    if (!known) throw Failure(AXC_ENGINE_MISSING, "a context of another handle");
  }

 private:
  [[noreturn]] static void missing() { throw Failure(AXC_ENGINE_MISSING, "no such handle"); }

  mutable std::shared_mutex mutex_;
  std::optional<AX_ENGINE_NPU_MODE_T> mode_;
  std::unordered_map<void*, std::shared_ptr<Handle>> handles_;
};

template <class Body>
AX_S32 guarded(Body body) {
  try {
    body();
    return AXC_OK;
  } catch (const Failure& failure) {
    last_error = failure.what();
    return failure.code;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return AXC_ENGINE_NO_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return AXC_ENGINE_UNKNOWN;
  }
}

// For the vendor's interface, whose clients print at most an error code: writes the reason to stderr.
template <class Body>
AX_S32 guarded_load(Body body) {
  bool looked = false;
  const AX_S32 code = guarded([&] { body(looked); });
  if (looked && code) report_refused(last_error);
  return code;
}

template <class... Pointers>
void expect(const Pointers*... pointers) {
  if ((!pointers || ...)) throw Failure(AXC_ENGINE_NULL, "a null pointer");
}

Bytes bytes_of(const AX_VOID* data, AX_U32 size) {
  expect(data);
  return {static_cast<const uint8_t*>(data), size};
}

Engine& engine() { return Engine::instance(); }

const Group& group_of(const Handle& handle, AX_U32 index) {
  if (index >= handle.model.axmodel.groups.size()) {
    throw Failure(AXC_ENGINE_MISSING, "group " + std::to_string(index) + " of " + std::to_string(handle.groups.size()));
  }
  return handle.model.axmodel.groups[index];
}

AX_S32 run_group(AX_ENGINE_HANDLE key, AX_ENGINE_CONTEXT_T context, AX_U32 index, const AX_ENGINE_IO_T* io) {
  return guarded([&] {
    expect(io);
    engine().mode();
    const std::shared_ptr<Handle> handle = engine().get(key);
    engine().check_context(*handle, context);
    const Group& group = group_of(*handle, index);
    handle->run(group.tokens, group.history, *io, false);
  });
}

void expect_finite(const Model& model, uint32_t tokens, uint32_t history, const std::vector<void*>& outputs) {
  const std::optional<NotFinite> found = first_not_finite(model, tokens, history, outputs);
  if (!found) return;
  last_not_finite = *found;
  const Graph& graph = model.graph;
  throw Failure(AXC_ENGINE_NOT_FINITE,
                graph.values[graph.outputs[found->output]].name + " is not finite in row " + std::to_string(found->row));
}

}  // namespace

extern "C" {

const AX_CHAR* AX_ENGINE_GetVersion(AX_VOID) { return "axc " AXC_VERSION; }

AX_S32 AX_ENGINE_Init(AX_ENGINE_NPU_ATTR_T* pNpuAttr) {
  return guarded([&] {
    expect(pNpuAttr);
    const int mode = pNpuAttr->eHardMode;
    if (mode < 0 || mode >= kChip.npu_modes) {
      illegal("virtual NPU mode " + std::to_string(mode) + "; an " + kChip.name + " has " + std::to_string(kChip.npu_modes));
    }
    if (!axc_sys_ready()) throw Failure(AXC_ENGINE_NOT_READY, "AX_SYS_Init comes first");
    kernels();
    engine().start(pNpuAttr->eHardMode);
  });
}

AX_S32 AX_ENGINE_GetVNPUAttr(AX_ENGINE_NPU_ATTR_T* pNpuAttr) {
  return guarded([&] {
    expect(pNpuAttr);
    const AX_ENGINE_NPU_MODE_T mode = engine().mode();
    std::memset(pNpuAttr, 0, sizeof *pNpuAttr);
    pNpuAttr->eHardMode = mode;
  });
}

AX_S32 AX_ENGINE_Deinit(AX_VOID) {
  return guarded([] { engine().stop(); });
}

AX_S32 AX_ENGINE_NPUReset(AX_VOID) { return AXC_OK; }

AX_S32 AX_ENGINE_GetModelType(const AX_VOID* pData, AX_U32 nDataSize, AX_ENGINE_MODEL_TYPE_T* pModelType) {
  return guarded_load([&](bool& looked) {
    expect(pModelType);
    const Bytes file = bytes_of(pData, nDataSize);
    looked = true;
    refuse_stand_ins(file);
    const std::optional<int> vendors = vendor_model_type(file);
    if (!vendors) read_axmodel(file);
    if (vendors.value_or(0) >= kChip.model_types) {
      illegal("model type " + std::to_string(*vendors) + "; an " + kChip.name + " has " + std::to_string(kChip.model_types));
    }
    *pModelType = static_cast<AX_ENGINE_MODEL_TYPE_T>(vendors.value_or(0));
  });
}

AX_S32 AX_ENGINE_CreateHandle(AX_ENGINE_HANDLE* pHandle, const AX_VOID* pData, AX_U32 nDataSize) {
  return AX_ENGINE_CreateHandleV2(pHandle, pData, nDataSize, nullptr);
}

AX_S32 AX_ENGINE_CreateHandleV2(AX_ENGINE_HANDLE* pHandle, const AX_VOID* pData, AX_U32 nDataSize,
                                AX_ENGINE_HANDLE_EXTRA_T* pExtraParam) {
  return guarded_load([&](bool& looked) {
    expect(pHandle);
    *pHandle = nullptr;
    engine().mode();
    const Bytes file = bytes_of(pData, nDataSize);
    looked = true;
    *pHandle = engine().add(Mapping::copy_of(file));
    if (pExtraParam) engine().get(*pHandle)->affinity = pExtraParam->nNpuSet;
  });
}

AX_S32 AX_ENGINE_DestroyHandle(AX_ENGINE_HANDLE nHandle) {
  return guarded([&] { engine().remove(nHandle); });
}

AX_S32 AX_ENGINE_CreateContext(AX_ENGINE_HANDLE nHandle) {
  return guarded([&] { engine().get(nHandle); });
}

AX_S32 AX_ENGINE_CreateContextV2(AX_ENGINE_HANDLE nHandle, AX_ENGINE_CONTEXT_T* pContext) {
  return guarded([&] {
    expect(pContext);
    *pContext = engine().add_context(nHandle);
  });
}

AX_S32 AX_ENGINE_GetGroupIOInfoCount(AX_ENGINE_HANDLE nHandle, AX_U32* pCount) {
  return guarded([&] {
    expect(pCount);
    *pCount = static_cast<AX_U32>(engine().get(nHandle)->groups.size());
  });
}

AX_S32 AX_ENGINE_GetGroupIOInfo(AX_ENGINE_HANDLE nHandle, AX_U32 nIndex, AX_ENGINE_IO_INFO_T** pIO) {
  return guarded([&] {
    expect(pIO);
    const std::shared_ptr<Handle> handle = engine().get(nHandle);
    group_of(*handle, nIndex);
    *pIO = &handle->groups[nIndex].info;
  });
}

AX_S32 AX_ENGINE_GetIOInfo(AX_ENGINE_HANDLE nHandle, AX_ENGINE_IO_INFO_T** pIO) {
  return AX_ENGINE_GetGroupIOInfo(nHandle, 0, pIO);
}

AX_S32 AX_ENGINE_GetHandleModelType(AX_ENGINE_HANDLE nHandle, AX_ENGINE_MODEL_TYPE_T* pModelType) {
  return guarded([&] {
    expect(pModelType);
    engine().get(nHandle);
    *pModelType = AX_ENGINE_MODEL_TYPE0;
  });
}

const AX_CHAR* AX_ENGINE_GetModelToolsVersion(AX_ENGINE_HANDLE nHandle) {
  const AX_CHAR* version = nullptr;
  guarded([&] { version = engine().get(nHandle)->tools_version.c_str(); });
  return version;
}

AX_S32 AX_ENGINE_GetCMMUsage(AX_ENGINE_HANDLE nHandle, AX_ENGINE_CMM_INFO* pCMMInfo) {
  return guarded([&] {
    expect(pCMMInfo);
    pCMMInfo->nCMMSize = static_cast<AX_U32>(engine().get(nHandle)->model.mapping.bytes().size());
  });
}

AX_S32 AX_ENGINE_SetAffinity(AX_ENGINE_HANDLE nHandle, AX_ENGINE_NPU_SET_T nNpuSet) {
  return guarded([&] { engine().get(nHandle)->affinity = nNpuSet; });
}

AX_S32 AX_ENGINE_GetAffinity(AX_ENGINE_HANDLE nHandle, AX_ENGINE_NPU_SET_T* pNpuSet) {
  return guarded([&] {
    expect(pNpuSet);
    *pNpuSet = engine().get(nHandle)->affinity;
  });
}

AX_S32 AX_ENGINE_RunSync(AX_ENGINE_HANDLE handle, AX_ENGINE_IO_T* pIO) { return run_group(handle, nullptr, 0, pIO); }

AX_S32 AX_ENGINE_RunSyncV2(AX_ENGINE_HANDLE handle, AX_ENGINE_CONTEXT_T context, AX_ENGINE_IO_T* pIO) {
  return run_group(handle, context, 0, pIO);
}

AX_S32 AX_ENGINE_RunGroupIOSync(AX_ENGINE_HANDLE handle, AX_ENGINE_CONTEXT_T context, AX_U32 nIndex,
                                AX_ENGINE_IO_T* pIO) {
  return run_group(handle, context, nIndex, pIO);
}

AX_S32 AX_ENGINE_CloneHandle(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }
AX_S32 AX_ENGINE_GetExtraData(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }
AX_S32 AX_ENGINE_GetVNPUInfo(AX_VOID) { return AXC_ENGINE_UNSUPPORTED; }

AX_U32 axc_extensions(void) { return AXC_EXTENSIONS; }

const char* axc_isa(void) {
  const char* name = "";
  guarded([&] { name = kernels().name; });
  return name;
}

const char* axc_last_error(void) { return last_error.c_str(); }

AX_S32 axc_open(AX_ENGINE_HANDLE* handle, const char* path) {
  return guarded([&] {
    expect(handle, path);
    *handle = nullptr;
    engine().mode();
    *handle = engine().add(Mapping::of_file(path));
  });
}

AX_S32 axc_set_threads(AX_U32 threads) {
  return guarded([&] {
    if (threads > 1024) illegal(std::to_string(threads) + " threads");
    const std::scoped_lock lock(Runtime::instance().mutex);
    Runtime::instance().set_threads(threads);
  });
}

AX_U32 axc_threads(void) {
  const std::scoped_lock lock(Runtime::instance().mutex);
  return static_cast<AX_U32>(Runtime::instance().threads());
}

AX_S32 axc_set_activation_bits(AX_ENGINE_HANDLE handle, AX_U32 bits) {
  return guarded([&] {
    if (bits != 8 && bits != 16) illegal(std::to_string(bits) + " bits for activations; expected 8 or 16");
    const std::shared_ptr<Handle> given = engine().get(handle);
    const std::scoped_lock lock(Runtime::instance().mutex);
    given->model.precision = bits == 8 ? Precision::Bits8 : Precision::Bits16;
  });
}

void axc_not_finite(AX_U32* output, AX_U32* row) {
  if (output) *output = static_cast<AX_U32>(last_not_finite.output);
  if (row) *row = static_cast<AX_U32>(last_not_finite.row);
}

AX_U32 axc_takes_segments(AX_ENGINE_HANDLE handle) {
  AX_U32 takes = 0;
  guarded([&] { takes = engine().get(handle)->model.takes_segments; });
  return takes;
}

AX_S32 axc_run_segments(AX_ENGINE_HANDLE handle, const axc_segment* segments, AX_U32 count, AX_ENGINE_IO_T* io) {
  return guarded([&] {
    expect(io, segments);
    engine().mode();
    const std::shared_ptr<Handle> given = engine().get(handle);
    if (!given->model.takes_segments) unsupported("rows of several sequences, with operators that mix rows");
    if (!count || count >= kMostTokens) illegal(std::to_string(count) + " segments");
    const bool reads_caches = attends(given->model.program);
    std::vector<Segment> rows;
    uint64_t tokens = 0;
    for (AX_U32 i = 0; i < count; ++i) {
      const axc_segment& of = segments[i];
      if (!of.tokens || of.tokens >= kMostTokens || of.history >= kMostTokens) illegal("a segment of no shape");
      if (reads_caches) expect(of.mask, of.k_cache, of.v_cache);
      rows.push_back({of.tokens, of.history, static_cast<const uint8_t*>(of.mask), static_cast<uint8_t*>(of.k_cache),
                      static_cast<uint8_t*>(of.v_cache), true});
      tokens += of.tokens;
    }
    if (tokens >= kMostTokens) illegal("segments of " + std::to_string(tokens) + " tokens");
    const std::vector<void*> outputs = given->run(rows, static_cast<uint32_t>(tokens), *io);
    expect_finite(given->model, static_cast<uint32_t>(tokens), 0, outputs);
  });
}

AX_S32 axc_run(AX_ENGINE_HANDLE handle, AX_U32 tokens, AX_U32 history, AX_ENGINE_IO_T* io) {
  return guarded([&] {
    expect(io);
    engine().mode();
    if (!tokens || tokens >= kMostTokens || history >= kMostTokens) illegal("a shape of no group");
    const std::shared_ptr<Handle> given = engine().get(handle);
    const std::vector<void*> outputs = given->run(tokens, history, *io, true);
    expect_finite(given->model, tokens, history, outputs);
  });
}

AX_U32 axc_counters(axc_counter* out, AX_U32 capacity) {
  const std::scoped_lock lock(Runtime::instance().mutex);
  const auto& counters = Runtime::instance().counters;
  for (size_t i = 0; out && i < counters.size() && i < capacity; ++i) {
    const size_t fused = std::size(kFusedNames);
    const char* name = i < fused ? kFusedNames[i] : operators()[i - fused].name.data();
    out[i] = {name, counters[i].calls, counters[i].nanoseconds};
  }
  return static_cast<AX_U32>(counters.size());
}

void axc_reset_counters(void) {
  const std::scoped_lock lock(Runtime::instance().mutex);
  std::fill(Runtime::instance().counters.begin(), Runtime::instance().counters.end(), Counter{});
}

}  // extern "C"
