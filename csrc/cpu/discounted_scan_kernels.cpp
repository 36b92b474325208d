// Block kernels of the scans, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
//
// A token waits for the one before it: a product and a sum, four cycles, however wide the registers. So a vector of
// tokens is scanned by itself in log2(lanes) steps, x += p shift(x), p *= shift(p), with nothing to wait for, and only
// its end is passed on: a product, a sum and a shuffle, nine cycles for sixteen tokens, which the steps themselves take,
// too. Then memory is next: two reads and two writes a token of gae.
#include "discounted_scan_kernels.h"

#include "vec.h"

namespace fuserl {
namespace {

template <class T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(width * 4)));
  typedef Vector Unaligned __attribute__((aligned(sizeof(T)), may_alias));
  static constexpr int count = width * 4 / static_cast<int>(sizeof(T));
  static constexpr T smallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);  // below it arithmetic may be slow
};

template <int... i>
struct Indices {};
template <int n, int... i>
struct First : First<n - 1, n - 1, i...> {};
template <int... i>
struct First<0, i...> {
  typedef Indices<i...> Of;
};

// Each lane gets the value `k` lanes before it in the order of the scan, the first k that of `fill`.
template <int k, bool forward, class V, int... i>
FUSERL_INLINE V shifted(V x, V fill, Indices<i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(x, fill, (forward ? (i >= k ? i - k : n + i) : (i + k < n ? i + k : n + i))...);
}

template <bool forward, class V, int... i>
FUSERL_INLINE V last_everywhere(V x, Indices<i...>) {
  return __builtin_shufflevector(x, x, (forward ? static_cast<int>(sizeof...(i)) - 1 : i * 0)...);
}

// The products of the links: over 1, 2, 4, ... lanes, as the steps need them, and in the end over all lanes before, of
// which `rest` is what rounding lost. One link for all tokens would otherwise lose the same at every vector.
template <class V>
struct Products {
  V step[4], all, rest;
};

template <class T, bool forward, class V>
FUSERL_INLINE Products<V> products(V a) {
  constexpr int n = Lanes<T>::count;
  const typename First<n>::Of lanes;
  const V one = V{} + T(1);
  Products<V> p;
  p.step[0] = a;
  a *= shifted<1, forward>(a, one, lanes);
  p.step[1] = a;
  if constexpr (n > 2) a *= shifted<2, forward>(a, one, lanes);
  p.step[2] = a;
  if constexpr (n > 4) a *= shifted<4, forward>(a, one, lanes);
  p.step[3] = a;
  if constexpr (n > 8) a *= shifted<8, forward>(a, one, lanes);
  p.all = a;
  p.rest = V{};
  return p;
}

template <class T, bool forward, class V>
FUSERL_INLINE Products<V> powers(T factor) {
  constexpr int n = Lanes<T>::count;
  Products<V> p = {};
  long double power = 1;
  for (int i = 0; i < n; ++i) {
    power *= factor;
    const T rounded = static_cast<T>(power);
    const int lane = forward ? i : n - 1 - i;
    p.all[lane] = rounded;
    p.rest[lane] = static_cast<T>(power - rounded);
    for (int k = 0; k < 4; ++k)
      if (i + 1 == 1 << k) p.step[k] = V{} + rounded;
  }
  return p;
}

template <class T, bool forward, class V>
FUSERL_INLINE V scanned(V x, const Products<V>& p) {
  constexpr int n = Lanes<T>::count;
  const typename First<n>::Of lanes;
  const V zero = {};
  x += p.step[0] * shifted<1, forward>(x, zero, lanes);
  if constexpr (n > 2) x += p.step[1] * shifted<2, forward>(x, zero, lanes);
  if constexpr (n > 4) x += p.step[2] * shifted<4, forward>(x, zero, lanes);
  if constexpr (n > 8) x += p.step[3] * shifted<8, forward>(x, zero, lanes);
  return x;
}

