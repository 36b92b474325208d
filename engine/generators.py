"""Divergence of a policy from the one that drew the tokens, kept as ref_logprobs: losses by a generator of their ratio.

    u = exp(d), d = logprob - ref_logprob; the mean of f(u) over samples of the reference is the divergence
    kind                        f(u)                                                d f / d logprob
    forward                     u - 1 - log u                                       u - 1
    jensen_shannon              u log u - (u + 1) log((u + 1) / 2)                  u log(2u / (u + 1))
    alpha                       (u^(1 - a) - (1 - a) u - a) / (a (a - 1))           (u - u^(1 - a)) / a
    reverse                     u log u - u + 1                                     u log u
    jensen_shannon_definition   (u - 1) / 2 - log((1 + u) / 2)                      u / 2 - u / (1 + u)

The last is k3 of KL(reference || mean of both), one half of twice a Jensen-Shannon divergence; `towards_mean` is the
other, of samples of the policy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, require, require_one_of
from fuserl.engine.losses import Loss, token_mean
from fuserl.kernels.sampled_divergence import sampled_divergence

KINDS = ("forward", "jensen_shannon", "alpha", "reverse", "jensen_shannon_definition")
_EXPONENT, _VALUE = 20.0, 10.0  # bounds of the forward one and of k3, beyond which there is no gradient


def generated(kind: str, *, eta: float, alpha: float = 0.2, reduce: Callable = token_mean) -> Loss:
    """eta f(u) of tokens that the reference drew, whose log-probs there the batch holds as ref_logprobs.

    Args:
        kind: one of KINDS.
        eta: the weight.
        alpha: a of alpha, neither 0 nor 1.
        reduce: weights of tokens.

    Source: DPH-RL (arXiv:2509.07430). The forward one and the definition hold the exponent to 20 and values to 10.
    """
    require_one_of("generated", "kind", kind, KINDS)
    require("generated", "eta", eta, 0 <= eta < math.inf, WEIGHT)
    require("generated", "alpha", alpha, math.isfinite(alpha) and alpha not in (0, 1), "a number other than 0 and 1")
    of_reference = {
        "forward": ("forward_kl", 1.0, {"clamp": _EXPONENT}),
        "jensen_shannon": ("jensen_shannon", 2.0, {}),
        "alpha": ("alpha", 1.0, {"alpha": 1 - alpha}),
        "reverse": ("reverse_kl", 1.0, {}),
    }

    def loss(out, batch: Batch):
        if kind in of_reference:
            name, scale, given = of_reference[kind]
            value = scale * sampled_divergence(out.logprob, batch.ref_logprobs, name, **given)
        else:
            value = _k3(_to_mean(out.logprob - batch.ref_logprobs))
        if kind in ("forward", "jensen_shannon_definition"):
            value = value.clamp(-_VALUE, _VALUE)
        return eta * value * reduce(batch), {"rehearsal": value}

    return Loss(loss, live=lambda batch: None if eta else torch.zeros(batch.tokens.shape, dtype=torch.bool))


def towards_mean(*, eta: float, when: Callable = lambda step: True, reduce: Callable = token_mean) -> Loss:
    """eta times k3 of KL(policy || mean of both) of tokens that the policy drew, in the steps `when(step)`.

    k3 = e^r - 1 - r with r = log((1 + e^-d) / 2).
    """
    require("towards_mean", "eta", eta, 0 <= eta < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        value = _k3(_to_mean(batch.ref_logprobs - out.logprob)).clamp(-_VALUE, _VALUE)
        return (eta if when(batch.step) else 0.0) * value * reduce(batch), {"towards_mean": value}

    def live(batch: Batch):
        return None if eta and when(batch.step) else torch.zeros(batch.tokens.shape, dtype=torch.bool)

    return Loss(loss, live=live, reads=("ref_logprobs",))


def by_chance(mean_share: float, seed: int) -> Callable:
    """(step) -> whether, drawn by the seed with the probability `mean_share`."""
    require("by_chance", "mean_share", mean_share, 0 <= mean_share <= 1, "in [0, 1]")
    return lambda step: random.Random(f"{seed} {step}").random() < mean_share


def _to_mean(d: Tensor) -> Tensor:
    """log((1 + e^d) / 2): from one log-prob to that of the mean of both, held to the exponent's bound."""
    return (torch.nn.functional.softplus(d) - math.log(2)).clamp(-_EXPONENT, _EXPONENT)


def _k3(r: Tensor) -> Tensor:
    return torch.expm1(r) - r
