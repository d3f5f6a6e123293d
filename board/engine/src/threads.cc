#include "threads.h"

#include <sched.h>

namespace axc {
namespace {

constexpr int kSpins = 4000;  // some 50 microseconds: about the time between two layers

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

size_t available_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<size_t>(CPU_COUNT(&set));
  const unsigned count = std::thread::hardware_concurrency();
  return count ? count : 1;
}

Pool::Pool(size_t threads) : shares_(threads) {
  for (size_t thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_ = true;
  ++epoch_;
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start(size_t count, Call call, const void* context) {
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t threads = shares_.size();
  for (uint64_t thread = 0; thread < threads; ++thread) {
    const uint64_t first = count * thread / threads, end = count * (thread + 1) / threads;
    shares_[thread].left.store(end << 32 | first, std::memory_order_release);
  }
  ++epoch_;
  if (asleep_.load()) epoch_.notify_all();
  take(0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

void Pool::take(size_t thread) {
  for (size_t other = 0; other < shares_.size(); ++other) {
    std::atomic<uint64_t>& left = shares_[(thread + other) % shares_.size()].left;
    const auto some = [](uint64_t seen) { return (seen & UINT32_MAX) < seen >> 32; };
    while (some(left.load(std::memory_order_relaxed))) {
      const uint64_t drawn = left.fetch_add(1, std::memory_order_acq_rel);
      if (!some(drawn)) break;
      call_(context_, drawn & UINT32_MAX, thread);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
}

void Pool::work(size_t thread) {
  uint32_t seen = 0;
  while (!stop_) {
    for (int spins = 0; epoch_.load() == seen && spins < kSpins; ++spins) pause();
    if (epoch_.load() == seen) {
      ++asleep_;
      epoch_.wait(seen);
      --asleep_;
      continue;
    }
    seen = epoch_.load();
    take(thread);
  }
}

}  // namespace axc
