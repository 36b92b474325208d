"""Triton kernels of policy_loss: losses, derivatives and partial statistics of a block of tokens, and their sums."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton
from fuserl.kernels.policy_statistics import EXTREMES, STATISTICS

__all__ = ["launch"]

# Tokens a program, and partial sums a step; no result depends on how many tokens there are beside it.
TOKEN_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
MERGE_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
_TERMS = {torch.float32: 9, torch.float64: 17}  # of the series of exp(x) - 1 - x that are enough for |x| < 1


@triton.jit
def _exponentials(x, TERMS: tl.constexpr):
    """e^x, e^x - 1 and e^x - 1 - x, each good to its own last digits: a series near 0, where they would cancel."""
    exp = tl.exp(x)
    p = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS + 1, 2, -1):
        p = 1.0 + p * x * (1.0 / k)
    rest = 0.5 * x * x * p
    small = tl.abs(x) < 1.0
    less_one = tl.where(small, x + rest, exp - 1.0)
    return tl.where(small, 1.0 + less_one, exp), less_one, tl.where(small, rest, less_one - x)


@triton.jit
def _extreme(x, largest):
    """The maximum of a block, or its minimum; NaN, which the reduction alone would pass over, if it has one."""
    extreme = tl.where(largest, tl.max(x), tl.min(x))
    return tl.where(tl.sum((x != x).to(tl.int32)) > 0, float("nan"), extreme)


@triton.jit
def _tokens(
    logprob_ptr, advantage_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, weight_ptr, mask_ptr,
    first, at, inside,
):  # fmt: skip
    """What is known of each token, 0 where it is masked. A whole block has `inside` None, and wide loads by that."""
    other = None if inside is None else 0
    logprob = tl.load(logprob_ptr + first + at, inside, other)
    a = tl.load(advantage_ptr + first + at, inside, other)
    old = logprob if old_ptr is None else tl.load(old_ptr + first + at, inside, other)
    ref = logprob if ref_ptr is None else tl.load(ref_ptr + first + at, inside, other)
    weight = tl.full(at.shape, 1.0, logprob.dtype)
    log_weight, entropy = tl.zeros_like(logprob), tl.zeros_like(logprob)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + first + at, inside, other)
    if rollout_ptr is not None:
        log_weight = old - tl.load(rollout_ptr + first + at, inside, other)
    if log_weight_ptr is not None:
        log_weight = tl.load(log_weight_ptr + first + at, inside, other)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + first + at, inside, other)
    keep = tl.full(at.shape, 1, tl.int1) if inside is None else inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + first + at, inside, other) != 0)
    log_ratio, d = tl.where(keep, logprob - old, 0.0), tl.where(keep, ref - logprob, 0.0)
    a, log_weight, entropy = tl.where(keep, a, 0.0), tl.where(keep, log_weight, 0.0), tl.where(keep, entropy, 0.0)
    return logprob, a, log_ratio, d, log_weight, entropy, tl.where(keep, weight, 0.0), keep


@triton.jit
def _importance(a, log_weight, keep, log_least, log_most, below, above):
    """The advantage times the importance weight; the weight, 0 where masked; and whether a bound of it was met."""
    low = log_weight < tl.full(a.shape, log_least, a.dtype)
    high = log_weight > tl.full(a.shape, log_most, a.dtype)
    bound = tl.where(low, tl.full(a.shape, below, a.dtype), tl.full(a.shape, above, a.dtype))
    weight = tl.where(low | high, bound, tl.exp(log_weight))
    a = tl.where((a == 0) & (weight == weight), 0.0, weight * a)
    return a, tl.where(keep, weight, 0.0), keep & (low | high)


@triton.jit
def _policy(cost, logprob, ratio, less_one, held, bound, log_ratio, SURROGATE: tl.constexpr):
    """The loss of a surrogate for -w A, and its derivative; `bound` is tau where it is a gate."""
    # A zero advantage has no part in the loss even where the ratio overflows; a NaN log-ratio shows.
    dead = (cost == 0) & (log_ratio == log_ratio)
    if SURROGATE == 2:
        x = bound * less_one
        t = tl.exp(-tl.abs(x))
        near = 1.0 / (1.0 + t)
        slope = 4.0 * t * near * near
        loss = tl.where(dead, 0.0, 4.0 / bound * tl.where(x < 0, t * near, near) * cost)
        derivative = tl.where(dead | (slope == 0), 0.0, slope * ratio * cost)
    else:
        loss = tl.where(dead, 0.0, tl.where(held, bound, ratio) * cost)
        if SURROGATE == 1:
            derivative = loss
            loss = tl.where(derivative == 0, 0.0, derivative * logprob)
        else:
            derivative = tl.where(held, 0.0, loss)
    return loss, derivative


@triton.jit
def _divergence(d, ratio, KL: tl.constexpr, SCORE: tl.constexpr, WEIGHTED: tl.constexpr, TERMS: tl.constexpr):
    """The estimate of KL(policy || reference) of each token, and its derivative."""
    one = tl.full(d.shape, 1.0, d.dtype)
    if KL == 1:
        value, slope, sum_of_both = -d, one, 1.0 - d
    elif KL == 2:
        value, slope = 0.5 * d * d, -d
        sum_of_both = value + slope
    else:
        _, less_one, value = _exponentials(d, TERMS)
        slope, sum_of_both = -less_one, -d
    if SCORE:
        slope = -d
    if WEIGHTED:
        value, slope = ratio * value, ratio * sum_of_both
    return value, slope


@triton.jit(do_not_specialize=["N"])
def _token_kernel(
    logprob_ptr, advantage_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, weight_ptr, mask_ptr,
    loss_ptr, derivative_ptr, partial_ptr, N,
    positive_below: tl.float64, positive_above: tl.float64, negative_below: tl.float64, negative_above: tl.float64,
    log_positive_below: tl.float64, log_positive_above: tl.float64, log_negative_below: tl.float64,
    log_negative_above: tl.float64, log_least: tl.float64, log_most: tl.float64, weight_below: tl.float64,
    weight_above: tl.float64, beta: tl.float64, entropy_coef: tl.float64, SURROGATE: tl.constexpr, KL: tl.constexpr,
    SCORE: tl.constexpr, WEIGHTED: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, derivatives and partial statistics, (12, programs), of BLOCK tokens."""
    program = tl.program_id(0).to(tl.int64)
    # Addresses are a scalar and a small offset: as many numbers of 64 bits as tokens would spill registers.
    first, at = program * BLOCK, tl.arange(0, BLOCK)
    left = tl.minimum(N - first, BLOCK).to(tl.int32)
    whole = left == BLOCK
    if whole:
        logprob, a, log_ratio, d, log_weight, entropy, weight, keep = _tokens(
            logprob_ptr, advantage_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, weight_ptr,
            mask_ptr, first, at, None,
        )  # fmt: skip
    else:
        logprob, a, log_ratio, d, log_weight, entropy, weight, keep = _tokens(
            logprob_ptr, advantage_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, entropy_ptr, weight_ptr,
            mask_ptr, first, at, at < left,
        )  # fmt: skip
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    ratio, less_one, rest = _exponentials(log_ratio, TERMS)
    importance, cut = keep.to(dtype), tl.zeros([BLOCK], tl.int1)
    if rollout_ptr is not None or log_weight_ptr is not None:
        a, importance, cut = _importance(a, log_weight, keep, log_least, log_most, weight_below, weight_above)

    above, below = a > 0, a < 0
    low_bound, low_factor = tl.full([BLOCK], log_negative_below, dtype), tl.full([BLOCK], negative_below, dtype)
    low_holds = below & (log_ratio < low_bound)
    if SURROGATE == 1:  # a clip has no bound below where the advantage is positive
        low_holds = low_holds | (above & (log_ratio < tl.full([BLOCK], log_positive_below, dtype)))
        low_factor = tl.where(above, tl.full([BLOCK], positive_below, dtype), low_factor)
    high_holds = above & (log_ratio > tl.full([BLOCK], log_positive_above, dtype))
    dual_holds = below & (log_ratio > tl.full([BLOCK], log_negative_above, dtype))
    bound = tl.where(above, tl.full([BLOCK], positive_above, dtype), tl.full([BLOCK], negative_above, dtype))
    held, bound = low_holds | high_holds | dual_holds, tl.where(low_holds, low_factor, bound)
    loss, derivative = _policy(-a, logprob, ratio, less_one, held, bound, log_ratio, SURROGATE)
    kl = tl.zeros([BLOCK], dtype)
    if KL > 0:
        kl, slope = _divergence(d, ratio, KL, SCORE, WEIGHTED, TERMS)
        weight_of_kl = tl.full([BLOCK], beta, dtype)
        loss += tl.where(weight_of_kl == 0, 0.0, weight_of_kl * kl)
        derivative += tl.where(weight_of_kl == 0, 0.0, weight_of_kl * slope)
    if entropy_ptr is not None:
        loss -= tl.full([BLOCK], entropy_coef, dtype) * entropy
    loss, derivative = weight * loss, weight * derivative
    if whole:
        tl.store(loss_ptr + first + at, loss)
        if derivative_ptr is not None:
            tl.store(derivative_ptr + first + at, derivative)
    else:
        tl.store(loss_ptr + first + at, loss, at < left)
        if derivative_ptr is not None:
            tl.store(derivative_ptr + first + at, derivative, at < left)

    partial_ptr += program
    programs = tl.num_programs(0).to(tl.int64)
    ratio = tl.where(keep, ratio, 0.0)
    tl.store(partial_ptr, tl.sum(keep.to(dtype)))
    tl.store(partial_ptr + programs, tl.sum(low_holds.to(dtype)))
    tl.store(partial_ptr + 2 * programs, tl.sum(high_holds.to(dtype)))
    tl.store(partial_ptr + 3 * programs, tl.sum(dual_holds.to(dtype)))
    tl.store(partial_ptr + 4 * programs, tl.sum(rest))
    tl.store(partial_ptr + 5 * programs, tl.sum(kl))
    tl.store(partial_ptr + 6 * programs, tl.sum(importance))
    tl.store(partial_ptr + 7 * programs, tl.sum(cut.to(dtype)))
    tl.store(partial_ptr + 8 * programs, tl.sum(ratio))
    tl.store(partial_ptr + 9 * programs, tl.sum(ratio * ratio))
    tl.store(partial_ptr + 10 * programs, _extreme(tl.where(keep, ratio, float("-inf")), True))
    tl.store(partial_ptr + 11 * programs, _extreme(tl.where(keep, ratio, float("inf")), False))


