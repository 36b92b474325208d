"""Advantage of each rollout over the others of its group.

    A[b] = (rewards[b] - baseline[b]) / scale[b]

baseline: a mean of the group, of its other members or of the batch, or given; scale: a standard deviation (+ eps) of
the group or the batch, |rewards - baseline| itself, or given. With weights w[b] a group's mean and variance are
    mean = sum w r / W,   var = sum w (r - mean)^2 / (W - ddof sum w^2 / W),   W = sum w
which for equal weights are the plain ones. Several channels of rewards are each normalised alone, then added up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register

__all__ = ["group_advantage"]

BASELINES = {None: 0, "mean": 1, "leave_one_out": 2, "batch_mean": 3}
SCALES = {None: 0, "group": 1, "batch": 2, "sign": 3}
KEEP = {None: 0, "positive": 1, "negative": 2}
TENSORS = ("rewards", "group", "rounds", "weights", "baselines", "scales", "channel_weights")
RULE = ("members", "baseline", "scale", "keep", "given_baseline", "given_scale", "ddof", "eps")


def reference(tensors: tuple, rule: tuple) -> Tensor:
    """The definition, in plain torch, in float64; TENSORS and RULE name what is in the two."""
    rewards, group, rounds, weights, baselines, scales, channel_weights = tensors
    members, baseline, scale, keep, given_baseline, given_scale, ddof, eps = rule
    r = rewards.double()
    w = torch.ones_like(r) if weights is None else weights.double()
    id = torch.arange(len(r), device=r.device) // members if group is None else group
    if rounds is not None:
        id = torch.stack([id, rounds]).unique(dim=1, return_inverse=True)[1]
    own = _Moments(r, w, id, ddof)
    everyone = _Moments(r, w, torch.zeros_like(id), ddof)
    centre = (
        r.new_full((), given_baseline) if baselines is None else baselines,
        own.mean,
        torch.where(own.spread, (own.sum - own.part) / (own.weight - w), own.mean),
        everyone.mean,
    )[baseline]
    above = torch.where((own.weight, everyone.weight)[baseline == 3] == 0, 0.0, r - centre) if baseline else r - centre
    found = (
        lambda: above / (given_scale if scales is None else scales),
        lambda: torch.where(own.spread, above / (own.std + eps), 0.0),
        lambda: torch.where(everyone.spread, above / (everyone.std + eps), 0.0),
        lambda: torch.where(above.isnan(), above, above.sign()),
    )[scale]()
    found = torch.where((w == 0) & r.isnan(), 0.0, found)
    if channel_weights is not None:
        found = (channel_weights.double() * found).sum(1)
    drop = (found.new_zeros((), dtype=torch.bool), found < 0, found > 0)[keep]
    return torch.where(drop, 0.0, found).to(rewards.dtype)


class _Moments:
    """Statistics of the group of each rollout, in the shape of the rewards."""

    def __init__(self, r, w, id, ddof):
        def over_group(x):
            return torch.zeros_like(x).index_add(0, id, x)[id]

        def extreme(x, kind):
            index = id if x.dim() == 1 else id[:, None].expand(x.shape)
            return torch.zeros_like(x).scatter_reduce(0, index, x, kind, include_self=False)[id]

        counts = w != 0
        self.part = torch.where(counts, w * r, 0.0)
        self.weight, self.sum = over_group(w), over_group(self.part)
        least = extreme(torch.where(counts, r, torch.inf), "amin")
        most = extreme(torch.where(counts, r, -torch.inf), "amax")
        self.spread = (least < most) | self.sum.isnan()
        self.mean = torch.where(self.spread, self.sum / self.weight, least)
        deviation = over_group(torch.where(counts, w * (r - self.mean).square(), 0.0))
        self.std = (deviation / (self.weight - ddof * over_group(w * w) / self.weight)).sqrt()


def _cpu(tensors, rule):
    from fuserl import _C

    out = _like(tensors)
    _C.group_advantage(*tensors, out, *rule)
    return out


def _cuda(tensors, rule):
    from fuserl import _cuda

    out = _like(tensors)
    _cuda.group_advantage(*tensors, out, *rule, torch.cuda.current_stream(out.device).cuda_stream)
    return out


def _like(tensors):
    rewards, channel_weights = tensors[0], tensors[-1]
    return torch.empty_like(rewards) if channel_weights is None else rewards.new_empty(len(rewards))


IMPLS = {"cuda": _cuda, "cpu": _cpu, "reference": reference}


def _dispatch(*arguments):
    *rule, backend = arguments[len(TENSORS) :]
    tensors = [None if x is None else x.contiguous() for x in arguments[: len(TENSORS)]]
    return IMPLS[choose("group_advantage", IMPLS, tensors[0].device, backend)](tensors, rule)


def _fake(*arguments):
    return _like(arguments[: len(TENSORS)]).contiguous()


_group_advantage = register(
    "group_advantage(Tensor rewards, Tensor? group, Tensor? rounds, Tensor? weights, Tensor? baselines, Tensor? scales,"
    " Tensor? channel_weights, SymInt members, int baseline, int scale, int keep, float given_baseline,"
    " float given_scale, int ddof, float eps, str? backend) -> Tensor",
    _dispatch,
    _fake,
)


def group_advantage(
    rewards: Tensor, group: Tensor | None = None, *, baseline: str | float | Tensor | None = "mean",
    scale: str | float | Tensor | None = "group", weights: Tensor | None = None, rounds: Tensor | None = None,
    channel_weights: Tensor | None = None, keep: str | None = None, ddof: int = 1, eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Advantage of each rollout over its group, for groups of any sizes in any order, without a wait for the device.

        A = (rewards - baseline) / scale

    Args:
        rewards: (B,) float32 or float64, or (B, C), C channels that are normalised apart. Without `group`, (G, K) or
            (G, K, C): a row is a group.
        group: (B,) int64 in [0, B): equal for rollouts of one prompt. On CPU an id outside raises; on GPU, where a
            check would wait, its advantage is NaN.
        baseline: "mean" of the group, "leave_one_out" mean of the other members, "batch_mean" of all; a number or a
            tensor as `weights` to take off as it is; or None for 0.
        scale: "group" or "batch" standard deviation of the rewards, plus eps; "sign" for advantages of -1, 0 and +1; a
            number or a tensor as `weights` to divide by as it is; or None for 1.
        weights: (B,) or of rewards' shape, >= 0: what each reward counts in means and deviations (numpy.cov's
            `aweights`); with weight 0 a rollout is measured by the others, and has advantage 0 if its reward is NaN.
        rounds: (B,) int64: only rollouts of the same group and round are compared.
        channel_weights: (C,): the advantage is the channels' weighted sum; None to get each channel's.
        keep: "positive" or "negative" advantages, the others being 0; None for all.
        ddof: subtracted from the count under the standard deviation's square root, 0 or 1.
        eps: added to a standard deviation.
        backend: "cuda", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        Advantages of rewards' shape and dtype, without the last dimension under `channel_weights`; no gradient. A group
        without spread (equal rewards, or one member) gets exact zeros where its own mean or deviation is asked for. NaN
        in a reward shows in its group.

    Raises:
        ValueError: on a wrong shape, dtype, name or group id.

    Source: GRPO (arXiv:2402.03300, eq. 3) by default; scale=None is Dr. GRPO (2503.20783); leave_one_out with
    scale=None is RLOO (2402.14740); weights=lengths with scale=None is OPO (2505.23585); channels with their weights,
    and "batch_mean" over "batch" after, are GDPO (2601.05242).
    Siblings: `group_ranks`, `pass_at_k_advantage`, `pair_advantage`.
    """
    flat, members, rollouts = (rewards, 0, rewards.shape[:1]) if group is not None else _rows(rewards)
    _check(rewards, group)
    if rounds is not None:
        rounds = _whole("rounds", rounds, rewards, rollouts).flatten()
    if weights is not None:
        weights = _per_reward("weights", weights, rewards, rollouts)
    if channel_weights is not None:
        _check_channels(channel_weights, flat)
    baseline_code, baselines, given_baseline = _choice("baseline", baseline, BASELINES, rewards, rollouts)
    scale_code, scales, given_scale = _choice("scale", scale, SCALES, rewards, rollouts)
    if keep not in KEEP:
        raise ValueError(f"group_advantage: keep must be one of {list(KEEP)}; got {keep!r}. Correct the name.")
    found = _group_advantage(
        flat, group, rounds, weights, baselines, scales, channel_weights, members,
        baseline_code, scale_code, KEEP[keep], given_baseline, given_scale, ddof, eps, backend,
    )  # fmt: skip
    if group is not None:
        return found
    return found.view(rewards.shape if channel_weights is None else rollouts)


