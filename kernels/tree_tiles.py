"""The Triton kernels of tree_attention: a tile of queries walks from its segment up to the root, a tile of keys down.

Programs read the forest as it is, integers per token and per segment; no table of tiles is built. Keys before a tile of
queries are unmasked where all of the tile sees them. dK and dV of a tile of keys are summed over a fixed cut of its
queries in at most _PARTS parts, which one more kernel adds in their order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton
from fuserl.kernels.tree_launch import launch
from fuserl.kernels.tree_segments import Layout, Rule, Saved

_PARTS, _LEAST = 8, 4096  # parts of the queries of one tile of keys, and queries that a part has at least
_NO_WINDOW = 2**31 - 1
MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _tanh(x):
    """e / (e + 2) with e = exp(2 x) - 1 by a series near 0, where the difference would cancel."""
    y = 2 * x
    p = tl.full(x.shape, 1.0, x.dtype)
    for k in tl.static_range(10, 1, -1):
        p = 1.0 + p * y * (1.0 / k)
    e = tl.where(tl.abs(y) < 1.0, p * y, tl.exp(y) - 1.0)
    return tl.where(e > 1e30, 1.0, e / (e + 2.0))


@triton.jit
def _products(q, k, EXACT: tl.constexpr):
    """q k^T; the widest heads in float32, which take no tensor cores, leave registers over where k comes first."""
    if EXACT and q.shape[1] > 128:
        return tl.trans(tl.dot(k, tl.trans(q), input_precision="ieee"))
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _score(raw, scale, softcap, CAP: tl.constexpr, EXACT: tl.constexpr):
    """Scores out of products, and what they change by: in units of log 2 unless EXACT, for exp2 saves a product."""
    unit: tl.constexpr = 1.0 if EXACT else 1.4426950408889634
    if CAP:
        tanh = _tanh(raw * (scale / softcap))
        return tanh * (softcap * unit), 1.0 - tanh * tanh
    else:
        return raw * (scale * unit), 1.0


@triton.jit
def _power(x, EXACT: tl.constexpr):
    return tl.exp(x) if EXACT else tl.exp2(x)


@triton.jit
def _weights(s, lse, rest, EXACT: tl.constexpr):
    """exp(s - lse), s in the units of `_score`."""
    return tl.exp((s - lse) - rest) if EXACT else tl.exp2(s - lse * 1.4426950408889634)


@triton.jit
def _rows(ptr, begin, inside, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows from `begin` on of one head, (tokens, BLOCK_D), 0 outside."""
    ptr += begin.to(tl.int64) * stride + head * D
    d = tl.arange(0, BLOCK_D)
    local = tl.arange(0, inside.shape[0])[:, None] * stride + d[None, :]
    return tl.load(ptr + local, inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _put(ptr, x, begin, inside, stride, head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    ptr += begin.to(tl.int64) * stride + head * D
    d = tl.arange(0, BLOCK_D)
    local = tl.arange(0, inside.shape[0])[:, None] * stride + d[None, :]
    tl.store(ptr + local, x.to(ptr.dtype.element_ty), inside[:, None] & (d < D)[None, :])


@triton.jit
def _reach(first, stop, begin, end, least, last_ptr, position_ptr, window, BLOCK_K: tl.constexpr, WINDOW: tl.constexpr):
    """Of keys first..stop of a segment: where those begin that queries begin..end may see, and end that all do."""
    if WINDOW:
        first = tl.maximum(first, first + least - window + 1 - tl.load(position_ptr + first))
        return first, first
    # An empty segment has no first token; its range is empty whatever is read in its place.
    shared = tl.load(last_ptr + first, first < stop, other=0) >= end
    limit = tl.where(shared, tl.minimum(stop, begin), first)
    return first, first + tl.maximum(limit - first, 0) // BLOCK_K * BLOCK_K


@triton.jit
def _hidden(s, i, j, place, stop, last_ptr, position_ptr, window, WINDOW: tl.constexpr):
    """Scores, -infinity where query i does not see key j, or the key is not of this segment's range."""
    last = tl.load(last_ptr + j, j < stop, other=0)
    seen = (j[None, :] <= i[:, None]) & (i[:, None] < last[None, :])
    if WINDOW:
        seen = seen & (place[:, None] - tl.load(position_ptr + j, j < stop, other=0)[None, :] < window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _tile_of_queries(position_ptr, L, heads, BLOCK_Q: tl.constexpr):
    """A program's head, tile, its first token and the one after its last, tokens, which there are, and their places.

    The last tiles, which see most, come first.
    """
    program = tl.program_id(0)
    head, tile = program % heads, tl.num_programs(0) // heads - 1 - program // heads
    begin = tile * BLOCK_Q
    i = begin + tl.arange(0, BLOCK_Q)
    rows = i < L
    place = tl.load(position_ptr + i, rows, other=2147483647)
    return head, tile, begin, tl.minimum(begin + BLOCK_Q, L), i, rows, place


@triton.jit
def _attend(
    q, top, total, sums, at, i, place, stop, head, k_ptr, v_ptr, last_ptr, position_ptr, scale, softcap, window, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys added to the running maximum, total and weighted sum of a tile of queries."""
    at = tl.to_tensor(at)  # in the interpreter a loop counts in plain integers
    j = at + tl.arange(0, BLOCK_K)
    inside = j < stop
    k = _rows(k_ptr, at, inside, stride, head, D, BLOCK_D)
    s, _ = _score(_products(q, k, EXACT), scale, softcap, CAP, EXACT)
    if MASKED:
        s = _hidden(s, i, j, place, stop, last_ptr, position_ptr, window, WINDOW)
    higher = tl.maximum(top, tl.max(s, 1))
    # A row that has seen nothing yet: no infinity less infinity.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p, factor = _power(s - shift[:, None], EXACT), _power(top - shift, EXACT)
    v = _rows(v_ptr, at, inside, stride, head, D, BLOCK_D)
    sums = tl.dot(p.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
    return higher, total * factor + tl.sum(p, 1), sums


@triton.jit(do_not_specialize=["L", "window"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, parent_ptr, segment_ptr, last_ptr, position_ptr, L, window, heads,
    repeat, scale: tl.float32, softcap: tl.float32, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one head."""
    head, tile, begin, end, i, rows, place = _tile_of_queries(position_ptr, L, heads, BLOCK_Q)
    kv_head, stride_q, stride_k, least = head // repeat, heads * D, heads // repeat * D, tl.min(place)
    q = _rows(q_ptr, begin, rows, stride_q, head, D, BLOCK_D)
    top, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    segment, stop = tl.load(segment_ptr + tile), end
    while segment >= 0:
        first = tl.load(start_ptr + segment)
        first, clear = _reach(first, stop, begin, end, least, last_ptr, position_ptr, window, BLOCK_K, WINDOW)
        for at in range(first, clear, BLOCK_K):
            top, total, sums = _attend(
                q, top, total, sums, at, i, place, stop, kv_head, k_ptr, v_ptr, last_ptr, position_ptr, scale, softcap,
                window, stride_k, D, BLOCK_D, BLOCK_K, CAP, WINDOW, EXACT, False,
            )  # fmt: skip
        for at in range(clear, stop, BLOCK_K):
            top, total, sums = _attend(
                q, top, total, sums, at, i, place, stop, kv_head, k_ptr, v_ptr, last_ptr, position_ptr, scale, softcap,
                window, stride_k, D, BLOCK_D, BLOCK_K, CAP, WINDOW, EXACT, True,
            )  # fmt: skip
        segment = tl.load(parent_ptr + segment)
        stop = tl.load(start_ptr + segment + 1)
    total = tl.where(rows, total, 1.0)
    _put(out_ptr, sums / total[:, None], begin, rows, stride_q, head, D, BLOCK_D)
    lse, rest = top * 0.6931471805599453 + tl.log(total), tl.zeros([BLOCK_Q], tl.float32)
    if EXACT:
        log = tl.log(total)
        lse = top + log
        back = lse - top
        rest = (top - (lse - back)) + (log - back)
    at = i.to(tl.int64) * 2 * heads + head
    tl.store(lse_ptr + at, lse, rows)
    tl.store(lse_ptr + at + heads, rest, rows)


@triton.jit
def _slope(
    q, d_out, dq, at, i, place, stop, head, lse, rest, delta, k_ptr, v_ptr, last_ptr, position_ptr, scale, softcap,
    window, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, and what one block of keys adds to it."""
    at = tl.to_tensor(at)  # in the interpreter a loop counts in plain integers
    j = at + tl.arange(0, BLOCK_K)
    inside = j < stop
    k = _rows(k_ptr, at, inside, stride, head, D, BLOCK_D)
    s, change = _score(_products(q, k, EXACT), scale, softcap, CAP, EXACT)
    if MASKED:
        s = _hidden(s, i, j, place, stop, last_ptr, position_ptr, window, WINDOW)
    v = _rows(v_ptr, at, inside, stride, head, D, BLOCK_D)
    dp = _products(d_out, v, EXACT)
    ds = _weights(s, lse[:, None], rest[:, None], EXACT) * (dp - delta[:, None]) * change
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["L", "window"])
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, parent_ptr, segment_ptr, last_ptr,
    position_ptr, L, window, heads, repeat, scale: tl.float32, softcap: tl.float32, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head."""
    head, tile, begin, end, i, rows, place = _tile_of_queries(position_ptr, L, heads, BLOCK_Q)
    kv_head, stride_q, stride_k, least = head // repeat, heads * D, heads // repeat * D, tl.min(place)
    q = _rows(q_ptr, begin, rows, stride_q, head, D, BLOCK_D)
    d_out = _rows(d_out_ptr, begin, rows, stride_q, head, D, BLOCK_D)
    row = i.to(tl.int64) * heads + head
    lse = tl.load(lse_ptr + row + i.to(tl.int64) * heads, rows, other=0.0)
    rest = tl.load(lse_ptr + row + (i.to(tl.int64) + 1) * heads, rows, other=0.0)
    delta = tl.load(delta_ptr + row, rows, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    segment, stop = tl.load(segment_ptr + tile), end
    while segment >= 0:
        first = tl.load(start_ptr + segment)
        first, clear = _reach(first, stop, begin, end, least, last_ptr, position_ptr, window, BLOCK_K, WINDOW)
        for at in range(first, clear, BLOCK_K):
            dq = _slope(
                q, d_out, dq, at, i, place, stop, kv_head, lse, rest, delta, k_ptr, v_ptr, last_ptr, position_ptr,
                scale, softcap, window, stride_k, D, BLOCK_D, BLOCK_K, CAP, WINDOW, EXACT, False,
            )  # fmt: skip
        for at in range(clear, stop, BLOCK_K):
            dq = _slope(
                q, d_out, dq, at, i, place, stop, kv_head, lse, rest, delta, k_ptr, v_ptr, last_ptr, position_ptr,
                scale, softcap, window, stride_k, D, BLOCK_D, BLOCK_K, CAP, WINDOW, EXACT, True,
            )  # fmt: skip
        segment = tl.load(parent_ptr + segment)
        stop = tl.load(start_ptr + segment + 1)
    _put(dq_ptr, dq * scale, begin, rows, stride_q, head, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "window"])
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, partial_ptr, item_ptr, last_ptr, position_ptr, L, window, heads,
    repeat, scale: tl.float32, softcap: tl.float32, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head, of the queries of one part: (item, head, 2, BLOCK_K, D) float32."""
    kv_heads = heads // repeat
    item, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    stride_q, stride_k = heads * D, kv_heads * D
    tile, begin, end = tl.load(item_ptr + 3 * item), tl.load(item_ptr + 3 * item + 1), tl.load(item_ptr + 3 * item + 2)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = j < L
    k = _rows(k_ptr, tile * BLOCK_K, inside, stride_k, kv_head, D, BLOCK_D)
    v = _rows(v_ptr, tile * BLOCK_K, inside, stride_k, kv_head, D, BLOCK_D)
    last = tl.load(last_ptr + j, inside, other=0)
    place = tl.load(position_ptr + j, inside, other=0)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for head in range(kv_head * repeat, (kv_head + 1) * repeat):
        for at in range(begin, end, BLOCK_Q):
            at = tl.to_tensor(at)
            i = at + tl.arange(0, BLOCK_Q)
            rows = i < end
            asking = tl.load(position_ptr + i, rows, other=2147483647) if WINDOW else i
            near = True
            if WINDOW:
                near = tl.min(asking) - tl.max(place) < window
            if near:
                q = _rows(q_ptr, at, rows, stride_q, head, D, BLOCK_D)
                d_out = _rows(d_out_ptr, at, rows, stride_q, head, D, BLOCK_D)
                row = i.to(tl.int64) * heads + head
                lse = tl.load(lse_ptr + row + i.to(tl.int64) * heads, rows, other=0.0)
                rest = tl.load(lse_ptr + row + (i.to(tl.int64) + 1) * heads, rows, other=0.0)
                delta = tl.load(delta_ptr + row, rows, other=0.0)
                s, change = _score(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, CAP, EXACT)
                seen = (j[:, None] <= i[None, :]) & (i[None, :] < last[:, None]) & rows[None, :]
                if WINDOW:
                    seen = seen & (asking[None, :] - place[:, None] < window)
                p = _weights(tl.where(seen, s, float("-inf")), lse[None, :], rest[None, :], EXACT)
                dv = tl.dot(p.to(q.dtype), d_out, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
                ds = p * (dp - delta[None, :]) * change
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    to, every = tl.program_id(0).to(tl.int64) * 2, tl.full([BLOCK_K], 1, tl.int1)
    _put(partial_ptr, dk * scale, to * BLOCK_K, every, D, 0, D, BLOCK_D)
    _put(partial_ptr, dv, (to + 1) * BLOCK_K, every, D, 0, D, BLOCK_D)


@triton.jit(do_not_specialize=["L"])
def _merge_kernel(
    partial_ptr, dk_ptr, dv_ptr, first_ptr, L, kv_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one head: its parts, added in their order."""
    tile, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    every = tl.full([BLOCK_K], 1, tl.int1)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for item in range(tl.load(first_ptr + tile), tl.load(first_ptr + tile + 1)):
        at = (item * kv_heads + kv_head).to(tl.int64) * 2
        dk += _rows(partial_ptr, at * BLOCK_K, every, D, 0, D, BLOCK_D)
        dv += _rows(partial_ptr, (at + 1) * BLOCK_K, every, D, 0, D, BLOCK_D)
    inside = tile * BLOCK_K + tl.arange(0, BLOCK_K) < L
    _put(dk_ptr, dk, tile * BLOCK_K, inside, kv_heads * D, kv_head, D, BLOCK_D)
    _put(dv_ptr, dv, tile * BLOCK_K, inside, kv_heads * D, kv_head, D, BLOCK_D)


@functools.lru_cache(maxsize=16)
def _segments(layout: Layout, queries: int, device: torch.device) -> Tensor:
    """(tiles,) int32, the segment of each tile's first token."""
    return layout.owner()[::queries].to(torch.int32).to(device, non_blocking=True)


@functools.lru_cache(maxsize=16)
def _items(layout: Layout, keys: int, queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(items, 3) int32: tile of keys, its queries from and to; (tiles + 1,) int32: the first item of each tile."""
    begin = torch.arange(0, layout.tokens, keys)
    padded = torch.nn.functional.pad(layout.last.long(), (0, -layout.tokens % keys))
    end = padded.view(-1, keys).amax(1)
    parts = ((end - begin + _LEAST - 1) // _LEAST).clamp(1, _PARTS)
    size = ((end - begin + parts - 1) // parts + queries - 1) // queries * queries
    tile = torch.repeat_interleave(torch.arange(len(begin)), parts)
    first = torch.nn.functional.pad(parts.cumsum(0), (1, 0))
    from_ = begin[tile] + (torch.arange(len(tile)) - first[tile]) * size[tile]
    items = torch.stack([tile, from_, torch.minimum(from_ + size[tile], end[tile])], dim=1)
    return tuple(x.to(torch.int32).to(device, non_blocking=True) for x in (items, first))


def _numbers(q: Tensor, k: Tensor, layout: Layout, rule: Rule) -> tuple[list, dict]:
    window = _NO_WINDOW if rule.window is None else min(rule.window, _NO_WINDOW)
    numbers = [layout.tokens, window, q.shape[1], q.shape[1] // k.shape[1], rule.scale, rule.softcap or 1.0]
    switches = {"CAP": rule.softcap is not None, "WINDOW": rule.window is not None, "EXACT": q.dtype == torch.float32}
    return numbers, {"D": q.shape[2], **switches}


def _launch(q: Tensor, rule: Rule) -> dict[str, dict]:
    hopper = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] == 9
    return launch(q.shape[2], q.dtype, rule.softcap is not None, hopper=hopper)


def _readable(x: Tensor) -> Tensor:
    """Contiguous; on a CPU float32 for bfloat16, whose bits the interpreter multiplies as if they were integers."""
    return (x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """out and lse (L, 2, H)."""
    q, k, v = map(_readable, (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty((len(q), 2, q.shape[1]), dtype=torch.float32)
    (numbers, switches), settings = (
        _numbers(q, k, layout, rule),
        _launch(q, rule)["forward"],
    )
    forest = [layout.on(name, q.device) for name in ("start", "parent", "last", "position")]
    forest.insert(2, _segments(layout, settings["BLOCK_Q"], q.device))
    grid = (triton.cdiv(layout.tokens, settings["BLOCK_Q"]) * q.shape[1],)
    _forward_kernel[grid](q, k, v, out, lse, *forest, *numbers, **switches, **settings)
    return out, lse


def backward(d_out: Tensor, delta: Tensor, saved: Saved, layout: Layout, rule: Rule) -> list[Tensor]:
    """dq, dk and dv; delta (L, H) float32."""
    q, k, v, d_out, lse, delta = map(_readable, (*saved[:3], d_out, saved.lse, delta))
    gradients, (numbers, switches) = [torch.empty_like(x) for x in (q, k, v)], _numbers(q, k, layout, rule)
    settings, (tokens, heads) = _launch(q, rule), k.shape[:2]
    sizes = settings["queries"]
    start, parent, last, position = (layout.on(name, q.device) for name in ("start", "parent", "last", "position"))
    segment = _segments(layout, sizes["BLOCK_Q"], q.device)
    _queries_kernel[(triton.cdiv(tokens, sizes["BLOCK_Q"]) * q.shape[1],)](
        q, k, v, d_out, lse, delta, gradients[0], start, parent, segment, last, position, *numbers, **switches, **sizes
    )
    sizes = settings["keys"]
    items, first = _items(layout, sizes["BLOCK_K"], sizes["BLOCK_Q"], q.device)
    partial = q.new_empty((len(items), heads, 2, sizes["BLOCK_K"], q.shape[2]), dtype=torch.float32)
    _keys_kernel[(len(items) * heads,)](
        q, k, v, d_out, lse, delta, partial, items, last, position, *numbers, **switches, **sizes
    )
    blocks = {"D": q.shape[2], "BLOCK_D": sizes["BLOCK_D"], "BLOCK_K": sizes["BLOCK_K"], **MERGE_LAUNCH}
    _merge_kernel[((len(first) - 1) * heads,)](partial, *gradients[1:], first, tokens, heads, **blocks)
    return [x.to(saved.q.dtype) for x in gradients]
