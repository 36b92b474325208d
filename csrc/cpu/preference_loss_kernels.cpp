// Token kernels of preference_loss, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "preference_loss_kernels.h"

namespace fuserl {
namespace {

constexpr int lanes = 32;

// The sum of value(i) over i < n.
template <class Value>
inline __attribute__((always_inline)) double sum(std::int64_t n, Value value) {
  double partial[lanes] = {};
  const std::int64_t whole = n / lanes * lanes;
  for (std::int64_t i = 0; i < whole; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += value(i + lane);
  for (std::int64_t i = whole; i < n; ++i) partial[i - whole] += value(i);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  return partial[0];
}

template <class T>
PreferenceSums sums(const T* x, const T* ref, const unsigned char* mask, std::int64_t n) {
  PreferenceSums total = {0, 0, static_cast<double>(n)};
  const auto logprob = [x](std::int64_t i) { return static_cast<double>(x[i]); };
  // Differences before sums: those of a policy near its reference are small beside both.
  const auto score = [x, ref](std::int64_t i) { return static_cast<double>(x[i]) - static_cast<double>(ref[i]); };
  if (mask) {
    total.tokens = sum(n, [mask](std::int64_t i) { return static_cast<double>(mask[i] != 0); });
    total.logprob = sum(n, [=](std::int64_t i) { return mask[i] ? logprob(i) : 0.0; });
    total.score = ref ? sum(n, [=](std::int64_t i) { return mask[i] ? score(i) : 0.0; }) : total.logprob;
  } else {
    total.logprob = sum(n, logprob);
    total.score = ref ? sum(n, score) : total.logprob;
  }
  return total;
}

}  // namespace

namespace FUSERL_ISA {
extern const PreferenceLossKernels preference_loss;
const PreferenceLossKernels preference_loss = {sums<float>, sums<double>};
}  // namespace FUSERL_ISA
}  // namespace fuserl
