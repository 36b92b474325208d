"""Advantage of each rollout over the others of its group.

    A[b] = (rewards[b] - baseline[b]) / (scale[b] + eps)

baseline: the mean of the group, or of its other members; scale: the standard deviation of the group or of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose

__all__ = ["group_advantage"]

BASELINES = {None: 0, "mean": 1, "leave_one_out": 2}
SCALES = {None: 0, "group": 1, "batch": 2}


def reference(rewards: Tensor, group: Tensor, baseline: int, scale: int, ddof: int, eps: float) -> Tensor:
    """The definition, in plain torch, in float64."""
    r, zeros = rewards.double(), rewards.new_zeros(len(rewards), dtype=torch.float64)
    count = zeros.index_add(0, group, torch.ones_like(r))[group]
    mean = zeros.index_add(0, group, r)[group] / count
    deviation = zeros.index_add(0, group, (r - mean).square())[group]
    least, most = (zeros.scatter_reduce(0, group, r, kind, include_self=False)[group] for kind in ("amin", "amax"))
    others = (mean * count - r) / (count - 1)
    centred = r - (zeros, mean, others)[baseline]
    std = (
        zeros + 1 - eps,
        (deviation / (count - ddof)).sqrt(),
        (r - r.mean()).square().sum().div(len(r) - ddof).sqrt(),
    )
    flat = least == most if baseline or scale == 1 else (r.min() == r.max()).expand_as(r) & (scale == 2)
    return torch.where(flat, 0.0, centred / (std[scale] + eps)).to(rewards.dtype)


def _cpu(rewards, group, baseline, scale, ddof, eps):
    from fuserl import _C

    out = torch.empty_like(rewards)
    _C.group_advantage(rewards, group, out, baseline, scale, ddof, eps)
    return out


def _cuda(rewards, group, baseline, scale, ddof, eps):
    from fuserl import _cuda

    out = torch.empty_like(rewards)
    stream = torch.cuda.current_stream(rewards.device).cuda_stream
    _cuda.group_advantage(rewards, group, out, baseline, scale, ddof, eps, stream)
    return out


IMPLS = {"cuda": _cuda, "cpu": _cpu, "reference": reference}


def _dispatch(rewards, group, baseline, scale, ddof, eps, backend):
    rewards, group = rewards.contiguous(), group.contiguous()
    name = choose("group_advantage", IMPLS, rewards.device, backend)
    return IMPLS[name](rewards, group, baseline, scale, ddof, eps)


_library = torch.library.Library("fuserl", "FRAGMENT")
_library.define(
    "group_advantage(Tensor rewards, Tensor group, int baseline, int scale, int ddof, float eps, str? backend)"
    " -> Tensor"
)
_library.impl("group_advantage", _dispatch, "CompositeExplicitAutograd")


@torch.library.register_fake("fuserl::group_advantage", lib=_library)
def _fake(rewards, *_):
    return torch.empty_like(rewards)


def group_advantage(
    rewards: Tensor,
    group: Tensor,
    *,
    baseline: str | None = "mean",
    scale: str | None = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Advantage of each rollout over its group, for groups of any sizes in any order, without a wait for the device.

        A = (rewards - baseline) / (scale + eps)

    Args:
        rewards: (B,) float32 or float64.
        group: (B,) int64 in [0, B): equal for rollouts of one prompt. On CPU an id outside raises; on GPU, where a
            check would wait, its advantage is NaN.
        baseline: "mean" of the group, "leave_one_out" mean of the other members, or None.
        scale: "group" or "batch" standard deviation of the rewards, or None to leave the scale.
        ddof: subtracted from the count under the standard deviation's square root.
        eps: added to the standard deviation.
        backend: "cuda", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (B,) advantages of rewards' dtype; no gradient. A group without spread (equal rewards, or one member) gets exact
        zeros, unless baseline is None and scale is not "group": then r, or r / (batch std + eps).

    Raises:
        ValueError: on a wrong shape, dtype, name or group id.

    Source: GRPO (arXiv:2402.03300, eq. 3) by default; scale=None is Dr. GRPO (2503.20783); leave_one_out with
    scale=None is RLOO (2402.14740).
    """
    if rewards.dim() != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"group_advantage: rewards must be (B,) float32 or float64; got {tuple(rewards.shape)} {rewards.dtype}. "
            "Give one number per rollout."
        )
    if group.shape != rewards.shape or group.dtype != torch.int64 or group.device != rewards.device:
        raise ValueError(
            f"group_advantage: group must be ({len(rewards)},) int64 on {rewards.device}; got {tuple(group.shape)} "
            f"{group.dtype} on {group.device}. Number the prompts and give each rollout its prompt's number."
        )
    if baseline not in BASELINES or scale not in SCALES:
        raise ValueError(
            f"group_advantage: baseline must be one of {list(BASELINES)} and scale one of {list(SCALES)}; got "
            f"{baseline!r} and {scale!r}."
        )
    return torch.ops.fuserl.group_advantage(rewards, group, BASELINES[baseline], SCALES[scale], ddof, eps, backend)
