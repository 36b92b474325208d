"""tree_attention by flash-attn: its kernels see one text or one ancestor at a time, and the parts merge by their lse.

The first part is every segment on itself, causally. Then, level by level, each segment of that depth is seen by all
that descends from it, which in preorder is one stretch right after it. The backward of a part is exact, given the lse
and the output of the whole; a parent's keys are in one part, which sums its gradients once.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.tree_segments import Layout, Rule, Saved

_NAME = "tree_attention"


class Part(NamedTuple):
    """Stretches of queries, each against one of keys: int64 tokens of both, int32 bounds of stretches, the longest."""

    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    causal: bool


@functools.lru_cache(maxsize=16)
def parts(layout: Layout, device: torch.device) -> list[Part]:
    """Every (query, key) that may see each other is in exactly one of them."""
    start, end = layout.start[:-1].long(), layout.start[1:].long()
    full = end > start
    reach = end.clone()
    reach[full] = layout.last[start[full]].long()
    found = [_part(start[full], end[full], start[full], end[full], True, device)]
    for level in range(int(layout.depth.max())):
        here = full & (layout.depth == level) & (reach > end)
        if here.any():
            found.append(_part(end[here], reach[here], start[here], end[here], False, device))
    return found


def _part(from_: Tensor, to: Tensor, key_from: Tensor, key_to: Tensor, causal: bool, device: torch.device) -> Part:
    def tokens(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        sizes = end - begin
        bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        offset = torch.repeat_interleave(begin - bounds[:-1], sizes)
        return offset + torch.arange(int(bounds[-1])), bounds.to(torch.int32)

    (queries, query_bounds), (keys, key_bounds) = tokens(from_, to), tokens(key_from, key_to)
    arrays = (x.to(device, non_blocking=True) for x in (queries, keys, query_bounds, key_bounds))
    return Part(*arrays, int((to - from_).max()), int((key_to - key_from).max()), causal)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """out, float32, and lse (L, 2, H)."""
    _check(q, rule)
    flash = importlib.import_module("flash_attn.flash_attn_interface")
    out, lse = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for part in parts(layout, q.device):
        piece, piece_lse, *_ = flash._flash_attn_varlen_forward(
            q[part.queries], k[part.keys], v[part.keys], *part[2:6], 0.0, rule.scale, part.causal,
            softcap=rule.softcap or 0.0,
        )  # fmt: skip
        old, new = lse[part.queries], piece_lse.mT
        both = torch.logaddexp(old, new)
        scales = [(x - both).exp()[..., None] for x in (old, new)]
        out[part.queries] = out[part.queries] * scales[0] + piece.float() * scales[1]
        lse[part.queries] = both
    return out, torch.stack([lse, torch.zeros_like(lse)], dim=1)


def backward(d_out: Tensor, d_lse: Tensor | None, saved: Saved, layout: Layout, rule: Rule) -> list[Tensor]:
    """dq, dk and dv."""
    q, k, v, out, lse = saved
    _check(q, rule)
    if d_lse is not None:
        raise RuntimeError(f"{_NAME}: backend 'flash' cannot run backward from lse: flash-attn has no gradient for it.")
    flash = importlib.import_module("flash_attn.flash_attn_interface")
    whole = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    out = out.to(q.dtype)
    for part in parts(layout, q.device):
        given = q[part.queries], k[part.keys], v[part.keys]
        gradients = [torch.empty_like(x) for x in given]
        flash._flash_attn_varlen_backward(
            d_out[part.queries], *given, out[part.queries], lse[part.queries, 0].mT.contiguous(), *gradients,
            *part[2:6], 0.0, rule.scale, part.causal, -1, -1, rule.softcap or 0.0, None, True,
        )  # fmt: skip
        for total, piece, tokens in zip(whole, gradients, (part.queries, part.keys, part.keys), strict=True):
            total[tokens] += piece.float()
    return [total.to(x.dtype) for total, x in zip(whole, (q, k, v), strict=True)]


def _check(q: Tensor, rule: Rule) -> None:
    if rule.window is not None:
        raise RuntimeError(f"{_NAME}: backend 'flash' cannot run with a window: it counts places, not positions.")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"{_NAME}: backend 'flash' cannot run on {q.dtype}: flash-attn takes 16 bits.")