def _rows(rewards):
    """Rewards of rows of K, one after the other; K; and the shape of the rollouts."""
    if rewards.dim() not in (2, 3):
        raise ValueError(
            f"group_advantage: group must be given unless rewards are (G, K) or (G, K, C); got None and "
            f"{tuple(rewards.shape)}. Number the prompts and give each rollout its prompt's number."
        )
    return rewards.flatten(0, 1), max(rewards.shape[1], 1), rewards.shape[:2]


def _check(rewards, group):
    if rewards.dim() - (group is None) not in (1, 2) or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"group_advantage: rewards must be (B,) or (B, C) float32 or float64; got {tuple(rewards.shape)} "
            f"{rewards.dtype}. Give one number per rollout, or one per channel."
        )
    if group is None:
        return
    if group.dim() != 1 or len(group) != len(rewards) or group.dtype != torch.int64 or group.device != rewards.device:
        raise ValueError(
            f"group_advantage: group must be ({len(rewards)},) int64 on {rewards.device}; got {tuple(group.shape)} "
            f"{group.dtype} on {group.device}. Number the prompts and give each rollout its prompt's number."
        )


def _whole(name, x, rewards, rollouts):
    if x.shape != rollouts or x.dtype != torch.int64 or x.device != rewards.device:
        raise ValueError(
            f"group_advantage: {name} must be {tuple(rollouts)} int64 on {rewards.device}; got {tuple(x.shape)} "
            f"{x.dtype} on {x.device}. Give one whole number per rollout."
        )
    return x