template <class T, bool forward, bool linked>
void scan(const ScanBlock<T>& at, ScanState<T>& state) {
  typedef typename Lanes<T>::Vector V;
  constexpr int n = Lanes<T>::count;
  constexpr T smallest = Lanes<T>::smallest;
  const typename First<n>::Of lanes;
  const bool carried = at.carry != 0;  // an overflown product times 0 would be NaN
  V local = V{} + state.local, product = V{} + state.product, link = V{} + state.link;
  Products<V> p = powers<T, forward, V>(at.factor);

  const auto step = [&](V b, V a) {
    if (linked) {
      if (forward) {
        const V own = a;
        a = shifted<1, forward>(a, link, lanes);
        link = last_everywhere<forward>(own, lanes);
      }
      p = products<T, forward>(a);
    }
    V x = scanned<T, forward>(b, p), q = p.all * product;
    if (!linked) {
      x += p.rest * local;
      q += p.rest * product;
    }
    x += p.all * local;
    local = last_everywhere<forward>(x, lanes);
    // A step late, so that the comparison is not waited for.
    product = (product < smallest) & (product > -smallest) ? V{} : last_everywhere<forward>(q, lanes);
    return carried ? x + q * at.carry : x;
  };

  const std::int64_t whole = at.count / n * n;
  for (std::int64_t i = 0; i < whole; i += n) {
    const std::int64_t t = forward ? i : at.count - i - n;
    typedef typename Lanes<T>::Unaligned Unaligned;
    const V a = linked ? V(*reinterpret_cast<const Unaligned*>(at.a + t)) : V{};
    const V x = step(*reinterpret_cast<const Unaligned*>(at.b + t), a);
    if (at.x) *reinterpret_cast<Unaligned*>(at.x + t) = x;
  }
  if (const int rest = static_cast<int>(at.count - whole)) {
    V b = {}, a = {};  // the lanes that are left come after all tokens of the segment: what is in them does not matter
    const std::int64_t t = forward ? whole : 0;
    const int lane = forward ? 0 : n - rest;
    for (int i = 0; i < rest; ++i) {
      b[lane + i] = at.b[t + i];
      if (linked) a[lane + i] = at.a[t + i];
    }
    const V x = step(b, a);
    if (at.x)
      for (int i = 0; i < rest; ++i) at.x[t + i] = x[lane + i];
  }
  state = {local[0], product[0], link[0]};
}

template <class T, bool forward>
void scan_of(const ScanBlock<T>& at, ScanState<T>& state) {
  if (at.a)
    scan<T, forward, true>(at, state);
  else
    scan<T, forward, false>(at, state);
}

template <class T>
void differences(const DifferenceBlock<T>& at) {
  const T gamma = at.gamma_of_all, lam = at.lam_of_all;
  const auto gamma_at = [&](std::int64_t i) { return at.gamma ? at.gamma[i] : gamma; };
  const auto lam_at = [&](std::int64_t i) { return at.lam ? at.lam[i] : lam; };
  if (at.mask) {
    T next = at.next;
    for (std::int64_t i = at.count - 1; i >= 0; --i) {
      const bool keep = at.mask[i] != 0;
      const T g = gamma_at(i);
      at.delta[i] = keep ? at.rewards[i] + g * next - at.values[i] : T(0);
      at.links[i] = keep ? g * lam_at(i) : T(1);
      next = keep ? at.values[i] : next;
    }
    return;
  }
  const std::int64_t last = at.count - 1;
  for (std::int64_t i = 0; i < last; ++i) at.delta[i] = at.rewards[i] + gamma_at(i) * at.values[i + 1] - at.values[i];
  at.delta[last] = at.rewards[last] + gamma_at(last) * at.next - at.values[last];
  if (at.gamma || at.lam)
    for (std::int64_t i = 0; i < at.count; ++i) at.links[i] = gamma_at(i) * lam_at(i);
}

template <class T>
void finish(T* advantages, T* returns, const T* values, const unsigned char* mask, std::int64_t count) {
  if (!mask) {
    for (std::int64_t i = 0; i < count; ++i) returns[i] = advantages[i] + values[i];
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const T advantage = mask[i] ? advantages[i] : T(0), value = mask[i] ? values[i] : T(0);
    advantages[i] = advantage;
    returns[i] = advantage + value;
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const ScanKernels scan;
const ScanKernels scan = {{scan_of<float, false>, scan_of<float, true>},
                          {scan_of<double, false>, scan_of<double, true>},
                          differences<float>,
                          differences<double>,
                          finish<float>,
                          finish<double>};
}  // namespace FUSERL_ISA
}  // namespace fuserl
