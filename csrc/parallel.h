// Threads for all CPU operations.
#pragma once
#include <cstdint>

namespace fuserl {

// Calls body(context, begin, end) over [0, n) in chunks of `grain` (one chunk on a lone thread), on at most `threads`
// threads, the caller's included, and returns when all are done. Chunks are handed out as threads get free, so nothing
// in a result may depend on which thread ran it. `body` must not throw, nor call parallel_for.
void parallel_for(std::int64_t n, std::int64_t grain, int threads,
                  void (*body)(void* context, std::int64_t begin, std::int64_t end), void* context);

// Lends a team of threads that the process has already: run(body, context, threads, 0) must call body(context) on each
// (the signature of GOMP_parallel). After their own work OpenMP's threads spin for milliseconds, and would compete with
// a second pool for the cores. Without a team, or after fork(), where no OpenMP team survives, our own pool works.
using TeamRunner = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
void lend_team(TeamRunner run);

}  // namespace fuserl
