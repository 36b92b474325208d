"""The kinds of divergence: the summand F(p, q) of each, and what its derivatives take up in a gradient.

Written so that no term is negative, each is 0 where p == q, and small ones keep their digits; d = log p - log q:

    kind              F                                            p dF/dp                q dF/dq
    forward_kl        q (e^d - 1 - d)                              p - q                  -q d
    reverse_kl        p (e^-d - 1 + d)                             p d                    q - p
    jensen_shannon    beta q log(q/m) + (1 - beta) p log(p/m)      (1 - beta) p log(p/m)  beta q log(q/m)
    alpha             (w - alpha p - (1 - alpha) q) / (alpha (alpha - 1))
                                                                   (w - p) / (alpha - 1)  (q - w) / alpha
    total_variation   |p - q| / 2                                  p sign(d) / 2          -q sign(d) / 2

with m = beta q + (1 - beta) p and w = p^alpha q^(1 - alpha). squared_hellinger is alpha 1/2 over 4, and chi_squared
twice alpha 2. F = p dF/dp + q dF/dq, for F is homogeneous.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton

KINDS = (
    "forward_kl", "reverse_kl", "jensen_shannon", "alpha", "total_variation", "squared_hellinger", "chi_squared",
)  # fmt: skip
FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, ALPHA, TOTAL_VARIATION = range(5)
# Terms of the series of e^x - 1 - x and of atanh that are enough, by dtype of the sums.
TERMS = {torch.float32: {"TERMS": 9, "LOG_TERMS": 12}, torch.float64: {"TERMS": 17, "LOG_TERMS": 26}}


class Rule(NamedTuple):
    """A kind as kernels take it: the summand, its parameter, and what its sum is multiplied by."""

    kind: int
    parameter: float
    scale: float


def rule(op: str, kind: str, beta: float, alpha: float) -> Rule:
    """The rule of a kind by name; alpha 0 and 1 are the KLs that they tend to."""
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}; got {kind!r}. Correct the name.")
    if kind == "jensen_shannon" and not 0 < beta < 1:
        raise ValueError(
            f"{op}: beta must lie between 0 and 1; got {beta}. What TRL means by beta 0 and 1 is forward_kl and "
            "reverse_kl."
        )
    if kind == "alpha" and not math.isfinite(alpha):
        raise ValueError(f"{op}: alpha must be finite; got {alpha}. 0 is forward_kl, 1 reverse_kl.")
    if kind in ("squared_hellinger", "chi_squared"):
        return Rule(ALPHA, 0.5, 0.25) if kind == "squared_hellinger" else Rule(ALPHA, 2.0, 2.0)
    if kind == "alpha" and alpha in (0, 1):
        return Rule(FORWARD_KL if alpha == 0 else REVERSE_KL, 0.0, 1.0)
    parameter = {"jensen_shannon": beta, "alpha": alpha}.get(kind, 0.0)
    return Rule(KINDS.index(kind), float(parameter), 1.0)


def reference_terms(log_p: Tensor, log_q: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """F, p dF/dp and q dF/dq without the rule's scale, in plain torch; 0 where neither has the token."""
    d = torch.where((log_p == -torch.inf) & (log_q == -torch.inf), 0.0, log_p - log_q)
    p, q, a = log_p.exp(), log_q.exp(), rule.parameter
    if rule.kind == FORWARD_KL:
        value, q_slope, p_slope = _kullback_leibler(q, p, -d)
        return value, p_slope, q_slope
    if rule.kind == REVERSE_KL:
        return _kullback_leibler(p, q, d)
    if rule.kind == TOTAL_VARIATION:
        sign = d.sign() / 2
        gap = torch.where(d.abs() < 1, -torch.maximum(p, q) * torch.expm1(-d.abs()), (p - q).abs())
        return gap / 2, sign * p, -sign * q
    if rule.kind == JENSEN_SHANNON:
        d = d.clamp(-1e30, 1e30)
        part = torch.full_like(d, 1 - a).masked_fill(d >= 0, a)
        log = torch.log1p(part * torch.expm1(-d.abs()))  # of m over the greater of p and q
        over_p, over_q = torch.where(d >= 0, log, log - d), torch.where(d >= 0, log + d, log)
        p_slope, q_slope = -(1 - a) * p * over_p, -a * q * over_q
        near = a * q * (torch.expm1(over_q) - over_q) + (1 - a) * p * (torch.expm1(over_p) - over_p)
        return torch.where(d.abs() < 1, near, p_slope + q_slope), p_slope, q_slope
    power_p, power_q = (a - 1) * d, a * d
    both = torch.where(d >= 0, log_p + power_p, log_q + power_q).exp()
    close_p, close_q = power_p.abs() < 1, power_q.abs() < 1
    p_slope = torch.where(close_p, p * torch.expm1(power_p), both - p) / (a - 1)
    q_slope = torch.where(close_q, -q * torch.expm1(power_q), q - both) / a
    rests = [torch.expm1(x) - x for x in (power_p, -d, power_q, d)]
    near = (p * (rests[0] + (a - 1) * rests[1]) if a > 0.5 else q * (rests[2] - a * rests[3])) / (a * (a - 1))
    far = torch.where(both == torch.inf, both, p_slope + q_slope)
    return torch.where(close_p & close_q & (d.abs() < 1), near, far), p_slope, q_slope


