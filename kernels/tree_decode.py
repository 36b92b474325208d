"""Attention of queries over cached keys: each sees its line of segments up to itself; what lines share is read once.

    s[b,j] = scale q[b].k[j],  or softcap tanh(scale q[b].k[j] / softcap),   j <= position[b] in leaf[b] or above
    lse[b] = log sum_j exp s[b,j]           out[b] = sum_j exp(s[b,j] - lse[b]) v[j]

Decoding waits for memory. With G rollouts of n tokens each behind a prompt of P it reads P + G n keys and values where
one cache per rollout holds G (P + n). A token of a prompt that is being read, a rollout's next one and a text put in
between are the same thing to it, so that a token's numbers do not depend on how its text is cut into passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows, tree_decode_tiles
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register
from fuserl.kernels.tree_lines import NO_WINDOW, Lines, lines
from fuserl.kernels.tree_segments import Rule

_NAME = "tree_decode"
_WIDTH = 16  # the C++ takes head dimensions in multiples of this


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Lines, rule: Rule) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch: every query's keys and values laid end to end."""
    dtype, repeat = softmax_rows.accumulator(q.dtype), q.shape[1] // k.shape[1]
    out, lse = q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for b in range(len(q)):
        rows = seen.rows(b, rule.window).to(k.device)
        keys, values = (x[rows].to(dtype).repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = torch.einsum("hd,jhd->hj", q[b].to(dtype), keys) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        lse[b] = scores.logsumexp(-1)
        out[b] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values)
    return out, lse


def _cpu(q, k, v, seen, rule):
    from fuserl import _C

    dtype, spare = softmax_rows.accumulator(q.dtype), -q.shape[2] % _WIDTH
    given = [torch.nn.functional.pad(x, (0, spare)) if spare else x for x in (q.to(dtype), k, v)]
    queries, keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in given)
    queries = queries.contiguous()
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
    numbers = min(rule.window or NO_WINDOW, NO_WINDOW), rule.scale, rule.softcap or 0.0
    _C.tree_decode(seen.plan(rule.window).arrays, queries, keys, values, *numbers, out, lse, torch.get_num_threads())
    return out[..., : q.shape[2]], lse


def _triton(q, k, v, seen, rule):
    return tree_decode_tiles.attend(q, k, v, seen.plan(rule.window), rule)


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": reference}


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Lines, rule: Rule, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`tree_decode` of lines made beforehand, once for all layers of a model; nothing is checked."""
    double = q.dtype == torch.float64 and q.device.type != "cpu"
    backend = choose(_NAME, IMPLS, q.device, backend or ("reference" if double else None))
    if backend == "triton" and q.dtype == torch.float64:
        raise RuntimeError(f"{_NAME}: backend 'triton' cannot run on float64: its products have at most 32 bits.")
    if q.numel() == 0:
        return _fake(q)
    out, lse = IMPLS[backend](q, k, v, seen, rule)
    return out.to(q.dtype).contiguous(), lse


def _run(q, k, v, parent, start, length, leaf, *others):
    position, page, *numbers, backend = others
    arrays = [None if x is None else tuple(x.tolist()) for x in (parent, start, length, leaf, position, page)]
    if len(leaf) != len(q):
        raise ValueError(
            f"{_NAME}: leaf must have one segment for each of {len(q)} queries; got {len(leaf)}. Name a segment "
            "for every query."
        )
    return attend(q, k, v, lines(*arrays[:5], arrays[5] or (), len(k)), Rule(*numbers), backend)


def _fake(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=softmax_rows.accumulator(q.dtype))


_tree_decode = register(
    "tree_decode(Tensor q, Tensor k, Tensor v, Tensor parent, Tensor start, Tensor length, Tensor leaf, "
    "Tensor? position, Tensor? page, float scale, int? window, float? softcap, str? backend) -> (Tensor, Tensor)",
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
    position=None,
    page=None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries over a key-value cache that holds each shared prompt once; forward only.

        out[b] = sum_j softmax_j(scale q[b].k[j]) v[j],   j <= position[b] in segment leaf[b] and its ancestors

    Args:
        q: (B, H, D) float32, bfloat16, float16 or float64; D up to 256.
        k, v: (T, Hkv, D) of q's dtype, the rows of a cache in any order of the segments, with room between them, and
            strided as long as D is in one stretch. Query head h reads key head h // (H / Hkv).
        segments: (parent, start, length), each (S,) integers on the host: the segment that each one continues, -1 for
            none, its first row of the cache and its tokens so far. A query's own key is there already.
        leaf: (B,) integers on the host, the segment at the end of each query's line.
        position: (B,) integers on the host, the last token of its line that each query sees; by default all of them.
        page: (M,) integers on the host, for a cache in pages of 64 rows: row r of a segment is row r % 64 of page
            page[r // 64] of k and v, and segments begin at multiples of 64. By default row r is row r.
        scale: of the scores; D ** -0.5 by default.
        window: a query sees that many last tokens of its text, itself included.
        softcap: c makes each score c tanh(score / c).
        backend: "triton", "cpu" or "reference"; by default the fastest that runs here.

    Returns:
        (out, lse): (B, H, D) of q's dtype, and (B, H), float32 (float64 from float64), the log of each softmax's
        denominator. Where a query sees no token they are 0 and -inf.

    Raises:
        ValueError: on a wrong shape, dtype, device, number or segment, and on tensors that want a gradient.

    On a CPU a query's bits depend on its position in its line only: not on what is beside it, nor where in the cache a
    segment is. Ten runs give the same bits. A length compiles nothing anew. Memory: (D + 2) numbers per query, head and
    stretch of 512 keys.

    Source: Hydragen (arXiv:2402.05099), here for trees of any depth. Sibling: `tree_attention`, for training.
    """
    if hasattr(segments, "parent"):
        segments = segments.parent, segments.start, segments.length
    _check(q, k, v, scale, window, softcap)
    given = (*segments, leaf, position, page)
    found = [None if x is None else torch.as_tensor(x, dtype=torch.int64) for x in given]
    shapes = [tuple(x.shape) for x in found if x is not None]
    if len(found) != 6 or any(x is not None and (x.dim() != 1 or x.device.type != "cpu") for x in found):
        raise ValueError(
            f"{_NAME}: segments must be (parent, start, length), and leaf, position and page one each, all arrays on "
            f"the host; got {shapes}. Keep the sizes where they were made."
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
