"""The Triton kernels of preference_loss: a program sums a rollout, then one takes BLOCK pairs; everything in double.

Pairs are few and tokens are read once, so double costs nothing, and a margin keeps the digits that its sums have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.divergence_terms import near_zero
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.preferences import STATISTICS, Rule

SUM_LAUNCH = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
PAIR_LAUNCH = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _sum_kernel(
    logprob_ptr, ref_ptr, mask_ptr, offsets_ptr, score_ptr, nll_ptr, length_ptr, reward_ptr, scale: tl.float64,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score, mean negative log-prob, tokens and reward of one rollout."""
    rollout = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + rollout)
    end = tl.load(offsets_ptr + rollout + 1)
    lane = tl.arange(0, BLOCK)
    score = tl.zeros([BLOCK], tl.float64)
    logprob = tl.zeros([BLOCK], tl.float64)
    length = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + lane
        keep = at < end
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + at, keep, other=0) != 0)
        x = tl.load(logprob_ptr + at, keep, other=0.0).to(tl.float64)
        logprob += x
        length += keep.to(tl.float64)
        if ref_ptr is not None:
            score += x - tl.load(ref_ptr + at, keep, other=0.0).to(tl.float64)
    tokens = tl.maximum(tl.sum(length), 1.0)
    total = tl.sum(logprob)
    found = total
    if ref_ptr is not None:
        found = tl.sum(score)
    if MEAN:
        found = found / tokens
    tl.store(score_ptr + rollout, found)
    tl.store(nll_ptr + rollout, -total / tokens)
    tl.store(length_ptr + rollout, tokens)
    tl.store(reward_ptr + rollout, (scale * found).to(reward_ptr.dtype.element_ty))


@triton.jit
def _log_one_plus(x):
    """log(1 + x) for -1 < x <= 1, good to its own last digits."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _softplus_and_sigmoid(x):
    """log(1 + e^x) and 1 / (1 + e^-x)."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0.0) + _log_one_plus(small), tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _one_less_exp(x):
    """1 - e^x and its logarithm for x <= 0."""
    exp = tl.exp(x)
    near, _ = near_zero(x, 17)
    rest = tl.where(x > -1.0, -near, 1.0 - exp)
    return rest, tl.where(x > -0.6931471805599453, tl.log(rest), _log_one_plus(-exp))


@triton.jit
def _link(margin, score_c, score_r, weight, positive, negative, scale, LINK: tl.constexpr):
    """The loss of each margin and its derivatives to both scores."""
    if LINK == 4:
        log_p = tl.where(score_c > 0, 0.0, score_c)
        log_q = tl.where(score_r > 0, 0.0, score_r)
        rest, log_rest = _one_less_exp(log_p)
        other, log_other = _one_less_exp(log_q)
        odds = log_p - log_q - (log_rest - log_other)
        falling, _ = _softplus_and_sigmoid(-odds)
        loss = positive * falling
        d_c = -positive / (tl.exp(log_p - log_q) * other + rest)
        d_r = positive / (other * (1.0 + tl.exp(odds)))
    else:
        falling, wrong = _softplus_and_sigmoid(-margin)
        rising, right = _softplus_and_sigmoid(margin)
        if LINK == 0:
            loss = positive * falling + tl.where(negative == 0, 0.0, negative * rising)
            d = negative * right - positive * wrong
        elif LINK == 1:
            loss = positive * tl.where(margin > 1, 0.0, 1.0 - margin)
            d = tl.where(margin >= 1, 0.0, -positive)
            d = tl.where(margin == margin, d, margin)
        elif LINK == 2:
            loss = positive * margin * margin
            d = 2.0 * positive * margin
        else:
            loss = weight * wrong
            d = -weight * right * wrong
        d_c = scale * d
        d_r = -scale * d
    return loss, d_c, d_r