def _kullback_leibler(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite, near = d.clamp_min(-1e30), d.abs() < 1
    value = torch.where(near, p * (torch.expm1(-d) + d), q + p * (finite - 1))
    infinite = d == torch.inf
    less = torch.where(near, p * torch.expm1(-d), q - p)
    return value.masked_fill(infinite, torch.inf), (p * finite).masked_fill(infinite, torch.inf), less


@triton.jit
def near_zero(x, TERMS: tl.constexpr):
    """e^x - 1 and e^x - 1 - x for |x| < 1, each good to its own last digits."""
    p = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(TERMS + 1, 2, -1):
        p = 1.0 + p * x * (1.0 / k)
    rest = 0.5 * x * x * p
    return x + rest, rest


@triton.jit
def _log_one_plus(x, LOG_TERMS: tl.constexpr):
    """log(1 + x) for -1 < x <= 0: 2 atanh(x / (2 + x)), by its series where that is quick."""
    s = x / (2.0 + x)
    z = s * s
    p = tl.full(x.shape, 1.0 / (2 * LOG_TERMS + 1), x.dtype)
    for k in tl.static_range(LOG_TERMS - 1, -1, -1):
        p = p * z + 1.0 / (2 * k + 1)
    return tl.where(x > -0.64, 2.0 * s * p, tl.log(1.0 + x))


@triton.jit
def _triton_kullback_leibler(p, q, d, TERMS: tl.constexpr):
    less_one, rest = near_zero(-d, TERMS)
    close = tl.abs(d) < 1.0
    infinite = d == float("inf")
    finite = tl.where(infinite, 0.0, tl.maximum(d, -1e30))
    value = tl.where(close, p * rest, tl.where(infinite, d, q + p * (finite - 1.0)))
    return value, tl.where(infinite, d, p * finite), tl.where(close, p * less_one, q - p)


@triton.jit
def _triton_jensen_shannon(p, q, d, beta, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr):
    d = tl.minimum(tl.maximum(d, -1e30), 1e30)
    size = tl.abs(d)
    less_one, _ = near_zero(-size, TERMS)
    less_one = tl.where(size < 1.0, less_one, tl.exp(-size) - 1.0)
    log = _log_one_plus(tl.where(d >= 0, beta, 1.0 - beta) * less_one, LOG_TERMS)
    over_p, over_q = tl.where(d >= 0, log, log - d), tl.where(d >= 0, log + d, log)
    p_slope, q_slope = (beta - 1.0) * p * over_p, -beta * q * over_q
    _, rest_p = near_zero(over_p, TERMS)
    _, rest_q = near_zero(over_q, TERMS)
    near = beta * q * rest_q + (1.0 - beta) * p * rest_p
    return tl.where(size < 1.0, near, p_slope + q_slope), p_slope, q_slope


@triton.jit
def _triton_alpha(p, q, log_p, log_q, d, a, TERMS: tl.constexpr):
    b = 1.0 - a
    power_p, power_q = -b * d, a * d
    both = tl.exp(tl.where(d >= 0, log_p + power_p, log_q + power_q))
    less_p, rest_p = near_zero(power_p, TERMS)
    less_q, rest_q = near_zero(power_q, TERMS)
    close_p, close_q = tl.abs(power_p) < 1.0, tl.abs(power_q) < 1.0
    p_slope = tl.where(close_p, p * less_p, both - p) / -b
    q_slope = tl.where(close_q, q * less_q, both - q) / -a
    _, rest_down = near_zero(-d, TERMS)
    _, rest_up = near_zero(d, TERMS)
    near = tl.where(a > 0.5, p * (rest_p - b * rest_down), q * (rest_q - a * rest_up)) / (-a * b)
    far = tl.where(both == float("inf"), both, p_slope + q_slope)
    return tl.where(close_p & close_q & (tl.abs(d) < 1.0), near, far), p_slope, q_slope


@triton.jit
def triton_terms(
    p, q, log_p, log_q, d, parameter, KIND: tl.constexpr, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr
):  # fmt: skip
    """As `reference_terms`; KIND 0 to 4 in the order of KINDS, and d as it is known best."""
    if KIND == 0:
        value, q_slope, p_slope = _triton_kullback_leibler(q, p, -d, TERMS)
    elif KIND == 1:
        value, p_slope, q_slope = _triton_kullback_leibler(p, q, d, TERMS)
    elif KIND == 2:
        value, p_slope, q_slope = _triton_jensen_shannon(p, q, d, parameter, TERMS, LOG_TERMS)
    elif KIND == 3:
        value, p_slope, q_slope = _triton_alpha(p, q, log_p, log_q, d, parameter, TERMS)
    else:
        less_one, _ = near_zero(-tl.abs(d), TERMS)
        value = 0.5 * tl.where(tl.abs(d) < 1.0, -tl.maximum(p, q) * less_one, tl.abs(p - q))
        sign = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0))
        p_slope, q_slope = sign * p, -sign * q
    return value, p_slope, q_slope
