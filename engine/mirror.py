"""Mirror descent on policies (MDPO, arXiv:2005.09814): a linearised objective and a proximity term that grows.

    on-policy    mean over (s, a) ~ pi_k of -ratio A + KL(pi || pi_k)(s) / t_k
    off-policy   mean over s ~ replay, a ~ pi of kappa log pi(a|s) + (lam - kappa) log pi_k(a|s) - Q(s, a)

The first has the solution pi_{k + 1} = pi_k e^{t_k A} / Z; the second, with lam = kappa, is SAC's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, require
from fuserl.engine.importance import Importance
from fuserl.engine.losses import Loss, clipped, token_mean


def annealed(total: int) -> Callable:
    """t_k = 1 - (k - 1) / total for turn k = 1, 2, ... of the loop, at least 1 / total: (Batch) -> a number."""
    require("annealed", "total", total, total >= 1, "a number of turns >= 1")
    return lambda batch: max(1.0 - (batch.step - 1) / total, 1.0 / total)


def constant(t: float) -> Callable:
    """The same step size at every turn: (Batch) -> a number."""
    require("constant", "t", t, 0 < t < math.inf, "a finite number > 0")
    return lambda _batch: t


def proximal(*, t: Callable, importance: Importance | None = None, reduce: Callable = token_mean) -> Loss:
    """-ratio A + KL(pi || pi_k) / t, without a clip; pi_k is the teacher, the policy as it was when the update started.

    Args:
        t: (Batch) -> the step size of this turn.
        importance, reduce: as of `clipped`.
    """
    surrogate = clipped(low=math.inf, high=math.inf, importance=importance, reduce=reduce)

    def loss(out, batch: Batch):
        each, statistics = surrogate(out, batch)
        return each + out.reverse_kl * reduce(batch) / t(batch), {**statistics, "proximity": out.reverse_kl}

    return Loss(
        loss,
        outputs=("logprob", "reverse_kl"),
        scope=surrogate.scope,
        weighed=None if importance else lambda given: proximal(t=t, importance=given, reduce=reduce),
    )


def tsallis(logprob: Tensor, q: float) -> Tensor:
    """log_q of a probability, (x^(1 - q) - 1) / (1 - q); the logarithm itself where q is 1."""
    return logprob if q == 1 else torch.expm1((1 - q) * logprob) / (1 - q)


def replayed(
    logprob: Tensor, old_logprob: Tensor, value: Tensor, *, kappa: float = 1.0, lam: float = 0.2, q: float = 1.0
) -> Tensor:
    """The loss of reparameterised actions at states of a replay, (n,): kappa log_q pi + (lam - kappa) log_q pi_k - Q.

    Args:
        logprob: (n,), log pi(a|s), with its graph, as a's.
        old_logprob: (n,), log pi_k(a|s) of the same actions; pi_k is a frozen copy that is renewed every m steps.
        value: (n,), Q(s, a), with the action's graph.
        kappa: 1 / t, weight of the proximity term.
        lam: weight of the entropy; 0 leaves the proximity alone, kappa is SAC.
        q: of the Tsallis logarithm; 1 is the natural one.
    """
    for name, weight in (("kappa", kappa), ("lam", lam)):
        require("replayed", name, weight, 0 <= weight < math.inf, WEIGHT)
    held = 0.0 if lam == kappa else (lam - kappa) * tsallis(old_logprob, q)
    return kappa * tsallis(logprob, q) + held - value


def small(mean: Tensor, log_std: Tensor, weight: float = 1e-3) -> Tensor:
    """What the paper's code adds to the off-policy loss: weight (mean^2 + log_std^2), over dimensions, (n,)."""
    return weight * (mean.square() + log_std.square()).mean(-1)
