// The process's threads.
//
// Owns: dealing numbered tasks to a few threads and the caller. Does not know: what a task does.
// Invariant: `run` returns when every task is done; tasks are begun in order, must not depend on who runs them, and may
// wait for those with lower numbers, which must end even where they fail. If two
// callers come at once (two MLX streams) the second does its tasks itself. Waiting threads spin for
// some microseconds, so that the next layer finds them awake, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cenacle {

class WorkerPool {
 public:
  static WorkerPool& get() {
    static WorkerPool* pool = new WorkerPool;  // never destroyed: its threads may outlive main
    return *pool;
  }

  int threads() const { return threads_.load(); }

  // Between two looks at what another thread will change.
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // The caller counts as one.
  void resize(int threads) {
    std::lock_guard lock(busy_);
    quit_ = true;
    wake();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    quit_ = false;
    threads_ = std::max(1, threads);
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this] { work(); });
  }

  template <class Task>
  void run(int64_t tasks, Task&& task) {
    std::unique_lock lock(busy_, std::defer_lock);
    if (tasks <= 1 || threads_ == 1 || !lock.try_lock()) {
      for (int64_t i = 0; i < tasks; i++) task(i);
      return;
    }
    call_ = [](void* context, int64_t i) { (*static_cast<std::remove_reference_t<Task>*>(context))(i); };
    context_ = &task;
    tasks_ = tasks;
    error_ = nullptr;
    next_ = 0;
    open_ = true;
    wake();
    take();
    open_ = false;
    while (inside_ != 0) pause();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void wake() {
    generation_++;
    if (sleeping_ != 0) generation_.notify_all();
  }

  void take() {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) call_(context_, i);
    } catch (...) {
      next_ = tasks_;
      std::lock_guard lock(error_lock_);
      error_ = std::current_exception();
    }
  }

  void work() {
    for (uint32_t seen = generation_; !quit_;) {
      inside_++;
      // A job is only changed while it is closed and nobody is inside.
      if (open_) take();
      inside_--;
      const auto since = std::chrono::steady_clock::now();
      for (int i = 1; generation_ == seen; i++) {
        pause();
        if (i % 64 == 0 && std::chrono::steady_clock::now() - since > std::chrono::microseconds(100)) {
          sleeping_++;
          generation_.wait(seen);
          sleeping_--;
        }
      }
      seen = generation_;
    }
  }

  std::mutex busy_, error_lock_;
  std::vector<std::thread> workers_;
  std::atomic<int> threads_{1}, inside_{0}, sleeping_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<bool> open_{false}, quit_{false};
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  void (*call_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace cenacle
