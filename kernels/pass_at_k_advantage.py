"""Advantage of each rollout for the best of k of its group: pass@k for rewards of 0 and 1, max@k for any.

    A[b] = U[b] - M,   U[b] = mean of the best reward over the k-subsets of the group with b in them,   M = over all

The members sorted, r[0] the best of n, one of the other k - 1 is the best of them at place j with probability
    a[j] = C(n - 2 - j, k - 2) / C(n - 1, k - 1),   and of any k with   w[j] = C(n - 1 - j, k - 1) / C(n, k)
so that U[b] = sum over better j of a[j] r[j] + (1 - sum of those a[j]) r[b] and M = sum of w[j] r[j]. Each follows from
the one before by a factor: linear scans along the groups, without a factorial and without a wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.group_ranks import Ordered, check_grouped
from fuserl.kernels.registration import register

__all__ = ["pass_at_k_advantage"]

BASELINES = (None, "mean", "leave_one_out", "rest")
SCALES = (None, "group", "best")


def reference(
    rewards: Tensor, group: Tensor, k: int, baseline: int, scale: int, eps: float, *, backend: str = "reference"
) -> Tensor:
    """The definition, in plain torch but for the scans, which `backend` runs; places in BASELINES and in SCALES."""
    x = Ordered.of(rewards, group)
    top = x.rewards[x.begin]
    below = x.rewards - top  # equal rewards are exact zeros, whatever is summed
    n, tries = x.size.double(), x.size.clamp(max=k).double()
    with_it = _with_it(x, below, n, tries, backend)
    best, std = _best(x, below, n, tries, backend)
    above = (
        lambda: with_it + top,
        lambda: with_it - best,
        lambda: torch.where(n > tries, (with_it - best) * n / (n - tries).clamp(min=1), 0 * with_it),
        lambda: _lead(x, below, n, tries, backend),
    )[baseline]()
    if SCALES[scale] == "group":
        mean = x.total(below, backend) / n
        std = (x.total((below - mean).square(), backend) / (n - 1).clamp(min=1)).sqrt()
    if SCALES[scale] is not None:
        above = torch.where(std == 0, 0.0, above / (std + eps))
    return above.to(rewards.dtype)[x.inverse]


def _triton(*arguments):
    return reference(*arguments, backend="triton")


def _cpu(rewards, group, *rule):
    from fuserl import _C

    out = torch.empty_like(rewards)
    _C.pass_at_k_advantage(rewards, group, out, *rule)
    return out


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": reference}


def _dispatch(rewards, group, *rule):
    *rule, backend = rule
    backend = choose("pass_at_k_advantage", IMPLS, rewards.device, backend)
    return IMPLS[backend](rewards.contiguous(), group.contiguous(), *rule) if len(rewards) else rewards.clone()


def _fake(rewards, *_):
    return rewards.new_empty(rewards.shape)


_pass_at_k_advantage = register(
    "pass_at_k_advantage(Tensor rewards, Tensor group, int k, int baseline, int scale, float eps, str? backend)"
    " -> Tensor",
    _dispatch,
    _fake,
)


def pass_at_k_advantage(
    rewards: Tensor, group: Tensor, k: int, *, baseline: str | None = "mean", scale: str | None = None,
    eps: float = 1e-6, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Advantage of each rollout for the best reward of k tries, exact over all k-subsets of its group.

        A = (mean over k-subsets with it of the best reward - baseline) / scale

    k A averaged over the rollouts is an unbiased estimate of the gradient of the expected best of k, but for "mean",
    whose advantage is (n - k) / n of that of "leave_one_out".

    Args:
        rewards: (B,) float32 or float64; 0 and 1 for pass@k.
        group: (B,) int64 in [0, B): equal for rollouts of one prompt, in any order. On CPU an id outside raises; on
            GPU, where a check would wait, it gives wrong numbers.
        k: tries, at least 1; of a group with fewer members all are taken.
        baseline: the "mean" over all k-subsets; "leave_one_out", over those without the rollout, 0 where there are
            none; "rest", the best of the subset without the rollout, for k of at least 2; None for 0.
        scale: standard deviation of the "group"'s rewards (n - 1 under the root), or of the "best" of k, plus eps; None
            to leave the scale.
        eps: added to the standard deviation.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (B,) of rewards' dtype, without gradient. A group without spread gets exact zeros unless baseline and scale are
        None. NaN shows in its group.

    Raises:
        ValueError: on a wrong shape, dtype, device, number, name or group id.

    Memory: a few float64 per rollout. Source: "leave_one_out" and "rest" are PKPO (arXiv:2505.15201); "mean" with scale
    "best" is Pass@k Training (2508.10751); "rest" with k = n rewards the best alone, by its lead (2503.19595).
    Sibling: `group_advantage`, which this is at k = 1 for "mean" and "leave_one_out".
    """
    check_grouped("pass_at_k_advantage", rewards, group)
    _check_choice(k, baseline, scale)
    codes = BASELINES.index(baseline), SCALES.index(scale)
    return _pass_at_k_advantage(rewards, group, k, *codes, eps, backend)


def _check_choice(k: int, baseline: str | None, scale: str | None) -> None:
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(
            f"pass_at_k_advantage: baseline must be one of {list(BASELINES)} and scale one of {list(SCALES)}; got "
            f"{baseline!r} and {scale!r}. Correct the name."
        )
    if k < 1 + (baseline == "rest"):
        raise ValueError(
            f"pass_at_k_advantage: k must be at least 1, or 2 for the baseline 'rest'; got {k}. Give a number of tries."
        )


def _others(x, n, tries, backend):
    """a[j] at each place."""
    start = torch.where(x.place == 0, (tries - 1) / (n - 1).clamp(min=1), 0.0)
    ratio = (n - tries - x.place).clamp(min=0) / (n - 2 - x.place).clamp(min=1)
    return x.scan(start, ratio, forward=True, backend=backend)


def _with_it(x, below, n, tries, backend):
    """U of each, less the best reward of the group."""
    a = _others(x, n, tries, backend)
    better = x.scan(torch.stack([a * below, a]), forward=True, exclusive=True, backend=backend)[:, x.first]
    return better[0] + below * (1 - better[1])


def _best(x, below, n, tries, backend):
    """M, less the best reward of the group, and the standard deviation of the best of k."""
    ratio = (n - tries - x.place).clamp(min=0) / (n - 1 - x.place).clamp(min=1)
    w = x.scan(torch.where(x.place == 0, tries / n, 0.0), ratio, forward=True, backend=backend)
    mean = x.total(w * below, backend)
    return mean, x.total(w * (below - mean).square(), backend).sqrt()


def _lead(x, below, n, tries, backend):
    """Mean over the k-subsets with it of how far it is above the best of the others, 0 where it is not."""
    a = _others(x, n, tries, backend).roll(1)  # without the rollout, the worse ones move up by a place
    worse = x.scan(torch.stack([a * below, a]), exclusive=True, backend=backend)[:, x.last]
    nan = 0 * below[x.begin]
    return below * worse[1] - worse[0] + nan
