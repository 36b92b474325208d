"""Clipped policy loss of each token, its gradient and what a trainer watches, in one pass over the log-probs.

    log_ratio = logprobs - old_logprobs        ratio = exp(log_ratio)        d = ref_logprobs - logprobs

    gain      = min(ratio A, clip(ratio, 1 - low, 1 + high) A)      where A < 0: max(gain, dual A)
    kl        = -d (k1), d^2 / 2 (k2), exp(d) - d - 1 (k3)
    losses    = weights (beta kl - gain)

    dlosses   = weights (beta dkl - ratio A), without ratio A where a bound holds; dkl = 1, -d, 1 - exp(d)

Which bound holds is decided on log_ratio against log(1 - low), log(1 + high) and log(dual), by strict comparison: at a
bound the gradient flows. So every backend clips the same tokens, however it rounds exp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.policy_statistics import STATISTICS, merged, named, of_no_token

__all__ = ["STATISTICS", "merged", "named", "policy_loss"]

KL = {"k1": 1, "k2": 2, "k3": 3}

# Tokens a program, and partial sums a step; no result depends on how many tokens there are beside it.
TOKEN_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
MERGE_LAUNCH = {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
_TERMS = {torch.float32: 9, torch.float64: 17}  # of the series of exp(x) - 1 - x that are enough for |x| < 1


class Rule(NamedTuple):
    """The numbers of a call; infinity is no bound, and kl a value of KL or 0 without a reference."""

    low: float
    high: float
    dual: float
    beta: float
    kl: int

    def log_bounds(self) -> tuple[float, float, float]:
        """The bounds of the log-ratio: log(1 - low), log(1 + high), log(dual)."""
        low = math.log1p(-self.low) if self.low < 1 else -math.inf
        return low, math.log1p(self.high), math.log(self.dual)


def reference(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch: losses, through which autograd goes; their derivative, spelt out; statistics."""
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    weights = keep.to(logprobs.dtype) if weights is None else weights
    logprobs, a, weights = (torch.where(keep, x, 0.0) for x in (logprobs, advantages, weights))
    log_ratio = logprobs - (logprobs.detach() if old_logprobs is None else torch.where(keep, old_logprobs, 0.0))
    low, high, dual = bounds = _bounds(log_ratio, a, rule)
    held, dead = low | high | dual, (a == 0) & ~log_ratio.isnan()
    bound = torch.full_like(a, rule.dual).masked_fill(low, 1 - rule.low).masked_fill(high, 1 + rule.high)
    # Not beyond the bounds, where the ratio may overflow: infinity times a gradient of zero is NaN.
    ratio = torch.where(held | dead, 0.0, log_ratio).exp()
    policy = -torch.where(held, bound, ratio) * a
    d = torch.zeros_like(a) if ref_logprobs is None else torch.where(keep, ref_logprobs, 0.0) - logprobs
    kl, slope = ((0 * d, 0 * d), (-d, 1.0), (d.square() / 2, -d), (d.expm1() - d, -d.expm1()))[rule.kl]
    losses, derivative = policy, policy.masked_fill(held, 0.0)
    if rule.beta:
        losses, derivative = policy + rule.beta * kl, derivative + rule.beta * slope
    statistics = _statistics(keep, log_ratio.detach(), bounds, kl.detach())
    return weights * losses, (weights * derivative).detach(), statistics


