"""Attention of queries that come last: each sees the whole line of segments above it, whose shared parts are read once.

    s[b,j] = scale q[b].k[j],  or softcap tanh(scale q[b].k[j] / softcap),   j over segment leaf[b] and its ancestors
    lse[b] = log sum_j exp s[b,j]           out[b] = sum_j exp(s[b,j] - lse[b]) v[j]

Decoding waits for memory. With G rollouts of n tokens each behind a prompt of P it reads P + G n keys and values where
one cache per rollout holds G (P + n). A segment is read in stretches of _SPLIT keys, each by all queries that descend
from it; what a query found in its stretches is added from the root down.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows, tree_decode_tiles
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register
from fuserl.kernels.tree_segments import Rule

_NAME = "tree_decode"
_NO_WINDOW = 2**31 - 1
_SPLIT = 512  # keys
_WIDTH = 16  # the C++ takes head dimensions in multiples of this


@dataclass(frozen=True, eq=False)
class Plan:
    """Stretches of keys and who sees them: item, member, slot, bounds and last, int32, as `DecodePlan` of csrc/ops.h.

    most: queries that see one stretch.
    """

    arrays: tuple[Tensor, ...]
    most: int


def reference(q: Tensor, k: Tensor, v: Tensor, segments: tuple[list[int], ...], rule: Rule) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch: every query's keys and values laid end to end."""
    parent, start, length, leaf = segments
    dtype, repeat = softmax_rows.accumulator(q.dtype), q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for b, segment in enumerate(leaf):
        line = _line(parent, segment)
        rows = torch.cat([torch.arange(start[s], start[s] + length[s]) for s in line])[-(rule.window or _NO_WINDOW) :]
        keys, values = (x[rows.to(x.device)].to(dtype).repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("hd,jhd->hj", q[b].to(dtype), keys) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        lse[b] = scores.logsumexp(-1)
        out[b] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values)
    return out, lse


def _line(parent: list[int], segment: int) -> list[int]:
    """A segment and its ancestors, from the root down."""
    line = []
    while segment >= 0:
        line.append(segment)
        segment = parent[segment]
        if len(line) > len(parent):
            raise ValueError(
                f"{_NAME}: parent must lead from every segment to a root; got a circle at {segment}. Use -1 for a root."
            )
    return line[::-1]


@functools.lru_cache(maxsize=16)
def _plan(parent, start, length, leaf, window: int | None) -> Plan:
    """Every layer of a model asks for the same: those of the last few calls are kept."""
    base: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    last = []
    for query, segment in enumerate(leaf):
        place = 0
        for s in _line(parent, segment):
            base[s] = place
            members.setdefault(s, []).append(query)
            place += length[s]
        last.append(place - 1)
    stretches = [
        (base[s] + at, start[s] + at, min(_SPLIT, length[s] - at), seeing)
        for s, seeing in members.items()
        for at in range(0, length[s], _SPLIT)
    ]
    items, member = [], []
    seen: list[list[int]] = [[] for _ in leaf]
    for place, first, keys, seeing in sorted(stretches, key=lambda stretch: stretch[:2]):
        near = [query for query in seeing if window is None or last[query] - window < place + keys - 1]
        if near:
            items.append((first, keys, place, len(member), len(member) + len(near)))
        for query in near:
            seen[query].append(len(member))
            member.append(query)
    bounds = [0, *itertools.accumulate(map(len, seen))]
    slot = [pair for pairs in seen for pair in pairs]
    item, *others = (torch.tensor(x, dtype=torch.int32) for x in (items, member, slot, bounds, last))
    return Plan((item.view(-1, 5), *others), max((to - from_ for *_, from_, to in items), default=0))


def _cpu(q, k, v, segments, rule):
    from fuserl import _C

    dtype, spare = softmax_rows.accumulator(q.dtype), -q.shape[2] % _WIDTH
    given = [torch.nn.functional.pad(x, (0, spare)) if spare else x for x in (q.to(dtype), k, v)]
    queries, keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in given)
    queries = queries.contiguous()
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
    numbers = min(rule.window or _NO_WINDOW, _NO_WINDOW), rule.scale, rule.softcap or 0.0
    _C.tree_decode(
        _plan(*segments, rule.window).arrays, queries, keys, values, *numbers, out, lse, torch.get_num_threads()
    )
    return out[..., : q.shape[2]], lse


def _triton(q, k, v, segments, rule):
    return tree_decode_tiles.attend(q, k, v, _plan(*segments, rule.window), rule)


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": reference}


def _run(q, k, v, parent, start, length, leaf, *numbers_and_backend):
    *numbers, backend = numbers_and_backend
    double = q.dtype == torch.float64 and q.device.type != "cpu"
    backend = choose(_NAME, IMPLS, q.device, backend or ("reference" if double else None))
    if backend == "triton" and q.dtype == torch.float64:
        raise RuntimeError(f"{_NAME}: backend 'triton' cannot run on float64: its products have at most 32 bits.")
    segments = tuple(tuple(x.tolist()) for x in (parent, start, length, leaf))
    _check_segments(*segments, len(q), len(k))
    if q.numel() == 0:
        return _fake(q)
    out, lse = IMPLS[backend](q, k, v, segments, Rule(*numbers))
    return out.to(q.dtype).contiguous(), lse


