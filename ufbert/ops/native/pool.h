// The threads that kernels run on, and how floats are computed there.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ufbert {

// Sets how the thread computes while this object lives: results are rounded to the nearest, and a number nearer to zero than
// 2^-126 counts as zero and becomes zero. XLA does so on its own threads, and instructions for bfloat16 always do, so all
// threads do here: a row's answer must not depend on the thread that computes it.
class Flushing {
 public:
#if defined(__x86_64__)
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }  // no traps, both flushing bits
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Flushing() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t(1) << 24));
  }
  ~Flushing() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  Flushing() {}
#endif
  Flushing(const Flushing&) = delete;
};

// Tasks that any number of threads take one by one. The caller takes them too, and waits only for those that another thread
// has begun: a helper that never got a processor costs nothing. What a task throws on any thread, the caller throws.
struct Turns {
  std::atomic<int64_t> next{0}, done{0};
  int64_t count;
  void (*task)(void*, int64_t);
  void* self;
  std::mutex lock;
  std::condition_variable all_done;
  std::exception_ptr thrown;

  Turns(int64_t count, void (*task)(void*, int64_t), void* self) : count(count), task(task), self(self) {}

  void work() {
    for (int64_t i = next++; i < count; i = next++) {
      try {
        task(self, i);
      } catch (...) {
        std::lock_guard<std::mutex> held(lock);
        thrown = std::current_exception();
      }
      if (++done == count) {
        std::lock_guard<std::mutex> held(lock);
        all_done.notify_one();
      }
    }
  }

  void wait() {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
    while (done < count && std::chrono::steady_clock::now() < until) {
    }
    if (done < count) {
      std::unique_lock<std::mutex> held(lock);
      all_done.wait(held, [&] { return done >= count; });
    }
    if (thrown) std::rethrow_exception(thrown);
  }
};

// The process's helper threads, one fewer than its processors (or than $NPROC, which limits XLA, too). XLA's own pool is not
// used: it has as many threads as processors in addition to the caller's, and waking one costs as much as a small layer. A
// helper polls for work for 50 microseconds after its last and then sleeps. If the system refuses more threads, those that
// exist do the work.
class Helpers {
 public:
  // Never destroyed, because threads may outlive static objects. A forked process has none of these threads, and perhaps a lock
  // that one of them held, so it gets new helpers.
  static Helpers& all() { return *all_; }

  int64_t count() const { return count_; }

  void help(const std::shared_ptr<Turns>& turns, int64_t helpers) {
    bool asleep;
    {
      std::lock_guard<std::mutex> held(lock_);
      try {
        for (; started_ < std::min(helpers, count_); ++started_) std::thread([this] { live(); }).detach();
      } catch (const std::system_error&) {
      }
      helpers = std::min(helpers, started_);
      for (int64_t i = 0; i < helpers; ++i) waiting_.push_back(turns);
      ++posted_;
      asleep = sleeping_ > 0;
    }
    if (asleep) helpers > 1 ? woken_.notify_all() : woken_.notify_one();
  }

 private:
  Helpers() {
    int64_t processors = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const char* limit = std::getenv("NPROC");
    if (limit && std::atoi(limit) > 0) processors = std::min<int64_t>(processors, std::atoi(limit));
    count_ = processors - 1;
  }

  std::shared_ptr<Turns> take() {
    std::lock_guard<std::mutex> held(lock_);
    if (waiting_.empty()) return nullptr;
    auto turns = waiting_.front();
    waiting_.pop_front();
    return turns;
  }

  void live() {
    using Clock = std::chrono::steady_clock;
    const Flushing flushing;
    for (;;) {
      int64_t seen = posted_;
      while (auto turns = take()) turns->work();
      const auto until = Clock::now() + std::chrono::microseconds(50);
      while (posted_ == seen && Clock::now() < until) {
      }
      if (posted_ != seen) continue;
      std::unique_lock<std::mutex> held(lock_);
      ++sleeping_;
      woken_.wait(held, [&] { return posted_ != seen; });
      --sleeping_;
    }
  }

  static Helpers* first() {
    pthread_atfork(nullptr, nullptr, [] { all_ = new Helpers; });
    return new Helpers;
  }

  static Helpers* all_;
  std::mutex lock_;
  std::condition_variable woken_;
  std::deque<std::shared_ptr<Turns>> waiting_;
  std::atomic<int64_t> posted_{0};
  int64_t count_, started_ = 0, sleeping_ = 0;
};

inline Helpers* Helpers::all_ = Helpers::first();

// The caller and up to `limit` - 1 helpers; 0 takes all of them.
struct SharedPool : Pool {
  const Flushing flushing;

  explicit SharedPool(int64_t limit) {
    threads = 1 + Helpers::all().count();
    if (limit > 0) threads = std::min(threads, limit);
  }
  void run(int64_t count, void (*task)(void*, int64_t), void* self) override {
    if (threads == 1 || count < 2) {
      for (int64_t i = 0; i < count; ++i) task(self, i);
      return;
    }
    auto turns = std::make_shared<Turns>(count, task, self);
    try {
      Helpers::all().help(turns, std::min(threads, count) - 1);
    } catch (const std::bad_alloc&) {  // fewer helpers were told, or none; those that were must still be waited for
    }
    turns->work();
    turns->wait();
  }
};

}  // namespace ufbert
