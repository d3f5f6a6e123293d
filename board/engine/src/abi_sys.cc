#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

#include "ax_sys_api.h"
#include "axc_errors.h"
#include "cmm.h"

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kFirst = uint64_t{5} << 30;  // a plausible physical address for a board's CMM

struct Block {
  uint8_t* memory;
  uint64_t size;    // requested bytes
  uint64_t mapped;  // bytes mapped, starting `lead` bytes before `memory`
  uint64_t lead;
};

class Registry {
 public:
  void start() {
    const std::scoped_lock lock(mutex_);
    ++users_;
  }
  int stop() {
    const std::scoped_lock lock(mutex_);
    if (!users_) return AXC_SYS_NOT_READY;
    --users_;
    return AXC_OK;
  }
  bool ready() {
    const std::scoped_lock lock(mutex_);
    return users_ > 0;
  }

  int allocate(AX_U64* physical, void** address, uint64_t size, uint64_t alignment) {
    if (!physical || !address) return AXC_SYS_NULL;
    if (!ready()) return AXC_SYS_NOT_READY;
    if (!alignment) alignment = kPage;
    if (!size || alignment & (alignment - 1) || alignment > (1 << 30)) return AXC_SYS_ILLEGAL;
    const uint64_t extra = alignment > kPage ? alignment : 0;
    const uint64_t mapped = (size + extra + kPage - 1) / kPage * kPage;
    void* memory = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return AXC_SYS_NO_MEMORY;
    const uint64_t base = reinterpret_cast<uint64_t>(memory);
    const uint64_t lead = extra ? (alignment - base % alignment) % alignment : 0;
    const std::scoped_lock lock(mutex_);
    const uint64_t step = alignment > kPage ? alignment : kPage;
    next_ = (next_ + step - 1) / step * step;
    blocks_[next_] = {reinterpret_cast<uint8_t*>(base + lead), size, mapped, lead};
    by_address_[base + lead] = next_;
    *physical = next_;
    *address = reinterpret_cast<void*>(base + lead);
    next_ += mapped + kPage;  // a gap, so that two blocks are never contiguous
    return AXC_OK;
  }

  int free(uint64_t physical, void* address) {
    const std::scoped_lock lock(mutex_);
    const auto found = blocks_.find(physical);
    if (found == blocks_.end() || (address && found->second.memory != address)) return AXC_SYS_FREE;
    const Block block = found->second;
    blocks_.erase(found);
    by_address_.erase(reinterpret_cast<uint64_t>(block.memory));
    return ::munmap(block.memory - block.lead, block.mapped) ? AXC_SYS_FREE : AXC_OK;
  }

  // Checks a range that a client wants to synchronise or map: AXC_OK if it lies within one block.
  int check(uint64_t physical, uint64_t size) {
    if (!ready()) return AXC_SYS_NOT_READY;
    return find(physical, size) ? AXC_OK : AXC_SYS_ILLEGAL;
  }
  void* map(uint64_t physical, uint64_t size) { return ready() ? find(physical, size) : nullptr; }

  // The memory at a physical address, or null unless `size` bytes lie within one block.
  void* find(uint64_t physical, uint64_t size) {
    const std::scoped_lock lock(mutex_);
    auto found = blocks_.upper_bound(physical);
    if (found == blocks_.begin()) return nullptr;
    --found;
    const uint64_t offset = physical - found->first;
    return offset < found->second.size && size <= found->second.size - offset ? found->second.memory + offset : nullptr;
  }

  uint64_t room(const void* address) {
    const uint64_t at = reinterpret_cast<uint64_t>(address);
    const std::scoped_lock lock(mutex_);
    auto found = by_address_.upper_bound(at);
    if (found == by_address_.begin()) return 0;
    --found;
    const uint64_t size = blocks_[found->second].size;
    return at - found->first < size ? size - (at - found->first) : 0;
  }

 private:
  std::mutex mutex_;
  uint64_t users_ = 0;                       // calls of AX_SYS_Init minus calls of AX_SYS_Deinit
  std::map<uint64_t, Block> blocks_;         // by physical address
  std::map<uint64_t, uint64_t> by_address_;  // virtual to physical
  uint64_t next_ = kFirst;
};

Registry& registry() {
  static Registry& blocks = *new Registry;  // clients may free from their own exit handlers
  return blocks;
}

}  // namespace

extern "C" {

uint64_t axc_sys_room(const void* address) { return registry().room(address); }
void* axc_sys_virtual(uint64_t physical) { return registry().find(physical, 1); }
int axc_sys_ready(void) { return registry().ready(); }

AX_S32 AX_SYS_Init(void) {
  registry().start();
  return AXC_OK;
}
AX_S32 AX_SYS_Deinit(void) { return registry().stop(); }

AX_S32 AX_SYS_MemAlloc(AX_U64* phyaddr, AX_VOID** pviraddr, AX_U32 size, AX_U32 align, const AX_S8*) {
  return registry().allocate(phyaddr, pviraddr, size, align);
}
AX_S32 AX_SYS_MemAllocCached(AX_U64* phyaddr, AX_VOID** pviraddr, AX_U32 size, AX_U32 align, const AX_S8*) {
  return registry().allocate(phyaddr, pviraddr, size, align);
}
AX_S32 AX_SYS_MemFree(AX_U64 phyaddr, AX_VOID* pviraddr) { return registry().free(phyaddr, pviraddr); }

// CPU memory is coherent, so there is nothing to flush; only checks that the range belongs to a block.
AX_S32 AX_SYS_MflushCache(AX_U64 phyaddr, AX_VOID*, AX_U32 size) { return registry().check(phyaddr, size); }
AX_S32 AX_SYS_MinvalidateCache(AX_U64 phyaddr, AX_VOID*, AX_U32 size) { return registry().check(phyaddr, size); }

AX_VOID* AX_SYS_Mmap(AX_U64 phyaddr, AX_U32 size) { return registry().map(phyaddr, size); }
AX_VOID* AX_SYS_MmapCache(AX_U64 phyaddr, AX_U32 size) { return registry().map(phyaddr, size); }
AX_VOID* AX_SYS_MmapFast(AX_U64 phyaddr, AX_U32 size) { return registry().map(phyaddr, size); }
AX_VOID* AX_SYS_MmapCacheFast(AX_U64 phyaddr, AX_U32 size) { return registry().map(phyaddr, size); }
AX_S32 AX_SYS_Munmap(AX_VOID* pviraddr, AX_U32 size) {
  return registry().room(pviraddr) >= size ? AXC_OK : AXC_SYS_UNMAP;
}

}  // extern "C"
