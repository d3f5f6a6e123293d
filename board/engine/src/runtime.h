// State shared by all models of the process: threads, memory for intermediate values, counters.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.h"
#include "operators/view.h"
#include "threads.h"

namespace axc {

// Vector-aligned memory that only grows; growing discards its content.
class Arena {
 public:
  // Throws std::bad_alloc.
  uint8_t* reserve(size_t bytes);
  uint8_t* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0;
};

// The memory of one area of a program during a run.
struct Placed {
  uint8_t* start;
  size_t units;
};

struct Counter {
  uint64_t calls = 0, nanoseconds = 0;
};

class Runtime {
 public:
  static Runtime& instance();

  std::mutex mutex;  // held while a model runs or the members below change
  Arena values, levels, scratch, turns;
  std::vector<Placed> areas;  // of the running model
  std::vector<View> views;    // of the running step
  std::vector<AttentionJob> jobs;  // of the running attention, one for each segment
  std::vector<Counter> counters;  // one for each kind of fused step, then one for each operator

  Pool& pool();
  void set_threads(size_t threads);  // 0: one for each CPU
  size_t threads() const { return threads_ ? threads_ : available_cpus(); }
  void forget_pool() { (void)pool_.release(); }  // in a forked child, where the threads do not exist

 private:
  Runtime();

  std::unique_ptr<Pool> pool_;
  size_t threads_ = 0;
};

}  // namespace axc
