"""Token losses of a policy, their gradient and what a trainer watches, in one pass over the log-probs.

    log_ratio = logprobs - old_logprobs        ratio = exp(log_ratio)        d = ref_logprobs - logprobs
    w         = exp(log_weights), bounded or cut; log_weights = old_logprobs - rollout_logprobs unless they are given

    gain      = that of the surrogate for w A in the place of A            (kernels/surrogates.py)
    kl        = -d (k1), d^2 / 2 (k2), exp(d) - d - 1 (k3); with kl_weighted ratio times that
    losses    = weights (beta kl - gain - entropy_coef entropy)

    dlosses   = weights (beta dkl - dgain)
    dgain     = Clip: gain, 0 where a bound holds   Weight: bounded ratio w A   Gate: 4 s (1 - s) ratio w A, s = sigmoid
    dkl       = 1, -d, 1 - exp(d); -d for k1+ and k3+; with kl_weighted ratio times kl + dkl, which is -ratio d for k3

Which bound holds is decided on log_ratio against the logarithms of the bounds, by strict comparison: at a bound the
gradient flows. So every backend clips the same tokens, however it rounds exp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.policy_statistics import STATISTICS, merged, named, of_no_token
from fuserl.kernels.registration import register
from fuserl.kernels.sampled_divergence import ESTIMATORS
from fuserl.kernels.surrogates import (
    GATE,
    WEIGHT,
    Bounds,
    Clip,
    Correction,
    Gate,
    Truncate,
    Weight,
    Within,
    bounds_of,
    correction_of,
    numbers_of,
)

__all__ = ["STATISTICS", "merged", "named", "policy_loss"]


class Tokens(NamedTuple):
    """What a call is told of each token, (N,) or None."""

    logprobs: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    log_weights: Tensor | None = None
    entropy: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None


class Rule(NamedTuple):
    """The numbers of a call; kl is 0 without a reference, else 1, 2 or 3, with `score` the gradient of 2."""

    bounds: Bounds
    correction: Correction = Correction()
    beta: float = 0.0
    kl: int = 0
    score: bool = False
    kl_weighted: bool = False
    entropy_coef: float = 0.0


def reference(tokens: Tokens, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch: losses, through which autograd goes; their derivative, spelt out; statistics."""
    keep = torch.ones_like(tokens.logprobs, dtype=torch.bool) if tokens.mask is None else tokens.mask
    tokens = Tokens(*(None if x is None else torch.where(keep, x, 0.0) for x in tokens[:-1]))
    logprobs, a = tokens.logprobs, tokens.advantages
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    a, importance, cut = _corrected(a, old, tokens, rule.correction)
    log_ratio = logprobs - old
    bounds = _bounds(log_ratio, a, rule.bounds.log_ratios)
    losses, derivative = _policy(-a, logprobs, log_ratio, bounds, rule.bounds)
    kl = torch.zeros_like(a)
    if rule.kl:
        kl, slope = _divergence(tokens.ref_logprobs - logprobs, log_ratio, rule)
        if rule.beta:
            losses, derivative = losses + rule.beta * kl, derivative + rule.beta * slope
    if tokens.entropy is not None:
        losses = losses - rule.entropy_coef * tokens.entropy
    weights = keep.to(a.dtype) if tokens.weights is None else tokens.weights
    counted = keep, *bounds, kl.detach(), torch.where(keep, importance, 0.0), cut & keep
    return weights * losses, (weights * derivative).detach(), _statistics(log_ratio.detach(), *counted)


def _corrected(a: Tensor, old: Tensor, tokens: Tokens, rule: Correction) -> tuple[Tensor, Tensor, Tensor]:
    """The advantage times the importance weight, the weight, and where one of its bounds was met."""
    if tokens.rollout_logprobs is None and tokens.log_weights is None:
        return a, torch.ones_like(a), torch.zeros_like(a, dtype=torch.bool)
    log_weight = (old - tokens.rollout_logprobs) if tokens.log_weights is None else tokens.log_weights
    low, high = log_weight < rule.log_least, log_weight > rule.log_most
    weight = log_weight.exp().masked_fill(low, rule.below).masked_fill(high, rule.above)
    return torch.where((a == 0) & ~weight.isnan(), 0.0, weight * a), weight, low | high