@triton.jit(do_not_specialize=["P", "R"])
def _pair_kernel(
    score_ptr, nll_ptr, length_ptr, chosen_ptr, rejected_ptr, desirable_ptr, baseline_ptr, margin_ptr, loss_ptr,
    derivative_ptr, partial_ptr, P, R, scale: tl.float64, shift: tl.float64, positive: tl.float64, negative: tl.float64,
    nll_weight: tl.float64, centre: tl.float64, LINK: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, derivatives and partial statistics, (8, programs), of BLOCK pairs."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    c, r, has_c, has_r = at, at + P, inside, inside
    if desirable_ptr is not None:
        has_c = inside & (tl.load(desirable_ptr + at, inside, other=0) != 0)
        has_r = inside & ~has_c
        r = at
    elif chosen_ptr is not None:
        c = tl.load(chosen_ptr + at, inside, other=0)
        r = tl.load(rejected_ptr + at, inside, other=0)
    baseline = tl.full([], 0.0, tl.float64)
    if baseline_ptr is not None:
        baseline = tl.load(baseline_ptr).to(tl.float64)
    # An index that names no rollout shows as NaN.
    read_c, read_r = has_c & (c >= 0) & (c < R), has_r & (r >= 0) & (r < R)
    nan = float("nan")
    score_c = tl.where(has_c, tl.load(score_ptr + c, read_c, other=nan), baseline)
    score_r = tl.where(has_r, tl.load(score_ptr + r, read_r, other=nan), baseline)
    apart = scale * (score_c - score_r)
    margin = apart - shift
    if margin_ptr is not None:
        margin -= tl.load(margin_ptr + at, inside, other=0.0).to(tl.float64)
    weight = tl.where(has_c, positive, negative)
    loss, d_c, d_r = _link(margin, score_c, score_r, weight, positive, negative, scale, LINK)
    both = score_c + score_r
    loss += tl.where(centre == 0, 0.0, centre * both * both)
    d_c += tl.where(centre == 0, 0.0, 2.0 * centre * both)
    d_r += tl.where(centre == 0, 0.0, 2.0 * centre * both)
    length_c = tl.full([BLOCK], 1.0, tl.float64)
    if length_ptr is not None:
        length_c = tl.load(length_ptr + c, read_c, other=1.0)
        if MEAN:
            d_c = d_c / length_c
            d_r = d_r / tl.load(length_ptr + r, read_r, other=1.0)
    nll = tl.where(nll_weight == 0, 0.0, tl.load(nll_ptr + c, read_c, other=0.0))
    loss += nll_weight * nll
    d_c -= nll_weight / length_c
    tl.store(loss_ptr + at, loss.to(dtype), inside)
    tl.store(derivative_ptr + at, tl.where(has_c, d_c, 0.0).to(dtype), inside)
    tl.store(derivative_ptr + P + at, tl.where(has_r, d_r, 0.0).to(dtype), inside)

    partial_ptr += program
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partial_ptr, tl.sum(inside.to(tl.float64)))
    tl.store(partial_ptr + programs, tl.sum(tl.where(inside, apart, 0.0)))
    tl.store(partial_ptr + 2 * programs, tl.sum((inside & (apart > 0)).to(tl.float64)))
    tl.store(partial_ptr + 3 * programs, tl.sum(has_c.to(tl.float64)))
    tl.store(partial_ptr + 4 * programs, tl.sum(has_r.to(tl.float64)))
    tl.store(partial_ptr + 5 * programs, tl.sum(tl.where(has_c, scale * score_c, 0.0)))
    tl.store(partial_ptr + 6 * programs, tl.sum(tl.where(has_r, scale * score_r, 0.0)))
    tl.store(partial_ptr + 7 * programs, tl.sum(tl.where(inside, nll, 0.0)))


def launch(logprobs: Tensor, given, rule: Rule, outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Write losses (P,), rewards (R,) and derivatives (2, P); the statistics, (8,). `given` as in preference_loss."""
    losses, rewards, derivative = outputs
    rollouts, items = given.sizes(logprobs)
    programs, lengths = triton.cdiv(items, PAIR_LAUNCH["BLOCK"]), None
    partial = logprobs.new_empty((len(STATISTICS), programs), dtype=torch.float64)
    with torch.cuda.device_of(logprobs):
        if given.offsets is None:
            nll = -logprobs.double()
            scores = -nll if given.ref_logprobs is None else -nll - given.ref_logprobs
            rewards.copy_(rule.scale * scores)
        else:
            scores, nll, lengths = logprobs.new_empty((3, rollouts), dtype=torch.float64)
            _sum_kernel[(rollouts,)](
                logprobs, given.ref_logprobs, given.mask, given.offsets, scores, nll, lengths, rewards, rule.scale,
                MEAN=rule.mean, **SUM_LAUNCH,
            )  # fmt: skip
        numbers = rule.scale, rule.shift, rule.positive, rule.negative, rule.nll, rule.centre
        sides = given.chosen, given.rejected, given.desirable, given.baseline, given.margins
        _pair_kernel[(programs,)](
            scores, nll, lengths, *sides, losses, derivative, partial, items, rollouts, *numbers,
            LINK=rule.link, MEAN=rule.mean, **PAIR_LAUNCH,
        )  # fmt: skip
    return partial.sum(1).to(logprobs.dtype)
