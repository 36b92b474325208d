"""The Triton kernels of tree_decode: a program takes a stretch of keys and a tile of what asks for it, then all merge.

The rows of a tile are queries times the query heads of one key head. Tiles of one stretch stand side by side in the
grid, so that the second one finds the keys in the cache. Partial results are merged from the root down.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton
from fuserl.kernels.tree_lines import NO_WINDOW, PAGE
from fuserl.kernels.tree_segments import Rule
from fuserl.kernels.tree_tiles import _power, _readable, _score

MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def launch(dim: int, dtype: torch.dtype, rows: int) -> dict:
    """Tile sizes and options for stretches that at most so many rows ask for."""
    width = max(16, 1 << (dim - 1).bit_length())
    if dtype == torch.float32:
        sizes = {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4 if width <= 128 else 8, "num_stages": 1}
    else:
        most = 64 if width <= 128 else 32
        tile = min(most, max(16, 1 << max(rows - 1, 0).bit_length()))
        warps = 8 if tile * width > 4096 else 4
        sizes = {"BLOCK_Q": tile, "BLOCK_K": 32, "num_warps": warps, "num_stages": 2 if width <= 128 else 1}
    return {"BLOCK_D": width, **sizes, "enable_fp_fusion": True}


@triton.jit
def _read(ptr, row, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a cache, (keys, BLOCK_D), 0 outside."""
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(ptr + at, inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["window", "tiles"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, sums_ptr, top_ptr, total_ptr, item_ptr, member_ptr, last_ptr, page_ptr, window, tiles, heads,
    repeat, stride_k, stride_k_head, stride_v, stride_v_head, scale: tl.float32, softcap: tl.float32, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sums, highest score and total weight of one tile of rows over one stretch of keys of one head."""
    kv_heads = heads // repeat
    program = tl.program_id(0).to(tl.int64)
    kv_head, tile, item = program % kv_heads, program // kv_heads % tiles, program // kv_heads // tiles
    first, keys = tl.load(item_ptr + 5 * item), tl.load(item_ptr + 5 * item + 1)
    place, begin = tl.load(item_ptr + 5 * item + 2), tl.load(item_ptr + 5 * item + 3)
    rows = (tl.load(item_ptr + 5 * item + 4) - begin) * repeat
    if tile * BLOCK_Q < rows:
        row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside, pair, head = row < rows, begin + row // repeat, kv_head * repeat + row % repeat
        query = tl.load(member_ptr + pair, inside, other=0).to(tl.int64)
        q = _read(q_ptr, query * heads + head, inside, D, D, BLOCK_D)
        own = tl.load(last_ptr + query, inside, other=0) - place
        nearest, farthest = own - window + 1, tl.minimum(own, keys - 1)
        top, total = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
        sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        k_ptr += kv_head * stride_k_head
        v_ptr += kv_head * stride_v_head
        for at in range(0, keys, BLOCK_K):
            j = at + tl.arange(0, BLOCK_K)
            there, stored = j < keys, first + at
            if PAGE:
                # BLOCK_K divides a page, and an item begins with one.
                stored = tl.load(page_ptr + stored // PAGE) * PAGE + stored % PAGE
            stored = stored.to(tl.int64)
            k = _read(k_ptr + stored * stride_k, tl.arange(0, BLOCK_K), there, stride_k, D, BLOCK_D)
            s, _ = _score(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, CAP, EXACT)
            seen = j[None, :] <= farthest[:, None]
            if WINDOW:
                seen = seen & (j[None, :] >= nearest[:, None])
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            # A row that has seen nothing yet: no infinity less infinity.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p, factor = _power(s - shift[:, None], EXACT), _power(top - shift, EXACT)
            v = _read(v_ptr + stored * stride_v, tl.arange(0, BLOCK_K), there, stride_v, D, BLOCK_D)
            sums = tl.dot(p.to(v.dtype), v, sums * factor[:, None], input_precision="ieee")
            top, total = higher, total * factor + tl.sum(p, 1)
        d, to = tl.arange(0, BLOCK_D), pair.to(tl.int64) * heads + head
        tl.store(sums_ptr + to[:, None] * D + d[None, :], sums, inside[:, None] & (d < D)[None, :])
        tl.store(top_ptr + to, top, inside)
        tl.store(total_ptr + to, total, inside)


@triton.jit
def _merge_kernel(
    sums_ptr, top_ptr, total_ptr, slot_ptr, bounds_ptr, out_ptr, lse_ptr, heads, D: tl.constexpr, BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out and lse of one head of one query: its partial results, from the root down."""
    program = tl.program_id(0).to(tl.int64)
    query, head = program // heads, program % heads
    d = tl.arange(0, BLOCK_D)
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for pair in range(tl.load(bounds_ptr + query), tl.load(bounds_ptr + query + 1)):
        at = tl.load(slot_ptr + pair).to(tl.int64) * heads + head
        found = tl.load(top_ptr + at)
        higher = tl.maximum(top, found)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        before, factor = _power(top - shift, EXACT), _power(found - shift, EXACT)
        sums = sums * before + tl.load(sums_ptr + at * D + d, d < D, other=0.0) * factor
        total = total * before + tl.load(total_ptr + at) * factor
        top = higher
    out = sums / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + program * D + d, out.to(out_ptr.dtype.element_ty), d < D)
    unit = 1.0 if EXACT else 0.6931471805599453
    lse = tl.where(total > 0, top * unit + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + program + tl.arange(0, 1), lse)


@functools.lru_cache(maxsize=16)
def _on(plan, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.to(device, non_blocking=True) for x in plan.arrays)


def attend(q: Tensor, k: Tensor, v: Tensor, plan, rule: Rule) -> tuple[Tensor, Tensor]:
    """out (B, H, D) of q's dtype, and lse (B, H) float32; `plan` as tree_decode makes it."""
    q = _readable(q)
    k, v = (x if x.stride(2) == 1 and x.dtype == q.dtype else _readable(x) for x in (k, v))
    heads, dim = q.shape[1:]
    item, member, slot, bounds, last, page = _on(plan, q.device)
    repeat, pairs = heads // k.shape[1], len(member)
    sums, (top, total) = (
        q.new_empty((pairs, heads, dim), dtype=torch.float32),
        q.new_empty((2, pairs, heads), dtype=torch.float32),
    )
    settings, exact = launch(dim, q.dtype, plan.most * repeat), q.dtype == torch.float32
    tiles = triton.cdiv(plan.most * repeat, settings["BLOCK_Q"])
    strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    window = NO_WINDOW if rule.window is None else min(rule.window, NO_WINDOW)
    switches = {"CAP": rule.softcap is not None, "WINDOW": rule.window is not None, "EXACT": exact}
    switches["PAGE"] = PAGE if len(page) else 0
    if pairs:
        _attend_kernel[(len(item) * tiles * k.shape[1],)](
            q, k, v, sums, top, total, item, member, last, page, window, tiles, heads, repeat, *strides,
            rule.scale, rule.softcap or 1.0, D=dim, **switches, **settings,
        )  # fmt: skip
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    sizes = {"D": dim, "BLOCK_D": settings["BLOCK_D"], "EXACT": exact, **MERGE_LAUNCH}
    _merge_kernel[(len(q) * heads,)](sums, top, total, slot, bounds, out, lse, heads, **sizes)
    return out, lse
