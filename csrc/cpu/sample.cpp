// Draws a token per row; equations: kernels/sample. Compiled without fused products, as its kernels are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "sample_kernels.h"

namespace fuserl {

FUSERL_KERNELS(SampleKernels, sample)

namespace {

constexpr const char* function = "sample";
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float log2e = 0x1.715476p0f;
constexpr std::int64_t block = 1024;  // tokens whose weights are summed apart, to find the drawn one again
constexpr std::int64_t few = 32;      // tokens that are sorted rather than bisected further

std::int64_t filled_up(std::int64_t n) { return (n + sample_step - 1) / sample_step * sample_step; }

// 64 random bits: the first two words of Philox4x32-10 (Salmon et al., 2011).
std::uint64_t random_bits(std::uint64_t key, std::uint64_t rollout, std::uint64_t position) {
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  std::uint32_t c[] = {low(rollout), high(rollout), low(position), high(position)}, k[] = {low(key), high(key)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const std::uint32_t next[] = {high(b) ^ c[1] ^ k[0], low(b), high(a) ^ c[3] ^ k[1], low(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return static_cast<std::uint64_t>(c[1]) << 32 | c[0];
}

// floor(a b / 2^64)
std::uint64_t high_product(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t mask = 0xffffffffu, a0 = a & mask, a1 = a >> 32, b0 = b & mask, b1 = b >> 32;
  const std::uint64_t middle = (a0 * b0 >> 32) + (a0 * b1 & mask) + (a1 * b0 & mask);
  return a1 * b1 + (a0 * b1 >> 32) + (a1 * b0 >> 32) + (middle >> 32);
}

// Floats as integers in the same order, -0 with 0; and back.
std::int64_t key_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -static_cast<std::int64_t>(bits & 0x7fffffff) : bits;
}
float float_of(std::int64_t key) {
  const std::uint32_t bits = key < 0 ? 0x80000000u | static_cast<std::uint32_t>(-key) : static_cast<std::uint32_t>(key);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Tokens {
  float* x;
  float* weights;  // null where tokens are only counted
  std::int64_t n;  // whole steps
};

// Tokens with low <= x < high, moved to the memory of `kept`.
Tokens gathered(const SampleKernels& kernels, const Tokens& from, float low, float high, const Tokens& kept) {
  Tokens to = {kept.x, from.weights ? kept.weights : nullptr, 0};
  const std::int64_t count = kernels.gather(from.x, from.weights, from.n, low, high, to.x, to.weights);
  to.n = filled_up(count);
  std::fill(to.x + count, to.x + to.n, -infinity);
  if (to.weights) std::fill(to.weights + count, to.weights + to.n, 0.0f);
  return to;
}

// The largest logit for which the tokens at or above it measure `goal` or more, as those at or above `low` must.
// `spare` is memory for as many tokens; it may be theirs.
float reaching(const SampleKernels& kernels, Tokens tokens, double goal, float low, float peak, const Tokens& spare) {
  const auto above = [&](float threshold) { return kernels.above(tokens.x, tokens.weights, tokens.n, threshold); };
  float high = std::nextafter(peak, infinity);
  SampleMeasure at_low = above(low), at_high = {0, 0};
  for (int pass = 0; at_low.count - at_high.count > few; ++pass) {
    if (4 * (at_low.count - at_high.count) < tokens.n) {
      tokens = gathered(kernels, tokens, low, high, spare);
      goal -= at_high.mass;
      at_low.count -= at_high.count;
      at_high = {0, 0};
    }
    // Halving the distance soon leaves few logits; halving the number of floats ends where they are all the same.
    float middle = low / 2 + high / 2;
    if (pass >= 12 || !(middle > low && middle < high)) {
      const std::int64_t a = key_of(low), b = key_of(high);
      if (b - a <= 1) return low;
      middle = float_of(a + (b - a) / 2);
    }
    const SampleMeasure found = above(middle);
    (found.mass >= goal ? low : high) = middle;
    (found.mass >= goal ? at_low : at_high) = found;
  }
  tokens = gathered(kernels, tokens, low, high, spare);
  std::pair<float, float> sorted[few];
  const std::int64_t count = at_low.count - at_high.count;
  for (std::int64_t i = 0; i < count; ++i) sorted[i] = {tokens.x[i], tokens.weights ? tokens.weights[i] : 1.0f};
  std::sort(sorted, sorted + count, [](const auto& a, const auto& b) { return a.first > b.first; });
  double mass = at_high.mass;
  for (std::int64_t i = 0; i < count; ++i)
    if ((mass += static_cast<double>(sorted[i].second)) >= goal) return sorted[i].first;
  return low;
}

// What one thread needs at a time.
struct Scratch {
  std::unique_ptr<float[]> memory;  // left as it is: filling it would cost as much as reading a row
  Tokens row, kept;
  std::vector<double> masses;  // of the blocks

  Scratch(std::int64_t size, bool weights, bool keeps)
      : memory(new float[static_cast<std::size_t>(size * (1 + weights + 2 * keeps))]),
        row{memory.get(), memory.get() + (weights ? size : 0), size},
        kept{row.weights + (keeps ? size : 0), row.weights + (keeps ? 2 * size : 0), size},
        masses(static_cast<std::size_t>(size / block + 1)) {}
};

struct Problem {
  const cpu::SampleTensors& tensors;
  const cpu::SampleRule& rule;
  const SampleKernels& kernels;
  int kernel;  // of the dtype
  std::int64_t element, rows, vocab, grain;
  int bits;
  bool top_k, top_p, cut;
  std::vector<Scratch> scratch;

  float temperature(std::int64_t n) const {
    return tensors.temperature ? tensors.temperature->as<float>()[n] : static_cast<float>(rule.temperature);
  }
};

// The smallest logit that may be drawn, of tokens whose total weight is `full`.
float threshold(const Problem& problem, Scratch& scratch, const SampleScale& scale, float t, double full) {
  const SampleKernels& kernels = problem.kernels;
  Tokens tokens = scratch.row;
  const Tokens counted = {tokens.x, nullptr, tokens.n};
  // Tokens below it weigh nothing, whether they are cut or not.
  float low = scale.peak - static_cast<float>(scale.bits + 2) / scale.scale;
  low = std::max(low, std::numeric_limits<float>::lowest());
  float least = scale.peak + static_cast<float>(problem.rule.log_min_p) * t;
  const auto k = static_cast<double>(problem.rule.top_k);
  if (problem.top_k && kernels.above(counted.x, nullptr, counted.n, low).mass >= k) {
    low = reaching(kernels, counted, k, low, scale.peak, scratch.kept);
    least = std::max(least, low);
    if (problem.top_p) {
      tokens = gathered(kernels, tokens, low, infinity, scratch.kept);
      full = kernels.above(tokens.x, tokens.weights, tokens.n, low).mass;
    }
  }
  if (!problem.top_p) return least;
  return std::max(least, reaching(kernels, tokens, problem.rule.top_p * full, low, scale.peak, scratch.kept));
}

void put(const Problem& problem, std::int64_t n, std::int64_t id, double logprob, double full_logprob, float least) {
  problem.tensors.ids.as<std::int64_t>()[n] = id;
  problem.tensors.logprobs.as<float>()[n] = static_cast<float>(logprob);
  problem.tensors.logprobs.as<float>()[problem.rows + n] = static_cast<float>(full_logprob);
  problem.tensors.logprobs.as<float>()[2 * problem.rows + n] = least;
}

void draw(const Problem& problem, Scratch& scratch, std::int64_t n) {
  const SampleKernels& kernels = problem.kernels;
  const TensorView& logits = problem.tensors.logits;
  const char* row = logits.as<char>() + n * logits.stride[0] * problem.element;
  const float given = problem.temperature(n), peak = kernels.read[problem.kernel](row, problem.vocab, scratch.row.x);
  if (!std::isfinite(peak)) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    return put(problem, n, -1, nan, nan, nan);
  }
  const bool greedy = given == 0, cut = greedy || problem.cut;
  const float t = greedy ? 1.0f : given;
  const SampleScale scale = {peak, log2e / t, problem.bits};
  const std::int64_t padded = scratch.row.n;
  const float* x = scratch.row.x;
  double* masses = scratch.masses.data();
  float buffer[block];
  const auto size = [&](std::int64_t first) { return std::min(block, padded - first); };
  // Cuts look at the weights again and again; otherwise only those of one block are wanted a second time.
  const auto weights = [&](std::int64_t first) { return cut ? scratch.row.weights + first : buffer; };
  const auto sum = [&](float least) {
    double mass = 0;
    for (std::int64_t first = 0; first < padded; first += block) {
      if (!cut || least == -infinity) kernels.weigh(x + first, size(first), scale, weights(first));
      mass += masses[first / block] = kernels.above(x + first, weights(first), size(first), least).mass;
    }
    return mass;
  };
  const double full = sum(-infinity);
  float least = -infinity;
  if (cut) least = greedy ? peak : threshold(problem, scratch, scale, t, full);
  const double kept = cut ? sum(least) : full;
  const auto at = [](const TensorView& view, std::int64_t i) {
    return static_cast<std::uint64_t>(view.as<std::int64_t>()[i]);
  };
  const std::uint64_t random = random_bits(static_cast<std::uint64_t>(problem.rule.seed),
                                           at(problem.tensors.rollout_ids, n), at(problem.tensors.positions, n));
  const auto target = greedy ? 0.0 : static_cast<double>(high_product(random, static_cast<std::uint64_t>(kept)));
  std::int64_t first = 0;
  double mass = 0;
  for (; mass + masses[first / block] <= target; first += block) mass += masses[first / block];
  if (!cut) kernels.weigh(x + first, size(first), scale, buffer);
  std::int64_t id = first;
  for (const float* w = weights(first);; ++id) {
    if (x[id] >= least) mass += static_cast<double>(w[id - first]);
    if (mass > target) break;
  }
  const double z = (static_cast<double>(x[id]) - static_cast<double>(peak)) / static_cast<double>(t);
  const auto logprob = [&](double of) { return z - std::log(std::ldexp(of, -problem.bits)); };
  put(problem, n, id, logprob(greedy ? full : kept), logprob(full), least);
}

void draw_rows(void* context, std::int64_t begin, std::int64_t end) {
  Problem& problem = *static_cast<Problem*>(context);
  Scratch& scratch = problem.scratch[static_cast<std::size_t>(begin / problem.grain)];
  for (std::int64_t n = begin; n < end; ++n) draw(problem, scratch, n);
}

void check(const cpu::SampleTensors& x, const cpu::SampleRule& rule) {
  const DType dtype = x.logits.dtype;
  check_device(function, "logits", x.logits, Device::cpu);
  if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
    refuse(function, "logits must be float32, bfloat16 or float16", name(dtype), "Convert them with .float().");
  if (x.logits.ndim != 2 || x.logits.shape[1] == 0)
    refuse(function, "logits must have shape (N, V) with V > 0", shape_text(x.logits), "View them as two dimensions.");
  if (x.logits.stride[1] != 1 && x.logits.shape[1] > 1)
    refuse(function, "logits must have stride 1 in their last dimension",
           "stride " + std::to_string(x.logits.stride[1]), "Call .contiguous() first.");
  const std::int64_t rows = x.logits.shape[0];
  check_dense(function, "rollout_ids", x.rollout_ids, DType::i64, Device::cpu, {rows});
  check_dense(function, "positions", x.positions, DType::i64, Device::cpu, {rows});
  check_dense(function, "ids", x.ids, DType::i64, Device::cpu, {rows});
  check_dense(function, "logprobs", x.logprobs, DType::f32, Device::cpu, {3, rows});
  if (x.temperature) check_dense(function, "temperature", *x.temperature, DType::f32, Device::cpu, {rows});
  for (std::int64_t n = 0; n < (x.temperature ? rows : 1); ++n) {
    const float t = x.temperature ? x.temperature->as<float>()[n] : static_cast<float>(rule.temperature);
    if (t != 0 && !(t >= 1e-30f && t <= 1e30f))
      refuse(function, "temperature must be 0 or between 1e-30 and 1e30",
             std::to_string(t) + (x.temperature ? " in row " + std::to_string(n) : ""), "0 takes the largest logit.");
  }
  if (rule.top_k < 0 || !(rule.top_p > 0) || !(rule.log_min_p <= 0))
    refuse(function, "top_k must be at least 0, top_p above 0 and log_min_p at most 0",
           std::to_string(rule.top_k) + ", " + std::to_string(rule.top_p) + " and " + std::to_string(rule.log_min_p),
           "0, 1 and -infinity cut nothing.");
}

}  // namespace

namespace cpu {

void sample(const SampleTensors& tensors, const SampleRule& rule, int threads) {
  check(tensors, rule);
  const std::int64_t rows = tensors.logits.shape[0], vocab = tensors.logits.shape[1];
  const DType dtype = tensors.logits.dtype;
  const bool top_k = rule.top_k > 0 && rule.top_k < vocab, top_p = rule.top_p < 1;
  const bool cut = top_k || top_p || std::isfinite(rule.log_min_p);
  const std::int64_t chunks = threads > 1 ? 2 * threads : 1;
  const std::int64_t grain = std::max<std::int64_t>(1, (rows + chunks - 1) / chunks);
  int bits = 52;  // the mass of all tokens stays below 2^53
  for (std::int64_t v = vocab; v > 0; v /= 2) --bits;
  Problem problem = {tensors, rule,  kernels(), dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 1 : 2,
                     dtype == DType::f32 ? 4 : 2, rows, vocab, grain, bits, top_k, top_p, cut, {}};
  const bool weights = cut || tensors.temperature || rule.temperature == 0;
  for (std::int64_t n = 0; n < rows; n += grain)
    problem.scratch.emplace_back(filled_up(vocab), weights, top_k || top_p);
  parallel_for(rows, grain, threads, draw_rows, &problem);
}

}  // namespace cpu
}  // namespace fuserl