def _per_reward(name, x, rewards, rollouts):
    """One number per reward out of that, or of one per rollout, in the shape that the op takes."""
    if x.shape not in (rollouts, rewards.shape) or x.dtype != rewards.dtype or x.device != rewards.device:
        raise ValueError(
            f"group_advantage: {name} must be {tuple(rollouts)} or {tuple(rewards.shape)} {rewards.dtype} on "
            f"{rewards.device}; got {tuple(x.shape)} {x.dtype} on {x.device}. Give one number per rollout or reward."
        )
    x = x if x.shape == rewards.shape else x[..., None].expand(rewards.shape)
    return x.flatten(0, len(rollouts) - 1)


def _check_channels(channel_weights, flat):
    if flat.dim() != 2 or flat.shape[1] == 0:
        raise ValueError(
            f"group_advantage: rewards must have a last dimension of channels where channel_weights are given; got "
            f"{tuple(flat.shape)}. Leave channel_weights out."
        )
    x, there = channel_weights, flat.device
    if x.shape != flat.shape[1:] or x.dtype != flat.dtype or x.device != there:
        raise ValueError(
            f"group_advantage: channel_weights must be ({flat.shape[1]},) {flat.dtype} on {there}; got "
            f"{tuple(x.shape)} {x.dtype} on {x.device}. Give one number per channel."
        )


def _choice(name, value, codes, rewards, rollouts):
    """What is asked for, as the op takes it: (code, given tensor or None, given number)."""
    if isinstance(value, Tensor):
        return 0, _per_reward(name, value, rewards, rollouts), 0.0
    if value in codes:
        return codes[value], None, float(codes is SCALES)
    if isinstance(value, int | float) and math.isfinite(value):
        return 0, None, float(value)
    raise ValueError(
        f"group_advantage: {name} must be one of {list(codes)}, a finite number or a tensor; got {value!r}. "
        "Correct the name."
    )
