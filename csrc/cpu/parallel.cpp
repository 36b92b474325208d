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

// Never freed: detached workers sleep in it until the process ends. A forked child has none of them and takes a new one.
std::atomic<Pool*> pool{nullptr};
std::atomic<TeamRunner> borrowed{nullptr};
std::mutex creation;

Pool& current() {
  if (Pool* existing = pool.load(std::memory_order_acquire)) return *existing;
  std::lock_guard<std::mutex> lock(creation);
  if (!pool.load(std::memory_order_relaxed)) {
    static const int registered = pthread_atfork([] { creation.lock(); }, [] { creation.unlock(); },
                                                 [] {
                                                   pool.store(nullptr, std::memory_order_relaxed);
                                                   borrowed.store(nullptr, std::memory_order_relaxed);
                                                   creation.unlock();
                                                 });
    static_cast<void>(registered);
    pool.store(new Pool, std::memory_order_release);
  }
  return *pool.load(std::memory_order_relaxed);
}

}  // namespace

void borrow_team(TeamRunner runner) { borrowed.store(runner, std::memory_order_relaxed); }

void parallel_for(std::int64_t n, std::int64_t grain, int threads,
                  void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (n <= 0) return;
  grain = std::max<std::int64_t>(grain, 1);
  const std::int64_t chunks = (n + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<std::int64_t>({threads - 1, chunks - 1, 1023}));
  if (helpers <= 0) return body(context, 0, n);
  Job job{n, grain, body, context};
  Pool& own = current();
  if (TeamRunner run = borrowed.load(std::memory_order_relaxed))
    run([](void* j) { static_cast<Job*>(j)->work(); }, &job, static_cast<unsigned>(helpers) + 1, 0);
  else
    own.run(job, helpers);
}

}  // namespace fuserl
