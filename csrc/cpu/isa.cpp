#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>

#include "check.h"

namespace fuserl {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has = [](bool avx512) {
    return avx512 ? __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                  : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  };
  if (has(false)) return has(true) ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

void set_isa(const char* wanted) {
  std::string available;
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    const Isa candidate = static_cast<Isa>(i);
    available += std::string(i ? ", " : "") + name(candidate);
    if (std::strcmp(wanted, name(candidate)) == 0) return chosen().store(candidate, std::memory_order_relaxed);
  }
  refuse("set_isa", "name must be one this machine runs (" + available + ")", wanted, "Pick one of them.");
}

}  // namespace fuserl
