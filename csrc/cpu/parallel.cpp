#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace fuserl {
namespace {

struct Job {
  std::int64_t n;
  std::int64_t grain;
  void (*body)(void*, std::int64_t, std::int64_t);
  void* context;
  std::atomic<std::int64_t> next{0};

  void work() {
    for (std::int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      body(context, begin, std::min(begin + grain, n));
  }
};

class Pool {
 public:
  // While another caller holds the pool the work runs on the caller alone.
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = &job;
      seats_ = std::min(helpers, workers_);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    seats_ = 0;  // a worker that has not woken yet is not waited for
    done_.wait(lock, [this] { return seated_ == 0; });
  }

 private:
  void grow(int count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those there, and the caller, do the work.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++seated_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--seated_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int workers_ = 0;
  int seats_ = 0;   // places still open in the current job
  int seated_ = 0;  // workers inside it
};

std::mutex creation;
// Never freed: detached workers sleep in it until the process ends.
std::atomic<Pool*> pool{nullptr};
std::atomic<TeamRunner> team{nullptr};

// No thread but the caller's survives fork(): the child drops the team and makes a pool of its own.
void forked() {
  pool.store(nullptr, std::memory_order_relaxed);
  team.store(nullptr, std::memory_order_relaxed);
  creation.unlock();
}

void watch_fork() {
  static const int registered = pthread_atfork([] { creation.lock(); }, [] { creation.unlock(); }, forked);
  static_cast<void>(registered);
}

Pool& own_pool() {
  if (Pool* existing = pool.load(std::memory_order_acquire)) return *existing;
  watch_fork();
  std::lock_guard<std::mutex> lock(creation);
  if (!pool.load(std::memory_order_relaxed)) pool.store(new Pool, std::memory_order_release);
  return *pool.load(std::memory_order_relaxed);
}

}  // namespace

void lend_team(TeamRunner run) {
  watch_fork();
  team.store(run, std::memory_order_relaxed);
}

void parallel_for(std::int64_t n, std::int64_t grain, int threads,
                  void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (n <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t chunks = (n + grain - 1) / grain;
  if (threads <= 1 || chunks == 1) return body(context, 0, n);
  Job job{n, grain, body, context};
  // The whole team even for few chunks: OpenMP ends the threads that a smaller one leaves out, and makes them anew.
  if (const TeamRunner run = team.load(std::memory_order_relaxed))
    run([](void* shared) { static_cast<Job*>(shared)->work(); }, &job, static_cast<unsigned>(threads), 0);
  else
    own_pool().run(job, static_cast<int>(std::min<std::int64_t>({threads - 1, chunks - 1, 1023})));
}

}  // namespace fuserl
