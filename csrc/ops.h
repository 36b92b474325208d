// THE list of native operations: one declaration per op and device, shapes in the comment.
// All tensors belong to the caller. A broken contract throws std::invalid_argument before anything is written.
#pragma once
#include <array>

#include "tensor_view.h"

namespace fuserl {

// What a group's advantages are; kernels/group_advantage has the equations. `given` is per reward where a tensor is
// handed over, else the one number; eps is added to a standard deviation, and to nothing that is given.
enum class Baseline : int { given, mean, leave_one_out, batch_mean };
enum class Scale : int { given, group_std, batch_std, sign };
enum class Keep : int { all, positive, negative };
struct AdvantageRule {
  Baseline baseline;
  Scale scale;
  Keep keep;
  double given_baseline, given_scale;
  int ddof;
  double eps;
};
struct AdvantageTensors {
  const TensorView& rewards;
  const TensorView *group, *rounds, *weights, *baselines, *scales, *channel_weights;
  const TensorView& out;
  std::int64_t members;  // of each group, where `group` is null
};

// What the best reward of k rollouts of a group is held against, and its scale; kernels/pass_at_k_advantage.
enum class BestOfBaseline : int { none, mean, leave_one_out, rest };
enum class BestOfScale : int { none, group, best };
struct BestOfRule {
  std::int64_t k;
  BestOfBaseline baseline;
  BestOfScale scale;
  double eps;
};

enum class KlEstimator : int { none, k1, k2, k3 };
// What a token gains by its ratio and advantage; kernels/surrogates.py has the equations. Four numbers are those below
// and above for a positive advantage, then for a negative one; infinity is no bound.
enum class Surrogate : int { clip, weight, gate };
struct PolicyRule {
  Surrogate surrogate;
  std::array<double, 4> factors, log_ratios;  // in the ratio's place beyond a bound, tau of a gate; log of each bound
  // Of importance weights: bounds of the logarithm, and what a weight is below and above them.
  double log_least, log_most, below, above;
  double beta;  // of the estimator of KL(policy || reference), with the gradient of k2 where `score`
  KlEstimator kl;
  bool score, kl_weighted;  // weighted: times the ratio
  double entropy_coef;
};
// Places in policy_loss's statistics: sums over tokens, then the extremes.
struct PolicyStatistic {
  enum : int {
    tokens, clipped_low, clipped_high, clipped_dual, approx_kl, kl, importance, importance_cut, ratio, ratio_sq, sums,
    ratio_max = sums, ratio_min, all
  };
};

// kernels/divergence.py has the summand of each; p is the policy (student), q the reference (teacher).
enum class DivergenceKind : int { forward_kl, reverse_kl, jensen_shannon, alpha, total_variation };
struct DivergenceRule {
  DivergenceKind kind;
  double parameter;  // beta of jensen_shannon, alpha of alpha
  double scale;      // of the divergence and its gradients
};
// How an estimate of one follows from log-probs of samples, and which: `estimator` of KL(policy || reference) for samples
// of the policy, with the gradient of k2 where `score`; else the generator of `kind` for samples of the reference.
enum class Sampled : int { from_policy, from_reference };
struct SampledRule {
  Sampled sampled;
  KlEstimator estimator;
  bool score;
  DivergenceKind kind;
  double parameter, scale;
  double clamp;  // the log-ratio is held to [-clamp, clamp]; infinity for none
};
// Places in divergence's statistics.
struct DivergenceStatistic {
  enum : int { divergence, entropy, lse_p, lse_error_p, lse_q, lse_error_q, slope_p, slope_q, all };
};
// How the margin of a pair of rollouts becomes a loss; kernels/preferences has the published forms.
enum class PreferenceLink : int { logistic, hinge, square, sigmoid, odds };
struct PreferenceRule {
  PreferenceLink link;
  bool mean;  // scores are means over a rollout's tokens, not sums
  double scale, shift, positive, negative, nll, centre;
};
// Places in preference_loss's statistics, sums over pairs; of rollouts without a pair, over those.
struct PreferenceStatistic {
  enum : int { items, margin, right, chosen, rejected, chosen_reward, rejected_reward, nll, all };
};

namespace cpu {

// Row statistics of softmax(z), z = logits / temperature. Row n = (n / R, n % R), N = A R.
//   logits           (A, R, V) f32 | bf16 | f16 | f64, stride 1 in V, any other strides
//   ids              (N,) i64 in [0, V)
//   row_temperature  (N,) f32 (f64 when logits are f64), or null for the one `temperature`; > 0 and finite
//   statistics       (K, N) f32 (f64 when logits are f64):
//     logprob = z[id] - lse; entropy; lse; [lse_error when K is 4 or 8]; then, when K is 7 or 8,
//     mean_logit = mean_v z; sum_sq_prob = sum_v p^2; is_top1 = 1 if z[id] is the maximum; mean_logprob = mean_v logp
//   lse_error is what rounding lse lost: the gradient needs it where |lse| is large.
// A row never depends on its neighbours or on `threads`.
void softmax_rows_forward(const TensorView& logits, const TensorView& ids, const TensorView* row_temperature,
                          double temperature, const TensorView& statistics, int threads);

// out[n,v] = (a + p (b + c logp + d p) + e [v == id]) / temperature,  p = exp(logp), logp = z - lse.
//   logits, ids, row_temperature as above
//   lse           (N,), or (2, N) with lse_error as the second row
//   coefficients  (5, N) rows a, b, c, d, e in the dtype of lse
//   out           (A, R, V) in the dtype of logits, stride 1 in V; may be the memory of logits
// p == 0 contributes 0 even where logp = -inf. A row whose five coefficients are 0 is filled with 0, logits unread.
// through_tanh: logits are tanh(u), or -inf, and out is the gradient to u, 1 - logits^2 times the above, 0 at -inf.
void softmax_rows_gradient(const TensorView& logits, const TensorView& ids, const TensorView& lse,
                           const TensorView& coefficients, const TensorView* row_temperature, double temperature,
                           const TensorView& out, int threads, bool through_tanh);

// out = kept((rewards - baseline) / scale), statistics over the rollouts of one group (batch_*: of all), in double.
//   rewards          (B,) or (B, C) f32 | f64
//   group, rounds    (B,) i64, any order, or null: ids in [0, B), else members following each other; any numbers. Two
//                    rollouts are together where both agree
//   weights          as rewards, >= 0, or null for 1: of each reward in the mean and the standard deviation
//   baselines, scales  as rewards, or null for the rule's number
//   channel_weights  (C,), or null
//   out              as rewards; with channel_weights (B,), the channels' weighted sum
// A group without spread gives exact 0 where its mean or its standard deviation is asked for.
void group_advantage(const AdvantageTensors& tensors, const AdvantageRule& rule);

// A number of each rollout from its place among the members of its group: scores by rank, equations in
// kernels/group_ranks, `best` for ties that have the best of their places; and the advantage for the best of k.
//   rewards, out  (B,) f32 | f64; group (B,) i64 in [0, B), any order. A group with a NaN gets NaN.
void group_ranks(const TensorView& rewards, const TensorView& group, bool best, const TensorView& out);
void pass_at_k_advantage(const TensorView& rewards, const TensorView& group, const BestOfRule& rule,
                         const TensorView& out);

// losses = weights (beta kl - w gain - entropy_coef entropy), and the derivative of each loss to its log-prob; equations:
// kernels/policy_loss.
//   logprobs, advantages            (N,) f32 | f64; losses, derivative the same
//   old_logprobs, ref_logprobs, weights  (N,) of that dtype, or null: the policy itself, no KL term, 1
//   rollout_logprobs, log_weights   (N,) of that dtype: w by either, not both; null for w = 1
//   entropy                         (N,) of that dtype, or null
//   mask        (N,) bool, or null for all true; where false, the outputs are 0 and nothing else is looked at
//   derivative  null where it is not wanted
//   statistics  (PolicyStatistic::all,) of that dtype
// Sums are taken over blocks at fixed places, merged in order: nothing depends on `threads`.
struct PolicyTensors {
  const TensorView &logprobs, &advantages;
  const TensorView *old_logprobs, *ref_logprobs, *rollout_logprobs, *log_weights, *entropy, *weights, *mask;
  const TensorView& losses;
  const TensorView* derivative;
  const TensorView& statistics;
};
void policy_loss(const PolicyTensors& tensors, const PolicyRule& rule, int threads);

// A loss of each pair of R rollouts, and its derivatives to the sum of each one's tokens; equations: kernels/preference_loss.
//   logprobs      (N,) f32 | f64; without offsets (R, T), or (R,), the scores themselves
//   offsets       (R + 1,) i64, from 0 to N, or null
//   chosen, rejected  (P,) i64, rollouts of each pair, or both null: P = R / 2, pair p is (p, p + P)
//   desirable     (R,) bool, or null: P = R, each rollout stands against `baseline` (1,), or null for 0, on its own side
//   ref_logprobs  as logprobs, or null; mask as logprobs, bool, or null for all true; margins (P,) or null
//   losses (P,), rewards (R,), derivative (2, P) of the chosen and of the rejected, statistics (PreferenceStatistic::all,)
// Numbers have the dtype of logprobs; sums are taken in double. Nothing depends on `threads`.
struct PreferenceTensors {
  const TensorView& logprobs;
  const TensorView *offsets, *mask, *chosen, *rejected, *ref_logprobs, *margins, *desirable, *baseline;
  const TensorView &losses, &rewards, &derivative, &statistics;
};
void preference_loss(const PreferenceTensors& tensors, const PreferenceRule& rule, int threads);

// The gradient to logprobs, out of their shape, of g (P,) and what preference_loss wrote of the same arguments; `paired` without
// desirable. A rollout's is the sum, in double, over the pairs that it is in, at each token that the mask keeps, else 0.
struct PreferenceGradient {
  const TensorView &g, &derivative;
  const TensorView *offsets, *mask, *chosen, *rejected;
  bool paired;
  const TensorView& out;
};
void preference_gradient(const PreferenceGradient& tensors, int threads);

// Log-probability of actions under a normal distribution of independent dimensions, its entropy, and its divergence from
// a reference, of each row; equations: kernels/gaussian_logprob.
//   actions, mean, ref_mean  (N, D) f32 | f64, the same dtype; ref_mean null without a reference
//   scale, ref_scale  (N, D) or (N, 1), or for all rows (D,) or (1,), of that dtype; standard deviations, or their
//                     logarithms
//   mask              (N, D) or (D,) bool, or null for all true; what is false has no part and may hold anything
//   logprob, entropy, kl  (N,) of that dtype; entropy and kl null where they are not wanted
// A row never depends on its neighbours or on `threads`.
struct GaussianTensors {
  const TensorView &actions, &mean, &scale;
  const TensorView *ref_mean, *ref_scale, *mask;
  bool logs;
};
struct GaussianResults {
  const TensorView *logprob, *entropy, *kl;
};
void gaussian_logprob_forward(const GaussianTensors& tensors, const GaussianResults& out, int threads);

// Gradients of the sums of g's times the results; a null g is 0, a null gradient is not wanted, each as its input.
// A row whose g is 0 has gradients of 0, whatever it holds. Those of the reference need kl's g. Sums over rows are taken
// over groups at fixed places, merged in order: nothing depends on `threads`.
struct GaussianGradientViews {
  const TensorView *actions, *mean, *scale, *ref_mean, *ref_scale;
};
void gaussian_logprob_backward(const GaussianTensors& tensors, const GaussianResults& g,
                               const GaussianGradientViews& out, int threads);

// Draws a token per row; equations: kernels/sample. A row's result depends on its own logits and numbers only, and every
// backend draws the same.
//   logits       (N, V) f32 | bf16 | f16, stride 1 in V, any other between rows
//   temperature  (N,) f32, or null for the rule's; 0 takes the first of the largest logits
//   rollout_ids, positions  (N,) i64: with the seed, what fixes the random number of a row
//   ids          (N,) i64; -1 where the row has NaN, +inf, or -inf only
//   logprobs     (3, N) f32: under what the cuts left, renormalised; under the whole distribution; and the least logit
//                that is not cut, at temperature 0 the largest; below the least that weighs anything it may be any number
struct SampleTensors {
  const TensorView& logits;
  const TensorView* temperature;
  const TensorView &rollout_ids, &positions, &ids, &logprobs;
};
// top_k 0, top_p 1 and log_min_p -infinity cut nothing.
struct SampleRule {
  double temperature;
  std::int64_t top_k;
  double top_p, log_min_p;
  std::int64_t seed;
};
void sample(const SampleTensors& tensors, const SampleRule& rule, int threads);

// The divergence of p = softmax(logits_p / temperature) from q, row by row, and the entropy of p.
//   logits_p, logits_q  (A, R, V) as in softmax_rows_forward, of a dtype each; f64 only together
//   temperatures        (2, N) f32 (f64 when logits are f64): of p, of q
//   statistics          (DivergenceStatistic::all, N) of that dtype; slope_p = sum p dF/dp, slope_q = sum q dF/dq
// A row never depends on its neighbours or on `threads`.
void divergence_forward(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                        const DivergenceRule& rule, const TensorView& statistics, int threads);

// Gradients of g[0] . divergence + g[1] . entropy.
//   statistics  as divergence_forward wrote them; g (2, N) of their dtype
//   out_p       as logits_p, may be its memory, or null; where there is no out_q, the memory of logits_q as well
//   out_q       as logits_q, or null
// Rows whose g is 0 are filled with 0, logits unread. An infinite divergence has no part in the gradient.
void divergence_gradient(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                         const DivergenceRule& rule, const TensorView& statistics, const TensorView& g,
                         const TensorView* out_p, const TensorView* out_q, int threads);

// An estimate per sample, and its derivative to logprobs; equations: kernels/sampled_divergence.
//   logprobs, ref_logprobs, values, derivative  (N,) f32 | f64, the same; derivative null where it is not wanted
void sampled_divergence(const TensorView& logprobs, const TensorView& ref_logprobs, const SampledRule& rule,
                        const TensorView& values, const TensorView* derivative, int threads);

// Linear scans along the segments of each row. a[t] is the link of token t to the next one:
//   x[t] = b[t] + a[t] x[t + 1], 0 beyond a segment's last token; forward: x[t] = b[t] + a[t - 1] x[t - 1]
//   b, x     (C, N) f32 | f64, the same dtype; may be the same memory
//   a        (C, N), or null: `factor` for all
//   offsets  (B + 1,) i64, from 0 to N, in every row; or null: a row is a segment
// A segment never depends on what lies beside it or on `threads`.
void discounted_scan(const TensorView& b, const TensorView* a, double factor, const TensorView* offsets, bool forward,
                     const TensorView& x, int threads);

// delta = rewards + gamma V' - values,  advantages = delta + gamma lam A',  returns = advantages + values; V' and A' are
// of the segment's next token that the mask keeps; beyond the last one A' = 0 and V' = bootstrap, or 0.
//   rewards, values, advantages, returns  (C, N) f32 | f64, the same dtype
//   gamma, lam  (C, N) of that dtype, or null: the one number
//   bootstrap   (C, B) of that dtype, or null
//   mask        (C, N) bool, or null for all true; where false, the outputs are 0 and nothing else is looked at
//   offsets     as above
struct GaeTensors {
  const TensorView &rewards, &values;
  const TensorView *gamma, *lam, *bootstrap, *mask, *offsets;
  const TensorView &advantages, &returns;
};
void gae(const GaeTensors& tensors, double gamma, double lam, int threads);

// Sums of x (C, N) over segments into out (C, B), in double; and x (C, B) spread over the tokens of out (C, N).
// Both f32 | f64, x as out; offsets (B + 1,) i64 from 0 to N. An empty segment has the sum 0.
void segment_sum(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads);
void to_tokens(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads);

// Attention along a forest of segments; equations: kernels/tree_attention. L tokens, S segments in preorder, M tiles of
// tree_tile tokens, P = M tree_tile; 16 divides D.
//   last      (P,) i32, the token after the last one that sees a token, 0 for padding
//   position  (P,) i32, of a token in its own text
//   start     (S + 1,) i32, first tokens; parent (S,) i32, or -1; segment (M,) i32, of the first token of each tile
struct TreeTensors {
  const TensorView &last, &position, &start, &parent, &segment;
};
struct TreeRule {
  std::int64_t tokens, window;  // without padding; 2^31 - 1 for no window
  double scale, softcap;        // 0 for no cap
};
//   q (L, H, D), k, v (L, Hkv, D) f32 | f64 | bf16 | f16, D in one stretch;  out (L, H, D) f32, f64 from f64;
//   lse (L, 2, H) as out: as rounded, and what the rounding took
void tree_attention_forward(const TreeTensors& tree, const TensorView& q, const TensorView& k, const TensorView& v,
                            const TreeRule& rule, const TensorView& out, const TensorView& lse, int threads);

//   d_out, dq of q's dtype; out, lse, dk, dv as out above; d_lse (L, H), or null for 0; dk and dv must be 0 before
struct TreeGradients {
  const TensorView &q, &k, &v, &out, &lse, &d_out;
  const TensorView* d_lse;
  const TensorView &dq, &dk, &dv;
};
void tree_attention_backward(const TreeTensors& tree, const TreeGradients& tensors, const TreeRule& rule, int threads);

// Attention of one query per leaf of a forest; equations: kernels/tree_decode. I stretches of keys, P pairs of one and a
// query that sees it, each pair with a partial result.
//   item   (I, 5) i32: first row, keys, position of the first, and from and to in member
//   member (P,) i32, queries;  slot (P,) i32, pairs by query from its root down;  bounds (Q + 1,) i32 in slot
//   last   (Q,) i32, the position of each query in its text
//   page   (M,) i32: row r of an item is row r % 64 of the storage's 64 rows number page[r / 64]; none where M is 0
struct DecodePlan {
  const TensorView &item, &member, &slot, &bounds, &last, &page;
};
struct DecodeRule {
  std::int64_t window;    // 2^31 - 1 for none
  double scale, softcap;  // 0 for no cap
};
//   k, v (rows, Hkv, D) f32 | f64 | bf16 | f16, D in one stretch;  q, out (Q, H, D) and lse (Q, H) f32, f64 from f64
void tree_decode(const DecodePlan& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                 const DecodeRule& rule, const TensorView& out, const TensorView& lse, int threads);

// c = bias + alpha a b, or c + alpha a b with `add`; a row of c is the same bits whatever other rows there are.
//   a (N, K) f32 and b (K, M) f32 | bf16 | f16, rows or columns in one stretch;  bias (M,) f32, or null for 0
//   c (N, M) f32, rows in one stretch
void matmul(const TensorView& a, const TensorView& b, const TensorView* bias, double alpha, bool add,
            const TensorView& c, int threads);

}  // namespace cpu

namespace cuda {

// As cpu::group_advantage, one launch on `stream`; an id out of range writes NaN, for a check would have to wait.
void group_advantage(const AdvantageTensors& tensors, const AdvantageRule& rule, void* stream);

}  // namespace cuda
}  // namespace fuserl
