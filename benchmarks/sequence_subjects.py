"""What the ops along ragged segments are tried on for the numerics page, and how a trainer writes them."""

from __future__ import annotations

import functools

import torch
from subjects import Subject
from torch import Tensor

from fuserl.kernels import discounted_scan, gae, segment_sum


def segments(tokens: int) -> Tensor:
    """Offsets of segments of uneven lengths, the longest half of all."""
    cuts = torch.cat([torch.tensor([0, tokens // 2]), tokens // 2 + torch.randint(tokens - tokens // 2, (14,))])
    return torch.cat([cuts.sort().values, torch.tensor([tokens])])


def links_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Summands, links to the next token, offsets, and the gradients that come from above."""
    b, g, offsets = torch.randn(rows), torch.randn(rows), segments(rows)
    a = torch.ones(rows) if kind == "sums" else 0.9 + 0.1 * torch.rand(rows)
    return b, a, offsets, g


def discounted_scan_run(backend: str, b: Tensor, a: Tensor, offsets: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The op, and autograd through it."""
    leaves = [x.clone().requires_grad_() for x in (b, a)]
    x = discounted_scan.discounted_scan(*leaves, offsets=offsets, backend=backend)
    d_b, d_a = torch.autograd.grad(x, leaves, g)
    return {"x": x, "d_b": d_b, "d_a": d_a}


def rewards_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Rewards, values and offsets."""
    rewards, values, offsets = torch.randn(rows), torch.randn(rows), segments(rows)
    if kind == "sparse":
        rewards = torch.zeros(rows).index_fill(0, offsets[1:] - 1, 1.0)
    return rewards, values + (100.0 if kind == "large" else 0.0), offsets


def gae_run(backend: str, rewards: Tensor, values: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """The op at gamma 1 and lam 0.95."""
    advantages, returns = gae.gae(rewards, values, gamma=1.0, lam=0.95, offsets=offsets, backend=backend)
    return {"advantages": advantages, "returns": returns}


def gae_eager(rewards: Tensor, values: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """A loop back over the tokens of each segment."""
    parts = [x.split(offsets.diff().tolist()) for x in (rewards, values)]
    advantages = []
    for r, v in zip(*parts, strict=True):
        found, following, last = [], torch.zeros(()), torch.zeros(())
        for t in reversed(range(len(r))):
            last = r[t] + following - v[t] + 0.95 * last
            following = v[t]
            found.append(last)
        advantages += found[::-1]
    advantages = torch.stack(advantages)
    return {"advantages": advantages, "returns": advantages + values}


def segment_sum_run(backend: str, b: Tensor, _a: Tensor, offsets: Tensor, _g: Tensor) -> dict[str, Tensor]:
    """The op, and what `to_tokens` makes of the means."""
    sums = segment_sum.segment_sum(b, offsets, backend=backend)
    means = segment_sum.segment_mean(b, offsets, backend=backend)
    return {"sums": sums, "means": segment_sum.to_tokens(means, offsets, len(b), backend=backend)}


def segment_sum_eager(b: Tensor, _a: Tensor, offsets: Tensor, _g: Tensor) -> dict[str, Tensor]:
    """Additions to an index per token."""
    lengths = offsets.diff()
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = b.new_zeros(len(lengths)).index_add(0, segment, b)
    return {"sums": sums, "means": (sums / lengths.clamp(min=1))[segment]}


SUBJECTS = {
    "discounted_scan": Subject(
        inputs=links_of,
        run=discounted_scan_run,
        eager=functools.partial(discounted_scan_run, "reference"),
        implemented=discounted_scan.IMPLS,
        kinds={"usual": "ragged segments, links between 0.9 and 1", "sums": "the same, links of 1"},
        dtypes=(torch.float32,),
    ),
    "gae": Subject(
        inputs=rewards_of,
        run=gae_run,
        eager=gae_eager,
        implemented=gae.IMPLS,
        kinds={
            "usual": "rewards and values of standard deviation 1, gamma 1 and lam 0.95",
            "sparse": "a reward of 1 at each segment's end",
            "large": "values around 100",
        },
        dtypes=(torch.float32,),
    ),
    "segment_sum": Subject(
        inputs=links_of,
        run=segment_sum_run,
        eager=segment_sum_eager,
        implemented=segment_sum.IMPLS,
        kinds={"usual": "ragged segments of standard deviation 1"},
        dtypes=(torch.float32,),
    ),
}
