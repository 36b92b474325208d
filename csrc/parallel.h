// One pool of threads for all CPU operations.
#pragma once
#include <cstdint>

namespace fuserl {

// Calls body(context, begin, end) over [0, n) in chunks of at most `grain`, on at most `threads` threads, the caller's
// included, and returns when all are done. Chunks are handed out as threads get free, so nothing in a result may depend
// on which thread ran it. `body` must not throw. While another caller holds the pool the work runs on the caller alone.
// After fork() the child starts with a pool of its own.
void parallel_for(std::int64_t n, std::int64_t grain, int threads,
                  void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context);

using TeamRunner = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void borrow_team(TeamRunner runner);

}  // namespace fuserl
