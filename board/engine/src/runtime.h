// What all models of the process share: threads, the memory between steps, and the clocks.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "operators/view.h"
#include "threads.h"

namespace axc {

// Memory aligned for any vector that only ever grows; its content is not kept.
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

// The memory of one of a program's areas during a run.
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

  std::mutex mutex;  // held by who runs a model or changes what is below
  Arena values, levels, scratch, turns;
  std::vector<Placed> areas;  // of the model that runs
  std::vector<View> views;    // of the step that runs
  std::vector<Counter> counters;  // of each kind of fused step, then of each operator

  Pool& pool();
  void set_threads(size_t threads);  // 0: one for each CPU
  size_t threads() const { return threads_ ? threads_ : available_cpus(); }
  void forget_pool() { (void)pool_.release(); }  // in a forked child, which has no threads

 private:
  Runtime();

  std::unique_ptr<Pool> pool_;
  size_t threads_ = 0;
};

}  // namespace axc
