#include "threads.h"

#include <sched.h>

namespace axc {
namespace {

constexpr int kSpins = 4000;  // about 50 microseconds, the time between two layers

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

// Takes the thread's own next item, or steals the last one of another thread, whose prefetches are for its next item.
bool Pool::Share::draw(bool own, size_t& item) {
  uint64_t seen = left.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t next = seen & UINT32_MAX, end = seen >> 32;
    if (next >= end) return false;
    item = own ? next : end - 1;
    const uint64_t rest = own ? seen + 1 : seen - (uint64_t{1} << 32);
    if (left.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_relaxed)) return true;
  }
}

void Pool::take(size_t thread) {
  for (size_t other = 0; other < shares_.size(); ++other) {
    Share& share = shares_[(thread + other) % shares_.size()];
    for (size_t item; share.draw(other == 0, item);) {
      call_(context_, item, thread);
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