def _bounds(log_ratio: Tensor, a: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Where the lower, the upper and the dual bound hold the loss and stop the gradient."""
    log_low, log_high, log_dual = rule.log_bounds()
    return (a < 0) & (log_ratio < log_low), (a > 0) & (log_ratio > log_high), (a < 0) & (log_ratio > log_dual)


def _statistics(keep, log_ratio, bounds, kl):
    """STATISTICS of the tokens in `keep`; the others must have log_ratio and kl 0."""
    ratio = log_ratio.exp()
    sums = [keep, *bounds, log_ratio.expm1() - log_ratio, kl, torch.where(keep, ratio, 0.0)]
    sums = [x.sum(dtype=ratio.dtype) for x in (*sums, sums[-1].square())]
    return torch.stack([*sums, ratio.masked_fill(~keep, -torch.inf).amax(), ratio.masked_fill(~keep, torch.inf).amin()])


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
def _tokens(logprob_ptr, advantage_ptr, old_ptr, ref_ptr, weight_ptr, mask_ptr, at, inside):
    """What is known of each token, 0 where it is masked. A whole block has `inside` None, and wide loads by that."""
    other = None if inside is None else 0
    logprob = tl.load(logprob_ptr + at, inside, other)
    a = tl.load(advantage_ptr + at, inside, other)
    old = logprob if old_ptr is None else tl.load(old_ptr + at, inside, other)
    ref = logprob if ref_ptr is None else tl.load(ref_ptr + at, inside, other)
    weight = tl.full(at.shape, 1.0, logprob.dtype) if weight_ptr is None else tl.load(weight_ptr + at, inside, other)
    keep = tl.full(at.shape, 1, tl.int1) if inside is None else inside
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + at, inside, other) != 0)
    log_ratio, d = tl.where(keep, logprob - old, 0.0), tl.where(keep, ref - logprob, 0.0)
    return tl.where(keep, a, 0.0), log_ratio, d, tl.where(keep, weight, 0.0), keep


@triton.jit(do_not_specialize=["N"])
def _token_kernel(
    logprob_ptr, advantage_ptr, old_ptr, ref_ptr, weight_ptr, mask_ptr, loss_ptr, derivative_ptr, partial_ptr, N,
    low: tl.float64, high: tl.float64, dual: tl.float64, log_low: tl.float64, log_high: tl.float64,
    log_dual: tl.float64, beta: tl.float64, KL_KIND: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, derivatives and partial statistics, (10, programs), of BLOCK tokens."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    whole = (program + 1) * BLOCK <= N
    if whole:
        a, log_ratio, d, weight, keep = _tokens(
            logprob_ptr, advantage_ptr, old_ptr, ref_ptr, weight_ptr, mask_ptr, at, None
        )
    else:
        a, log_ratio, d, weight, keep = _tokens(
            logprob_ptr, advantage_ptr, old_ptr, ref_ptr, weight_ptr, mask_ptr, at, at < N
        )
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    ratio, _, rest = _exponentials(log_ratio, TERMS)

    low_holds = (a < 0) & (log_ratio < tl.full([BLOCK], log_low, dtype))
    high_holds = (a > 0) & (log_ratio > tl.full([BLOCK], log_high, dtype))
    dual_holds = (a < 0) & (log_ratio > tl.full([BLOCK], log_dual, dtype))
    held = low_holds | high_holds | dual_holds
    bound = tl.where(low_holds, tl.full([BLOCK], 1 - low, dtype), tl.full([BLOCK], dual, dtype))
    bound = tl.where(high_holds, tl.full([BLOCK], 1 + high, dtype), bound)
    # A zero advantage has no part in the loss even where the ratio overflows; a NaN log-ratio shows.
    dead = (a == 0) & (log_ratio == log_ratio)
    loss = tl.where(dead, 0.0, -tl.where(held, bound, ratio) * a)
    derivative = tl.where(held, 0.0, loss)
    kl = tl.zeros([BLOCK], dtype)
    if KL_KIND > 0:
        if KL_KIND == 1:
            kl, slope = -d, tl.full([BLOCK], 1.0, dtype)
        elif KL_KIND == 2:
            kl, slope = 0.5 * d * d, -d
        else:
            _, less_one, kl = _exponentials(d, TERMS)
            slope = -less_one
        weight_of_kl = tl.full([BLOCK], beta, dtype)
        loss += tl.where(weight_of_kl == 0, 0.0, weight_of_kl * kl)
        derivative += tl.where(weight_of_kl == 0, 0.0, weight_of_kl * slope)
    loss, derivative = weight * loss, weight * derivative
    if whole:
        tl.store(loss_ptr + at, loss)
        if derivative_ptr is not None:
            tl.store(derivative_ptr + at, derivative)
    else:
        tl.store(loss_ptr + at, loss, at < N)
        if derivative_ptr is not None:
            tl.store(derivative_ptr + at, derivative, at < N)

    partial_ptr += program
    programs = tl.num_programs(0).to(tl.int64)
    ratio = tl.where(keep, ratio, 0.0)
    tl.store(partial_ptr, tl.sum(keep.to(dtype)))
    tl.store(partial_ptr + programs, tl.sum(low_holds.to(dtype)))
    tl.store(partial_ptr + 2 * programs, tl.sum(high_holds.to(dtype)))
    tl.store(partial_ptr + 3 * programs, tl.sum(dual_holds.to(dtype)))
    tl.store(partial_ptr + 4 * programs, tl.sum(rest))
    tl.store(partial_ptr + 5 * programs, tl.sum(kl))
    tl.store(partial_ptr + 6 * programs, tl.sum(ratio))
    tl.store(partial_ptr + 7 * programs, tl.sum(ratio * ratio))
    tl.store(partial_ptr + 8 * programs, _extreme(tl.where(keep, ratio, float("-inf")), True))
    tl.store(partial_ptr + 9 * programs, _extreme(tl.where(keep, ratio, float("inf")), False))


@triton.jit(do_not_specialize=["programs"])
def _merge_kernel(partial_ptr, statistics_ptr, programs, BLOCK: tl.constexpr):
    """One statistic of all tokens out of its partial ones, in a fixed order, in double."""
    statistic = tl.program_id(0)
    largest, least = statistic == 8, statistic == 9
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


def _triton(logprobs, advantages, old_logprobs, ref_logprobs, weights, mask, rule, with_derivative):
    losses, derivative, statistics = _outputs(logprobs, with_derivative)
    programs = triton.cdiv(logprobs.numel(), TOKEN_LAUNCH["BLOCK"])
    partial = logprobs.new_empty((len(STATISTICS), programs))
    tokens = logprobs, advantages, old_logprobs, ref_logprobs, weights, mask, losses, derivative
    numbers = rule.low, rule.high, rule.dual, *rule.log_bounds(), rule.beta
    with torch.cuda.device_of(logprobs):
        _token_kernel[(programs,)](
            *tokens, partial, logprobs.numel(), *numbers,
            KL_KIND=rule.kl, TERMS=_TERMS[logprobs.dtype], **TOKEN_LAUNCH,
        )  # fmt: skip
        _merge_kernel[(len(STATISTICS),)](partial, statistics, programs, **MERGE_LAUNCH)
    return losses, derivative, statistics


def _cpu(logprobs, advantages, old_logprobs, ref_logprobs, weights, mask, rule, with_derivative):
    from fuserl import _C

    losses, derivative, statistics = _outputs(logprobs, with_derivative)
    tokens = logprobs, advantages, old_logprobs, ref_logprobs, weights, mask
    _C.policy_loss(*tokens, *rule, losses, derivative, statistics, torch.get_num_threads())
    return losses, derivative, statistics


def _reference(*tokens_and_rule):
    *arguments, with_derivative = tokens_and_rule
    losses, derivative, statistics = reference(*arguments)
    return losses, derivative if with_derivative else None, statistics


def _outputs(logprobs, with_derivative):
    derivative = torch.empty_like(logprobs) if with_derivative else None
    return torch.empty_like(logprobs), derivative, logprobs.new_empty(len(STATISTICS))


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": _reference}


def _dispatch(logprobs, *arguments):
    *others, low, high, dual, beta, kl, with_derivative, backend = arguments
    backend = choose("policy_loss", IMPLS, logprobs.device, backend)
    flat = [None if x is None else x.reshape(-1).contiguous() for x in (logprobs, *others)]
    rule = Rule(low, high, dual, beta, kl)
    if logprobs.numel() == 0:
        losses, derivative, statistics = flat[0].clone(), flat[0].clone(), of_no_token(flat[0])
    else:
        losses, derivative, statistics = IMPLS[backend](*flat, rule, with_derivative)
    derivative = derivative.view(logprobs.shape) if with_derivative else logprobs.new_empty(0)
    return losses.view(logprobs.shape), statistics, derivative


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2])


@torch.autograd.function.once_differentiable
def _autograd(ctx, g, *_):
    return g * ctx.saved_tensors[0], *[None] * 12


_library = torch.library.Library("fuserl", "FRAGMENT")
_library.define(
    "policy_loss(Tensor logprobs, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? weights, "
    "Tensor? mask, float low, float high, float dual, float beta, int kl, bool with_derivative, str? backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("policy_loss", _dispatch, "CompositeExplicitAutograd")
torch.library.register_autograd("fuserl::policy_loss", _autograd, setup_context=_setup_context, lib=_library)


@torch.library.register_fake("fuserl::policy_loss", lib=_library)
def _fake(logprobs, *arguments):
    with_derivative = arguments[-2]
    derivative = logprobs.new_empty(logprobs.shape if with_derivative else 0)
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(len(STATISTICS)), derivative


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss of each token, with an optional KL term, and the batch's statistics in one pass.

        losses = weights (beta kl - min(ratio A, clip(ratio, 1 - low, 1 + high) A))
        ratio  = exp(logprobs - old_logprobs)

    Args:
        logprobs: (...) float32 or float64, of the policy; the only input that may require a gradient.
        advantages: (...). Where 0, the policy's part of the loss is exactly 0, even if the ratio overflows. Truncated
            importance weights on that part alone are folded in: w A, for w > 0 is clipped where A is.
        old_logprobs: (...) of the policy that sampled, or of the start of the update; None for the policy itself: the
            ratio is exactly 1 and its gradient that of a ratio.
        ref_logprobs: (...) of the reference that the KL term holds to; its statistic is there for beta 0, too.
        weights: (...) of each token's loss, the normaliser in it; None for 1. A weight of 0 is still a token counted.
        mask: (...) bool; a False token has loss and gradient 0, is not counted, and its other inputs may be anything.
        low, high: how far the ratio may go below and above 1; infinity for no clip.
        dual: above 1; where A < 0 the loss is at most -dual A; None for no such bound.
        beta: coefficient of the KL term; 0 leaves it out.
        kl: "k1" = -d, "k2" = d^2 / 2 or "k3" = exp(d) - d - 1 with d = ref_logprobs - logprobs, and the plain gradient
            of that expression.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (losses, statistics): a loss per token, differentiable once in logprobs; (10,) sums and extremes over tokens,
        detached, in the order of STATISTICS, for `merged` and `named`. clipped_low, clipped_high and clipped_dual count
        tokens whose gradient that bound stops; approx_kl sums ratio - 1 - log_ratio, which estimates KL(old || policy).

    Raises:
        ValueError: on a wrong shape, dtype, device, number or name, and for a gradient asked of another input.

    At a bound (log_ratio equal to log(1 + high), say) the gradient flows. NaN in a token that is not masked shows in
    its loss and in the statistics. Memory: one number per token beside the losses, none without a gradient.

    Source: PPO (arXiv:1707.06347, eq. 7); dual clip (1912.09729, eq. 5); high > low is DAPO (2503.14476).
    GSPO: logprobs = its sequence's mean log-ratio at every token, old_logprobs = zeros.
    CISPO: no old_logprobs, and advantages (or weights) times the detached clipped ratio.
    """
    _check(logprobs, advantages, old_logprobs, ref_logprobs, weights, mask)
    _check_numbers(low, high, dual, beta, kl, ref_logprobs)
    with_derivative = logprobs.requires_grad and torch.is_grad_enabled()
    numbers = float(low), float(high), math.inf if dual is None else float(dual), float(beta)
    losses, statistics, _ = torch.ops.fuserl.policy_loss(
        logprobs, advantages, old_logprobs, ref_logprobs, weights, mask,
        *numbers, 0 if ref_logprobs is None else KL[kl], with_derivative, backend,
    )  # fmt: skip
    return losses, statistics


def _check(logprobs, advantages, old_logprobs, ref_logprobs, weights, mask) -> None:
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"policy_loss: logprobs must be float32 or float64; got {logprobs.dtype}. A log-probability of 16 bits "
            "cannot hold a ratio: compute them in float32."
        )
    others = {
        "advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "weights": weights,
        "mask": mask,
    }  # fmt: skip
    for name, x in others.items():
        if x is None:
            continue
        dtype = torch.bool if name == "mask" else logprobs.dtype
        if x.shape != logprobs.shape or x.dtype != dtype or x.device != logprobs.device:
            raise ValueError(
                f"policy_loss: {name} must be {tuple(logprobs.shape)} {dtype} on {logprobs.device}; got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}. Expand or convert it to match logprobs."
            )
        if x.requires_grad:
            raise ValueError(f"policy_loss: {name} must not require a gradient; got one that does. Pass it detached.")


def _check_numbers(low, high, dual, beta, kl, ref_logprobs) -> None:
    if not (low >= 0 and high >= 0):
        raise ValueError(
            f"policy_loss: low and high must be at least 0; got {low} and {high}. Use math.inf for no clip."
        )
    if dual is not None and not dual > 1:
        raise ValueError(f"policy_loss: dual must be above 1; got {dual}. Use None for no such bound.")
    if kl not in KL:
        raise ValueError(f"policy_loss: kl must be one of {', '.join(KL)}; got {kl!r}. Correct the name.")
    if not abs(beta) < math.inf:
        raise ValueError(f"policy_loss: beta must be finite; got {beta}. Use 0 for no KL term.")
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"policy_loss: ref_logprobs must be given when beta is not 0; got None and beta {beta}.")