def _bounds(log_ratio: Tensor, a: Tensor, log_ratios: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the ratio is below its bound, above that of A > 0, and above that of A < 0."""
    above, below = a > 0, a < 0
    positive_low, positive_high, negative_low, negative_high = log_ratios
    low = (above & (log_ratio < positive_low)) | (below & (log_ratio < negative_low))
    return low, above & (log_ratio > positive_high), below & (log_ratio > negative_high)


def _policy(cost, logprobs, log_ratio, bounds, rule: Bounds) -> tuple[Tensor, Tensor]:
    """The loss of the surrogate for cost = -w A, and its derivative to logprobs."""
    low, high, dual = bounds
    held, dead = low | high | dual, (cost == 0) & ~log_ratio.isnan()
    at_low, at_high = (
        torch.full_like(cost, rule.factors[i + 2]).masked_fill(cost < 0, rule.factors[i]) for i in (0, 1)
    )
    # Not beyond the bounds, where the ratio may overflow: infinity times a gradient of zero is NaN.
    ratio = torch.where(held | dead, 0.0, log_ratio).exp()
    if rule.kind == GATE:
        x = at_high * torch.where(dead, 0.0, log_ratio).expm1()
        slope = 4 * x.sigmoid() * (-x).sigmoid()
        return 4 / at_high * x.sigmoid() * cost, torch.where(slope == 0, 0.0, slope * ratio * cost)
    factor = torch.where(held & ~dead, torch.where(low, at_low, at_high), ratio) * cost
    if rule.kind == WEIGHT:
        factor = factor.detach()
        return torch.where(factor == 0, 0.0, factor * logprobs), factor
    return factor, factor.masked_fill(held, 0.0)


def _divergence(d: Tensor, log_ratio: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The estimate of KL(policy || reference), and its derivative to logprobs."""
    value, slope = ((-d, torch.ones_like(d)), (d.square() / 2, -d), (d.expm1() - d, -d.expm1()))[rule.kl - 1]
    if rule.kl_weighted:
        ratio = log_ratio.exp()
        return ratio * value, ratio * (-d if rule.kl == 3 else value + slope)
    if rule.score:
        square = d.square() / 2
        return value.detach() + square - square.detach(), -d
    return value, slope


def _statistics(log_ratio, keep, *counted):
    """STATISTICS of the tokens in `keep`; the others must have log_ratio and whatever is counted 0."""
    ratio, (low, high, dual, *others) = log_ratio.exp(), counted
    sums = [keep, low, high, dual, log_ratio.expm1() - log_ratio, *others, torch.where(keep, ratio, 0.0)]
    sums = [x.sum(dtype=ratio.dtype) for x in (*sums, sums[-1].square())]
    return torch.stack([*sums, ratio.masked_fill(~keep, -torch.inf).amax(), ratio.masked_fill(~keep, torch.inf).amin()])


def _triton(tokens, rule, with_derivative):
    from fuserl.kernels.policy_tokens import launch

    outputs = _outputs(tokens.logprobs, with_derivative)
    launch(tokens, rule, *outputs)
    return outputs


def _cpu(tokens, rule, with_derivative):
    from fuserl import _C

    outputs = _outputs(tokens.logprobs, with_derivative)
    bounds, correction, *others = rule
    _C.policy_loss(*tokens, *bounds, correction, *others, *outputs, torch.get_num_threads())
    return outputs


def _reference(tokens, rule, with_derivative):
    losses, derivative, statistics = reference(tokens, rule)
    return losses, derivative if with_derivative else None, statistics


def _outputs(logprobs, with_derivative):
    derivative = torch.empty_like(logprobs) if with_derivative else None
    return torch.empty_like(logprobs), derivative, logprobs.new_empty(len(STATISTICS))


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": _reference}
_ENTROPY, _WEIGHTS, _MASK, _NUMBERS = 5, 6, 7, 8  # places among the arguments of the op


def _dispatch(logprobs, advantages, old_logprobs, ref_logprobs, sampled, entropy, *others):
    *others, (*bounds, beta, entropy_coef), (kind, kl, score, kl_weighted, direct, with_derivative), backend = others
    which = bounds_of(kind, tuple(bounds[:4])), Correction(*bounds[4:])
    rule = Rule(*which, beta, kl, bool(score), bool(kl_weighted), entropy_coef)
    backend = choose("policy_loss", IMPLS, logprobs.device, backend)
    sampled = (None, sampled) if direct else (sampled, None)
    tensors = logprobs, advantages, old_logprobs, ref_logprobs, *sampled, entropy if entropy_coef else None, *others
    tokens = Tokens(*(None if x is None else x.reshape(-1).contiguous() for x in tensors))
    if logprobs.numel():
        losses, derivative, statistics = IMPLS[backend](tokens, rule, bool(with_derivative))
    else:
        losses, derivative = tokens.logprobs.clone(), tokens.logprobs.clone()
        statistics = of_no_token(losses)
    derivative = derivative.view(logprobs.shape) if with_derivative else logprobs.new_empty(0)
    return losses.view(logprobs.shape), statistics, derivative


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.entropy_coef = inputs[_NUMBERS][-1]
    of_entropy = (None, None) if inputs[_ENTROPY] is None else (inputs[_WEIGHTS], inputs[_MASK])
    ctx.save_for_backward(output[2], *of_entropy)


@torch.autograd.function.once_differentiable
def _autograd(ctx, g, *_):
    derivative, weights, mask = ctx.saved_tensors
    gradients = [None] * len(ctx.needs_input_grad)
    if ctx.needs_input_grad[0]:
        gradients[0] = g * derivative
    if ctx.needs_input_grad[_ENTROPY]:
        of_entropy = -ctx.entropy_coef * (g if weights is None else g * weights)
        gradients[_ENTROPY] = of_entropy if mask is None else torch.where(mask, of_entropy, 0.0)
    return tuple(gradients)


def _fake(logprobs, *arguments):
    derivative = logprobs.new_empty(logprobs.shape if arguments[-2][-1] else 0)
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(len(STATISTICS)), derivative


# Few arguments, the numbers in lists: torch takes a time that grows with their square to look at those of a call.
_policy_loss = register(
    "policy_loss(Tensor logprobs, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? sampled, "
    "Tensor? entropy, Tensor? weights, Tensor? mask, float[] numbers, int[] codes, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _dispatch,
    _fake,
    keep=_setup_context,
    backward=_autograd,
)


def policy_loss(
    logprobs: Tensor, advantages: Tensor, *, old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None, log_weights: Tensor | None = None, entropy: Tensor | None = None,
    weights: Tensor | None = None, mask: Tensor | None = None,
    surrogate: Clip | Weight | Gate = Clip(),  # noqa: B008
    importance: Truncate | Within | None = None, beta: float = 0.0, kl: str = "k3", kl_weighted: bool = False,
    entropy_coef: float = 0.0, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss of each token of a policy, clipped, weighted or gated, with KL and entropy terms and statistics in one pass.

        losses = weights (beta kl - w gain - entropy_coef entropy)
        ratio  = exp(logprobs - old_logprobs)        w = exp(old_logprobs - rollout_logprobs), or exp(log_weights)
        gain   = min(ratio A, clip(ratio, 1 - low, 1 + high) A)        for Clip(low, high)
                 clip(ratio, *bounds of A's sign) A logprobs, the ratio without gradient        for Weight
                 4 / tau sigmoid(tau (ratio - 1)) A, tau of A's sign        for Gate

    Args:
        logprobs: (...) float32 or float64, of the policy; it and entropy alone may require a gradient.
        advantages: (...). Where 0, the gain is exactly 0, even if the ratio overflows.
        old_logprobs: (...) of the policy at the start of the update; None for itself: a ratio of 1, with its gradient.
        ref_logprobs: (...) of the reference that the KL term holds to; its statistic is there for beta 0, too.
        rollout_logprobs: (...) as the engine that sampled had them, where that is not old_logprobs: w corrects for it.
        log_weights: (...) instead: log w, such as a mean over a rollout. w is detached and leaves KL and entropy alone.
        entropy: (...) of the policy's distribution at each token, for a bonus.
        weights: (...) of each token's loss, the normaliser in it; None for 1. A weight of 0 is still a token counted.
        mask: (...) bool; a False token has loss and gradient 0, is not counted, and its other inputs may be anything.
        surrogate: `Clip`, `Weight` or `Gate`, whose docstrings name the papers.
        importance: `Truncate` or `Within`, what w may be; None for any.
        beta: coefficient of the KL term; 0 leaves it out.
        kl: "k1", "k2", "k3", "k1+" or "k3+", each with its gradient as in `sampled_divergence`.
        kl_weighted: multiply the KL term by the ratio, gradient and all: k1 and k3 are then right on average, in value
            and gradient, for samples of the old policy (DeepSeek-V3.2, arXiv:2512.02556).
        entropy_coef: coefficient of the entropy bonus; 0 leaves it out.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (losses, statistics): a loss per token, differentiable once in logprobs and entropy; (12,) sums and extremes
        over tokens, detached, in the order and meaning of `policy_statistics.STATISTICS`, for `merged` and `named`.

    Raises:
        ValueError: on a wrong shape, dtype, device, number or name, and for a gradient asked of another input.

    At a bound (log_ratio = log(1 + high), say) the gradient flows. NaN in a token that is kept shows in its loss and in
    the statistics. Memory: one number per token beside the losses, none without a gradient.

    Source: of the surrogates, theirs; the decoupled ratio and w: AReaL (arXiv:2505.24298).
    """
    others = ref_logprobs, rollout_logprobs, log_weights, entropy, weights, mask
    tokens = Tokens(logprobs, advantages, old_logprobs, *others)
    _check(tokens)
    _check_terms(tokens, importance, beta, kl, kl_weighted, entropy_coef)
    with_derivative = logprobs.requires_grad and torch.is_grad_enabled()
    estimator = (0, False) if ref_logprobs is None else ESTIMATORS[kl]
    kind, *numbers = numbers_of(surrogate)
    numbers += [*correction_of(importance), float(beta), float(entropy_coef)]
    codes = [kind, *map(int, (*estimator, kl_weighted, log_weights is not None, with_derivative))]
    sampled = rollout_logprobs if log_weights is None else log_weights
    given = *tokens[:4], sampled, entropy, weights, mask, numbers, codes, backend
    return _policy_loss(*given)[:2]


def _check(tokens: Tokens) -> None:
    logprobs = tokens.logprobs
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"policy_loss: logprobs must be float32 or float64; got {logprobs.dtype}. A log-probability of 16 bits "
            "cannot hold a ratio: compute them in float32."
        )
    for name, x in zip(Tokens._fields, tokens, strict=True):
        if x is None:
            continue
        dtype = torch.bool if name == "mask" else logprobs.dtype
        if x.shape != logprobs.shape or x.dtype != dtype or x.device != logprobs.device:
            raise ValueError(
                f"policy_loss: {name} must be {tuple(logprobs.shape)} {dtype} on {logprobs.device}; got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}. Expand or convert it to match logprobs."
            )
        if x.requires_grad and name not in ("logprobs", "entropy"):
            raise ValueError(f"policy_loss: {name} must not require a gradient; got one that does. Pass it detached.")


def _check_terms(tokens: Tokens, importance, beta, kl, kl_weighted, entropy_coef) -> None:
    if kl not in ESTIMATORS:
        raise ValueError(f"policy_loss: kl must be one of {', '.join(ESTIMATORS)}; got {kl!r}. Correct the name.")
    if kl_weighted and ESTIMATORS[kl][1]:
        raise ValueError(
            f"policy_loss: kl_weighted must be False with {kl}, which has a gradient of its own; got True. Use "
            f"{kl[:-1]}."
        )
    if not abs(beta) < math.inf:
        raise ValueError(f"policy_loss: beta must be finite; got {beta}. Use 0 for no KL term.")
    if beta != 0 and tokens.ref_logprobs is None:
        raise ValueError(f"policy_loss: ref_logprobs must be given when beta is not 0; got None and beta {beta}.")
    if not abs(entropy_coef) < math.inf:
        raise ValueError(f"policy_loss: entropy_coef must be finite; got {entropy_coef}. Use 0 for no bonus.")
    if entropy_coef != 0 and tokens.entropy is None:
        raise ValueError(
            f"policy_loss: entropy must be given when entropy_coef is not 0; got None and entropy_coef {entropy_coef}."
        )
    if tokens.rollout_logprobs is not None and tokens.log_weights is not None:
        raise ValueError("policy_loss: rollout_logprobs must be None with log_weights; got both. Give one of them.")
    if importance is not None and tokens.rollout_logprobs is None and tokens.log_weights is None:
        raise ValueError(
            f"policy_loss: rollout_logprobs or log_weights must be given with importance; got neither and {importance}."
        )
