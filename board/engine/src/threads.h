// The process-wide thread pool. Any thread may take any item, so results must not depend on it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace axc {

class Pool {
 public:
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t size() const { return workers_.size() + 1; }

  // Calls body(item, thread) for every item in [0, count), count < 2^32; returns when all are done. One caller at a
  // time; the caller works as thread 0. `body` must not throw. Each thread takes a contiguous range of items, for
  // sequential reads, then steals items of other threads.
  template <class Body>
  void each(size_t count, const Body& body) {
    if (count == 1 || workers_.empty()) {
      for (size_t item = 0; item < count; ++item) body(item, size_t{0});
      return;
    }
    start(count, [](const void* context, size_t item, size_t thread) { (*static_cast<const Body*>(context))(item, thread); }, &body);
  }

 private:
  using Call = void (*)(const void*, size_t, size_t);

  void start(size_t count, Call call, const void* context);
  void work(size_t thread);
  void take(size_t thread);

  // Remaining items of a thread: end << 32 | next. A thread that is late may take an item of a newer job; that is safe.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};

    bool draw(bool own, size_t& item);
  };

  std::vector<Share> shares_;
  alignas(64) std::atomic<size_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> asleep_{0};
  std::atomic<bool> stop_{false};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

// Number of CPUs in this process's affinity mask.
size_t available_cpus();

}  // namespace axc