@triton.jit(do_not_specialize=["programs"])
def _merge_kernel(partial_ptr, statistics_ptr, programs, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """One statistic of all tokens out of its partial ones, in a fixed order, in double."""
    statistic = tl.program_id(0)
    largest, least = statistic == SUMS, statistic == SUMS + 1
    identity = tl.where(largest, float("-inf"), tl.where(least, float("inf"), 0.0))
    partial_ptr += statistic.to(tl.int64) * programs
    total = tl.full([BLOCK], 0.0, tl.float64) + identity
    for begin in range(0, programs, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(partial_ptr + at, at < programs, other=identity).to(tl.float64)
        greater = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
        smaller = tl.minimum(total, x, propagate_nan=tl.PropagateNan.ALL)
        total = tl.where(largest, greater, tl.where(least, smaller, total + x))
    merged = tl.where(largest | least, _extreme(total, largest), tl.sum(total))
    tl.store(statistics_ptr + statistic, merged.to(statistics_ptr.dtype.element_ty))


def launch(tokens, rule, losses: Tensor, derivative: Tensor | None, statistics: Tensor) -> None:
    """Fill the outputs, (N,), (N,) and the statistics, from a policy_loss.Tokens and .Rule, on the current stream.

    Args:
        tokens: contiguous (N,) tensors or None, logprobs first.
        rule: numbers of the call, none of which a kernel is compiled for; which terms there are it is compiled for.
        losses, derivative, statistics: written; derivative None where it is not wanted.
    """
    programs = triton.cdiv(losses.numel(), TOKEN_LAUNCH["BLOCK"])
    partial = losses.new_empty((len(STATISTICS), programs))
    bounds = rule.bounds
    numbers = *bounds.factors, *bounds.log_ratios, *rule.correction, rule.beta, rule.entropy_coef
    with torch.cuda.device_of(losses):
        _token_kernel[(programs,)](
            *tokens, losses, derivative, partial, losses.numel(), *numbers, SURROGATE=bounds.kind, KL=rule.kl,
            SCORE=rule.score, WEIGHTED=rule.kl_weighted, TERMS=_TERMS[losses.dtype], **TOKEN_LAUNCH,
        )  # fmt: skip
        _merge_kernel[(len(STATISTICS),)](partial, statistics, programs, SUMS=EXTREMES, **MERGE_LAUNCH)
