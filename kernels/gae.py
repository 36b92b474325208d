"""Generalised advantage estimation of every token, fused: temporal differences, their scan and the returns in one pass.

    delta      = rewards + gamma V' - values        A = delta + gamma lam A'        returns = A + values

V' and A' are those of the segment's next token that the mask keeps; beyond its last one A' = 0 and V' = bootstrap.

With s the forward scan (link gamma lam) of dL/dA + dL/dreturns, and s', gamma' those of the token before:

    dL/drewards = s        dL/dvalues = dL/dreturns - s + gamma' s'        dL/dbootstrap = gamma s at the last token
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.discounted_scan import checked, discounted_scan, flat, split
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register
from fuserl.kernels.returns import bootstrap_rows, next_values
from fuserl.kernels.scan_tiles import launch

__all__ = ["gae"]


def reference(
    rewards: Tensor,
    values: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    backend: str | None = "reference",
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch, on (C, N), and what autograd goes through; `backend` is its scan's."""
    delta = rewards + gamma * next_values(values, bootstrap, mask, offsets, backend) - values
    scan = dict(offsets=offsets, mask=mask, backend=backend)
    advantages = discounted_scan(delta, gamma * lam, **scan)
    returns = advantages + values
    return advantages, returns if mask is None else torch.where(mask, returns, 0.0)


def _triton(rewards, values, gamma, lam, *others):
    bootstrap, mask, offsets, gamma_of_all, lam_of_all = others
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    tensors = {
        "b": rewards, "value": values, "gamma": gamma, "lam": lam, "bootstrap": bootstrap, "mask": mask,
        "offsets": offsets, "x": advantages, "returns": returns,
    }  # fmt: skip
    launch(tensors, gamma=gamma_of_all, lam=lam_of_all)
    return advantages, returns


def _cpu(rewards, *others):
    from fuserl import _C

    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _C.gae(rewards, *others, advantages, returns, torch.get_num_threads())
    return advantages, returns


def _reference(rewards, values, gamma, lam, *others):
    *others, gamma_of_all, lam_of_all = others
    gamma, lam = gamma_of_all if gamma is None else gamma, lam_of_all if lam is None else lam
    return reference(rewards, values, gamma, lam, *others)


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": _reference}


def _dispatch(rewards, *arguments):
    *tensors, gamma, lam, backend = arguments
    backend = choose("gae", IMPLS, rewards.device, backend)
    if rewards.numel() == 0:
        return _fake(rewards)
    tensors = [None if x is None else x.contiguous() for x in (rewards, *tensors)]
    return IMPLS[backend](*tensors, gamma, lam)


def _fake(rewards, *_):
    return tuple(torch.empty_like(rewards, memory_format=torch.contiguous_format) for _ in range(2))


_gae = register(
    "gae(Tensor rewards, Tensor values, Tensor? gamma, Tensor? lam, Tensor? bootstrap, Tensor? mask, Tensor? offsets, "
    "float gamma_of_all, float lam_of_all, str? backend) -> (Tensor, Tensor)",
    _dispatch,
    _fake,
)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage of every token and the return that its value should have had.

        delta[t] = rewards[t] + gamma values[t + 1] - values[t]
        advantages[t] = delta[t] + gamma lam advantages[t + 1]        returns = advantages + values

    Args:
        rewards: (..., N) float32 or float64, tokens of all segments one after the other; leading dimensions are
            channels (a reward and its costs, say). Without offsets (..., T): every row is a segment.
        values: of rewards' shape: the value before each token.
        gamma: discount of what comes after a token: a number, or per token. 0 where an episode ends inside a segment.
        lam: 0 trusts the values, 1 the rewards: a number, or per token.
        offsets: (B + 1,) int64, where each segment begins, and N at the end; the same for all channels. Segments may be
            empty. On GPU, where a check would wait, wrong ones give wrong numbers.
        mask: bool, broadcasting to rewards' shape; a False token (padding, a tool's output) is passed over: its
            neighbours are each other's, its outputs are 0, and its inputs may be anything.
        bootstrap: (..., B), or (...) without offsets: the value after each segment's last token, where it was cut off;
            None for segments that end.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (advantages, returns) of rewards' shape and dtype. Differentiable in all tensors, in a few passes instead of
        one: give detached ones where no gradient is wanted.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Macro steps (MA-RLHF): `steps` (M + 1,), where each run of tokens begins, take the place of tokens:

        rewards, values = segment_mean(rewards, steps), segment_mean(values, steps)
        advantages, returns = gae(rewards, values, offsets=torch.searchsorted(steps, offsets), gamma=1.0, lam=0.95)
        advantages = to_tokens(advantages, steps, N)

    Memory: the outputs. Source: arXiv:1506.02438, eq. 16; macro steps arXiv:2410.02743. Sibling: `discounted_scan`.
    """
    others = {"values": values, "gamma": gamma, "lam": lam}
    *others, mask = checked("gae", "rewards", rewards, others, offsets, mask)
    rows, values, gamma, lam, mask = (flat(x, rewards.shape) for x in (rewards, *others, mask))
    bootstrap = bootstrap_rows("gae", bootstrap, rewards, offsets)
    inputs = rows, values, gamma, lam, bootstrap
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        found = reference(*inputs, mask, offsets, backend)
    else:
        (gamma, gamma_of_all), (lam, lam_of_all) = split(gamma), split(lam)
        tensors = rows, values, gamma, lam, bootstrap, mask, offsets
        found = _gae(*tensors, gamma_of_all, lam_of_all, backend)
    return found[0].view(rewards.shape), found[1].view(rewards.shape)
