// Token kernels of preference_loss, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "preference_loss_kernels.h"

namespace fuserl {
namespace {

constexpr int lanes = 32;

struct Partial {
  double logprob[lanes], score[lanes];
  std::int32_t tokens[lanes];
};

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
inline __attribute__((always_inline)) T masked_by(Bits<T> keep, T x) {
  Bits<T> bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  bits &= keep;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class T>
inline __attribute__((always_inline)) T sum(T* partial) {
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  return partial[0];
}

// A token for each of `n` lanes. What the mask drops becomes 0 by its bits, which takes no branch.
template <bool masked, bool with_ref, class T>
inline __attribute__((always_inline)) void add(Partial& partial, const T* x, const T* ref, const unsigned char* mask,
                                               int n) {
  for (int lane = 0; lane < n; ++lane) {
    const Bits<T> keep = !masked || mask[lane] != 0 ? ~Bits<T>(0) : 0;
    const double policy = static_cast<double>(masked_by(keep, x[lane]));
    partial.logprob[lane] += policy;
    // Differences before sums: those of a policy near its reference are small beside both.
    if (with_ref) partial.score[lane] += policy - static_cast<double>(masked_by(keep, ref[lane]));
  }
  if (masked)
    for (int lane = 0; lane < n; ++lane) partial.tokens[lane] += mask[lane] != 0;
}

template <bool masked, bool with_ref, class T>
PreferenceSums sums_of(const T* x, const T* ref, const unsigned char* mask, std::int64_t n) {
  Partial partial = {};
  const auto block = [&](std::int64_t i, int lanes_of_it) __attribute__((always_inline)) {
    add<masked, with_ref>(partial, x + i, with_ref ? ref + i : nullptr, masked ? mask + i : nullptr, lanes_of_it);
  };
  const std::int64_t whole = n / lanes * lanes;
  for (std::int64_t i = 0; i < whole; i += lanes) block(i, lanes);
  block(whole, static_cast<int>(n - whole));
  const double logprob = sum(partial.logprob), tokens = static_cast<double>(masked ? sum(partial.tokens) : n);
  return {with_ref ? sum(partial.score) : logprob, logprob, tokens};
}

template <class T>
PreferenceSums sums(const T* x, const T* ref, const unsigned char* mask, std::int64_t n) {
  if (mask) return ref ? sums_of<true, true>(x, ref, mask, n) : sums_of<true, false>(x, ref, mask, n);
  return ref ? sums_of<false, true>(x, ref, mask, n) : sums_of<false, false>(x, ref, mask, n);
}

}  // namespace

namespace FUSERL_ISA {
extern const PreferenceLossKernels preference_loss;
const PreferenceLossKernels preference_loss = {sums<float>, sums<double>};
}  // namespace FUSERL_ISA
}  // namespace fuserl