def _fake(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=softmax_rows.accumulator(q.dtype))


_tree_decode = register(
    "tree_decode(Tensor q, Tensor k, Tensor v, Tensor parent, Tensor start, Tensor length, Tensor leaf, float scale, "
    "int? window, float? softcap, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def tree_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments,
    leaf,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per rollout over a key-value cache that holds each shared prompt once; forward only.

        out[b] = sum_j softmax_j(scale q[b].k[j]) v[j],   j over segment leaf[b] and its ancestors

    Args:
        q: (B, H, D) float32, bfloat16, float16 or float64, each the last token of its text; D up to 256.
        k, v: (T, Hkv, D) of q's dtype, the rows of a cache in any order of the segments, with room between them, and
            strided as long as D is in one stretch. Query head h reads key head h // (H / Hkv).
        segments: (parent, start, length), each (S,) integers on the host: the segment that each one continues, -1 for
            none, its first row of the cache and its tokens so far. Of a rollout's own token as of its ancestors' the
            key is there already. Several queries of a rollout (speculative decoding) are segments of a token each.
        leaf: (B,) integers on the host, the segment whose last token each query is.
        scale: of the scores; D ** -0.5 by default.
        window: a query sees that many last tokens of its text, itself included.
        softcap: c makes each score c tanh(score / c).
        backend: "triton", "cpu" or "reference"; by default the fastest that runs here.

    Returns:
        (out, lse): (B, H, D) of q's dtype, and (B, H), float32 (float64 from float64), the log of each softmax's
        denominator. Where a query sees no token they are 0 and -inf.

    Raises:
        ValueError: on a wrong shape, dtype, device, number or segment, and on tensors that want a gradient.

    On a CPU a query's bits depend on its own line of segments only, not on what is decoded beside it. Ten runs give the
    same bits. A length compiles nothing anew. Memory: (D + 2) numbers per query, head and stretch of 512 keys.

    Source: Hydragen (arXiv:2402.05099), here for trees of any depth. Sibling: `tree_attention`, for training.
    """
    if hasattr(segments, "parent"):
        segments = segments.parent, segments.start, segments.length
    _check(q, k, v, scale, window, softcap)
    found = [torch.as_tensor(x, dtype=torch.int64) for x in (*segments, leaf)]
    if len(found) != 4 or any(x.dim() != 1 or x.device.type != "cpu" for x in found):
        raise ValueError(
            f"{_NAME}: segments must be (parent, start, length), three (S,) arrays on the host, and leaf one; got "
            f"{[tuple(x.shape) for x in found]}. Keep the sizes where they were made."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    return _tree_decode(q, k, v, *found, scale, window, softcap, backend)


def _check(q: Tensor, k: Tensor, v: Tensor, scale, window, softcap) -> None:
    if q.dim() != 3 or not q.is_floating_point() or not 0 < q.shape[2] <= 256 or q.shape[1] == 0:
        raise ValueError(
            f"{_NAME}: q must be (B, H, D) of a floating dtype, D up to 256; got {tuple(q.shape)} {q.dtype}. Give one "
            "query per rollout."
        )
    for name, x in {"k": k, "v": v}.items():
        fits = x.dim() == 3 and x.shape == k.shape and x.shape[2] == q.shape[2] and x.dtype == q.dtype
        if not (fits and x.device == q.device and x.shape[1] > 0 and q.shape[1] % x.shape[1] == 0):
            raise ValueError(
                f"{_NAME}: {name} must be (T, Hkv, {q.shape[2]}) {q.dtype} on {q.device} with Hkv a divisor of "
                f"{q.shape[1]}; got {tuple(x.shape)} {x.dtype} on {x.device}. Give the rows of the cache."
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"{_NAME}: q, k and v must want no gradient; got some that do. Use tree_attention, or torch.no_grad()."
        )
    for name, value in {"scale": scale, "softcap": softcap, "window": window}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{_NAME}: {name} must be positive and finite; got {value}. Use None for the default.")


def _check_segments(parent, start, length, leaf, queries: int, rows: int) -> None:
    if not len(parent) == len(start) == len(length) or len(leaf) != queries:
        raise ValueError(
            f"{_NAME}: segments must be three arrays of one length, and leaf one for {queries} queries; got "
            f"{len(parent)}, {len(start)}, {len(length)} and {len(leaf)}. Name a segment for every query."
        )
    for segment, (up, first, size) in enumerate(zip(parent, start, length, strict=True)):
        if not -1 <= up < len(parent) or first < 0 or size < 0 or first + size > rows:
            raise ValueError(
                f"{_NAME}: segments must continue one of {len(parent)}, or -1, in rows 0 to {rows}; got parent {up}, "
                f"start {first} and length {size} for segment {segment}. Check the sizes of the cache."
            )
    if not all(0 <= segment < len(parent) for segment in leaf):
        raise ValueError(f"{_NAME}: leaf must name segments 0 to {len(parent) - 1}; got {min(leaf)} to {max(leaf)}.")
