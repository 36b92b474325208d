// Which of the copies of the row kernels runs on this machine.
#pragma once

namespace fuserl {

enum class Isa : int { baseline, avx2, avx512 };

Isa isa();  // the best this machine has, unless set_isa chose another
const char* name(Isa isa);
bool intel();  // whether the processor is Intel's, for which torch's library of matrix products was written
// For tests: throws std::invalid_argument when this machine lacks it.
void set_isa(const char* name);

}  // namespace fuserl

// Inside of namespace fuserl: kernels(), the copy of a table that was compiled for what runs.
#if defined(__x86_64__)
#define FUSERL_KERNELS(Table, table)                                                                        \
  namespace baseline { extern const Table table; }                                                          \
  namespace avx2 { extern const Table table; }                                                              \
  namespace avx512 { extern const Table table; }                                                            \
  namespace {                                                                                               \
  const Table& kernels() {                                                                                  \
    return isa() == Isa::avx512 ? avx512::table : isa() == Isa::avx2 ? avx2::table : baseline::table;       \
  }                                                                                                         \
  }
#else
#define FUSERL_KERNELS(Table, table)               \
  namespace baseline { extern const Table table; } \
  namespace {                                      \
  const Table& kernels() { return baseline::table; } \
  }
#endif
