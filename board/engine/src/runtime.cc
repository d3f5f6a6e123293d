#include "runtime.h"

#include "program.h"

#include <pthread.h>

#include <cstdlib>
#include <new>

namespace axc {
namespace {

constexpr size_t kAlignment = 64;

size_t threads_asked_for() {
  const char* text = std::getenv("AXC_THREADS");
  const long threads = text ? std::strtol(text, nullptr, 10) : 0;
  return threads >= 1 && threads <= 1024 ? static_cast<size_t>(threads) : 0;
}

}  // namespace

uint8_t* Arena::reserve(size_t bytes) {
  if (bytes > size_) {
    memory_.reset();
    size_ = 0;
    memory_.reset(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{kAlignment})));
    size_ = bytes;
  }
  return memory_.get();
}

void Arena::Free::operator()(uint8_t* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }

Runtime& Runtime::instance() {
  static Runtime& runtime = *new Runtime;  // never destroyed: threads may outlive static objects
  return runtime;
}

Runtime::Runtime() : counters(std::size(kFusedNames) + operators().size()), threads_(threads_asked_for()) {
  pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                 [] {
                   instance().forget_pool();
                   instance().mutex.unlock();
                 });
}

Pool& Runtime::pool() {
  if (!pool_) pool_ = std::make_unique<Pool>(threads());
  return *pool_;
}

void Runtime::set_threads(size_t threads) {
  if (pool_ && pool_->size() != (threads ? threads : available_cpus())) pool_.reset();
  threads_ = threads;
}

}  // namespace axc
