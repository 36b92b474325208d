// Row kernels of gaussian_logprob, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
//
// Rows are taken a tile at a time: whole short rows, or a piece of a long one; either way its elements lie one after
// the other, so vectors are full however few dimensions there are. What is known of rows or of dimensions alone is
// spread over the tile first.
#include "gaussian_logprob_kernels.h"

#include "elements.h"
#include "exponentials.h"
#include "logarithms.h"

namespace fuserl {
namespace {

constexpr std::int64_t tile = 512;  // elements
constexpr std::int64_t ahead = 4096;  // bytes to prefetch
constexpr int fold = 16;            // vectors that are added as they are, before their sum is a double
constexpr double half_log_2pi = 0.91893853320467274178;

struct Place {
  std::int64_t row, column, rows, columns;

  std::int64_t size() const { return rows * columns; }
};

// The first n of a vector, or all; 0 in the others.
template <class T>
FUSERL_INLINE typename Step<T>::Vector load_first(const T* p, std::int64_t n) {
  constexpr int size = Step<T>::size;
  if (n >= size) return load(p);
  T copy[size] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}

// Those of an array that is read through.
template <class T>
FUSERL_INLINE typename Step<T>::Vector stream(const T* p, std::int64_t n) {
  prefetch(p, ahead);
  return load_first(p, n);
}

template <class T>
FUSERL_INLINE void store_first(T* p, typename Step<T>::Vector x, std::int64_t n) {
  constexpr int size = Step<T>::size;
  if (n >= size) return store(p, x);
  T copy[size];
  store(copy, x);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}

FUSERL_INLINE Ints first_kept(const unsigned char* p, std::int64_t n, Ints) {
  if (n >= width) return load_mask(p, Ints{});
  unsigned char copy[width] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load_mask(copy, Ints{});
}
FUSERL_INLINE bool first_kept(const unsigned char* p, std::int64_t, bool) { return *p != 0; }

FUSERL_INLINE double lanes(double x) { return x; }
FUSERL_INLINE double lanes(Floats x) {
  float parts[width];
  store(parts, x);
  for (int half = width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return static_cast<double>(parts[0]);
}

template <class T>
FUSERL_INLINE double sum_of(const T* x, std::int64_t n) {
  typedef typename Step<T>::Vector V;
  constexpr int size = Step<T>::size;
  double total = 0;
  std::int64_t i = 0;
  for (; i + size <= n;) {
    V part = {};
    for (int k = 0; k < fold && i + size <= n; ++k, i += size) part += load(x + i);
    total += lanes(part);
  }
  for (; i < n; ++i) total += static_cast<double>(x[i]);
  return total;
}

// One number per row, for each element of the row.
template <class T>
FUSERL_INLINE void spread(const T* rows, const Place& at, T* out) {
  if (at.columns == 1) {
    for (std::int64_t r = 0; r < at.rows; ++r) out[r] = rows[r];
    return;
  }
  for (std::int64_t r = 0; r < at.rows; ++r)
    for (std::int64_t c = 0; c < at.columns; ++c) *out++ = rows[r];
}

template <class T>
FUSERL_INLINE void repeat(const T* columns, const Place& at, T* out) {
  for (std::int64_t r = 0; r < at.rows; ++r)
    for (std::int64_t c = 0; c < at.columns; ++c) *out++ = columns[c];
}

// The scales of a tile: as given, one over the standard deviation, and where it is wanted its logarithm. What is for
// all rows is evaluated once.
template <class T, bool with_log>
struct Scales {
  alignas(64) T given[tile], inverse[tile], log[with_log ? tile : 1];

  void read(const GaussianScale<T>& scale, std::int64_t dimensions, bool logs, const Place& at, bool first) {
    if (!scale.per_row && !first && at.columns == dimensions) return;
    const T* data = scale.data + (scale.per_row ? at.row * (scale.per_dimension ? dimensions : 1) : 0);
    if (scale.per_dimension && (scale.per_row || at.rows == 1)) {
      evaluate(data + at.column, at.size(), logs);
    } else if (scale.per_dimension) {
      evaluate(data, at.columns, logs);
      share([&](T* x) { repeat(x, Place{0, 0, at.rows - 1, at.columns}, x + at.columns); });
    } else {
      evaluate(data, scale.per_row ? at.rows : 1, logs);
      share([&](T* x) {
        T rows[tile];
        for (std::int64_t r = 0; r < at.rows; ++r) rows[r] = x[scale.per_row ? r : 0];
        spread(rows, at, x);
      });
    }
  }

 private:
  template <class F>
  FUSERL_INLINE void share(F each) {
    each(given);
    each(inverse);
    if constexpr (with_log) each(log);
  }

  FUSERL_INLINE void evaluate(const T* data, std::int64_t n, bool logs) {
    typedef typename Step<T>::Vector V;
    for (std::int64_t i = 0; i < n; i += Step<T>::size) {
      const V x = stream(data + i, n - i);
      store(given + i, x);
      store(inverse + i, logs ? whole_exp(-x) : T(1) / x);
      if constexpr (with_log) store(log + i, logs ? x : whole_log(x));
    }
  }
};

// The mask's bytes of a tile, or null.
struct Kept {
  unsigned char copy[tile];

  template <class T>
  const unsigned char* read(const GaussianRows<T>& x, const Place& at, bool first) {
    if (!x.mask) return nullptr;
    if (x.mask_per_row) return x.mask + at.row * x.dimensions + at.column;
    if (at.rows == 1) return x.mask + at.column;
    if (first) repeat(x.mask, at, copy);
    return copy;
  }
};

// 2 log(std / ref_std) of a tile, to its own last digits where the two are close; whether all are within 1 of 0.
template <class T, class Policy, class Reference>
FUSERL_INLINE bool log_ratios(const Policy& scale, const Reference& ref, std::int64_t n, bool logs, T* out) {
  typedef typename Step<T>::Vector V;
  V least = {}, most = {};
  for (std::int64_t i = 0; i < n; i += Step<T>::size) {
    const V apart = load(scale.given + i) - load(ref.given + i), inverse = load(ref.inverse + i);
    const V x = T(2) * (logs ? apart : log_of(load(scale.given + i) * inverse, apart * inverse));
    store(out + i, x);
    least = x < least ? x : least;
    most = x > most ? x : most;
  }
  T ends[2][Step<T>::size];
  store(ends[0], least);
  store(ends[1], most);
  bool close = true;
  for (int i = 0; i < Step<T>::size; ++i) close &= ends[0][i] > T(-1) && ends[1][i] < T(1);
  return close;
}

template <class T, class Body>
FUSERL_INLINE void tiles(std::int64_t dimensions, std::int64_t begin, std::int64_t end, Body body) {
  const std::int64_t columns = dimensions < tile ? dimensions : tile, rows = tile / columns;
  for (std::int64_t row = begin; row < end; row += rows)
    for (std::int64_t column = 0; column < dimensions; column += columns)
      body(Place{row, column, end - row < rows ? end - row : rows,
                 dimensions - column < columns ? dimensions - column : columns});
}

template <class T>
FUSERL_INLINE void add_rows(const T* terms, const Place& at, double* sums) {
  if (at.columns == 1) {
    for (std::int64_t r = 0; r < at.rows; ++r) sums[r] += static_cast<double>(terms[r]);
    return;
  }
  for (std::int64_t r = 0; r < at.rows; ++r) sums[r] += sum_of(terms + r * at.columns, at.columns);
}

template <class T>
FUSERL_INLINE void write_rows(const Place& at, std::int64_t dimensions, double* sums, T* out) {
  if (!out || at.column + at.columns < dimensions) return;
  for (std::int64_t r = 0; r < at.rows; ++r) {
    out[at.row + r] = static_cast<T>(sums[r]);
    sums[r] = 0;
  }
}

template <class T>
void forward(const GaussianRows<T>& x, std::int64_t begin, std::int64_t end, const GaussianOutputs<T>& out) {
  typedef typename Step<T>::Vector V;
  typedef typename Step<T>::Mask Mask;
  constexpr T constant = static_cast<T>(half_log_2pi);
  alignas(64) T logprobs[tile], entropies[tile], divergences[tile];
  double sums[3][tile] = {};
  alignas(64) T ratios[tile];
  Scales<T, true> scale;
  Scales<T, false> ref;
  Kept kept;
  bool first = true;
  tiles<T>(x.dimensions, begin, end, [&](const Place& at) {
    const std::int64_t offset = at.row * x.dimensions + at.column, n = at.size();
    scale.read(x.scale, x.dimensions, x.logs, at, first);
    if (out.kl) ref.read(x.ref_scale, x.dimensions, x.logs, at, first);
    const bool close = out.kl && log_ratios(scale, ref, n, x.logs, ratios);
    const unsigned char* mask = kept.read(x, at, first);
    first = false;
    for (std::int64_t i = 0; i < n; i += Step<T>::size) {
      const V zero = {};
      const Mask keep = mask ? first_kept(mask + i, n - i, Mask{}) : zero == zero;
      const V mean = stream(x.mean + offset + i, n - i), log = load(scale.log + i);
      const V z = (stream(x.actions + offset + i, n - i) - mean) * load(scale.inverse + i);
      store(logprobs + i, keep ? T(-0.5) * z * z - (log + constant) : zero);
      if (out.entropy) store(entropies + i, keep ? log + (constant + T(0.5)) : zero);
      if (!out.kl) continue;
      const V apart = (mean - stream(x.ref_mean + offset + i, n - i)) * load(ref.inverse + i);
      const V ratio = load(ratios + i), rest = (close ? near_zero<T>(ratio) : exponentials<T>(ratio)).rest;
      store(divergences + i, keep ? T(0.5) * (rest + apart * apart) : zero);
    }
    add_rows(logprobs, at, sums[0]);
    write_rows(at, x.dimensions, sums[0], out.logprob);
    if (out.entropy) add_rows(entropies, at, sums[1]);
    write_rows(at, x.dimensions, sums[1], out.entropy);
    if (out.kl) add_rows(divergences, at, sums[2]);
    write_rows(at, x.dimensions, sums[2], out.kl);
  });
}

// Where the gradient of a scale goes, for a tile: to its place, or through a buffer to what it is the sum of.
template <class T>
struct ScaleGradient {
  alignas(64) T buffer[tile];
  double rows[tile] = {};

  T* begin(const GaussianScale<T>& scale, T* out, std::int64_t offset) {
    return scale.per_row && scale.per_dimension ? out + offset : buffer;
  }

  void end(const GaussianScale<T>& scale, const Place& at, std::int64_t dimensions, T* out, double* sums) {
    if (scale.per_row && scale.per_dimension) return;
    if (scale.per_row) {
      add_rows(buffer, at, rows);
      return write_rows(at, dimensions, rows, out);
    }
    if (!scale.per_dimension) {
      sums[0] += sum_of(buffer, at.size());
      return;
    }
    const T* term = buffer;
    for (std::int64_t r = 0; r < at.rows; ++r, term += at.columns)
      for (std::int64_t c = 0; c < at.columns; ++c) sums[at.column + c] += static_cast<double>(term[c]);
  }
};

// What comes from above for each element of a tile.
template <class T>
struct Above {
  alignas(64) T logprob[tile], entropy[tile], kl[tile];

  void read(const GaussianOutputs<const T>& g, const Place& at) {
    if (g.logprob) spread(g.logprob + at.row, at, logprob);
    if (g.entropy) spread(g.entropy + at.row, at, entropy);
    if (g.kl) spread(g.kl + at.row, at, kl);
  }
};

template <class T>
void backward(const GaussianRows<T>& x, std::int64_t begin, std::int64_t end, const GaussianOutputs<const T>& g,
              const GaussianGradients<T>& out) {
  typedef typename Step<T>::Vector V;
  typedef typename Step<T>::Mask Mask;
  alignas(64) T ratios[tile];
  Scales<T, false> scale, ref;
  ScaleGradient<T> to_scale, to_ref;
  Above<T> above;
  Kept kept;
  bool first = true;
  const auto of_given = [&](V to_log, V inverse) {
    if (x.logs) return to_log;
    return to_log == V{} ? to_log : to_log * inverse;
  };
  const bool scaled = out.scale || out.sums, ref_scaled = out.ref_scale || out.ref_sums;
  tiles<T>(x.dimensions, begin, end, [&](const Place& at) {
    const std::int64_t offset = at.row * x.dimensions + at.column, n = at.size();
    scale.read(x.scale, x.dimensions, x.logs, at, first);
    if (g.kl) ref.read(x.ref_scale, x.dimensions, x.logs, at, first);
    const bool close = g.kl && log_ratios(scale, ref, n, x.logs, ratios);
    const unsigned char* mask = kept.read(x, at, first);
    above.read(g, at);
    first = false;
    T *d_scale = to_scale.begin(x.scale, out.scale, offset), *d_ref = to_ref.begin(x.ref_scale, out.ref_scale, offset);
    for (std::int64_t i = 0; i < n; i += Step<T>::size) {
      const V zero = {};
      const Mask keep = mask ? first_kept(mask + i, n - i, Mask{}) : zero == zero;
      const V mean = stream(x.mean + offset + i, n - i), inverse = load(scale.inverse + i);
      V to_action = {}, to_mean = {}, to_log = {};
      if (g.logprob) {
        const V from = load(above.logprob + i);
        const V z = (stream(x.actions + offset + i, n - i) - mean) * inverse;
        const Mask alive = keep & (from != zero);
        to_mean = alive ? from * z * inverse : zero;
        to_action = -to_mean;
        to_log = alive ? from * (z * z - T(1)) : zero;
      }
      if (g.entropy) to_log += keep ? load(above.entropy + i) : zero;
      if (g.kl) {
        const V from = load(above.kl + i), ref_inverse = load(ref.inverse + i);
        const V apart = (mean - stream(x.ref_mean + offset + i, n - i)) * ref_inverse;
        const V ratio = load(ratios + i);
        const V less_one = (close ? near_zero<T>(ratio) : exponentials<T>(ratio)).less_one;
        const Mask alive = keep & (from != zero);
        const V to_apart = alive ? from * apart * ref_inverse : zero;
        to_mean += to_apart;
        to_log += alive ? from * less_one : zero;
        const V to_ref_log = alive ? -from * (less_one + apart * apart) : zero;
        if (out.ref_mean) store_first(out.ref_mean + offset + i, -to_apart, n - i);
        if (ref_scaled) store_first(d_ref + i, of_given(to_ref_log, ref_inverse), n - i);
      }
      if (out.actions) store_first(out.actions + offset + i, to_action, n - i);
      if (out.mean) store_first(out.mean + offset + i, to_mean, n - i);
      if (scaled) store_first(d_scale + i, of_given(to_log, inverse), n - i);
    }
    if (scaled) to_scale.end(x.scale, at, x.dimensions, out.scale, out.sums);
    if (ref_scaled) to_ref.end(x.ref_scale, at, x.dimensions, out.ref_scale, out.ref_sums);
  });
}

}  // namespace

namespace FUSERL_ISA {
extern const GaussianTable gaussian_logprob;
const GaussianTable gaussian_logprob = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
