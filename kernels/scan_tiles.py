"""The Triton kernels of discounted_scan and gae: a fixed split of every segment into tiles, in two launches.

The first leaves what each tile does to any x that comes to it, one product and one sum; the second adds up those of the
tiles before its own, in their order, and scans again from there. A tile is counted from where its segment's scan
begins. Program p of a row finds its segment by search: segment s has the programs from offsets[s] // BLOCK + s on,
which is never too few, so nobody has to wait for the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton

LAUNCH = {"BLOCK": 2048, "TILES": 128, "num_warps": 8, "enable_fp_fusion": True}

_POINTERS = (
    "b_ptr", "a_ptr", "offsets_ptr", "value_ptr", "gamma_ptr", "lam_ptr", "bootstrap_ptr", "mask_ptr", "x_ptr",
    "returns_ptr", "state_ptr",
)  # fmt: skip
_RUNTIME = {"do_not_specialize": ["N", "segments", "programs", "factor", "gamma", "lam"]}


@triton.jit
def _joined(a_before, b_before, a, b):
    """Two stretches of a scan as one: x -> b + a (b_before + a_before x); links that overflow carry no zero."""
    return a * a_before, b + tl.where(b_before == 0, 0.0, a * b_before)


@triton.jit
def _nearest(known_before, v_before, known, v):
    """The value that is nearest, of those known."""
    return known_before | known, tl.where(known, v, v_before)


@triton.jit
def _place(offsets_ptr, N, segments, programs, BLOCK: tl.constexpr):
    """Row, segment, its first and one past its last token, and this program's tile of it."""
    program = tl.program_id(0).to(tl.int64)
    row = program // programs
    program -= row * programs
    segment = tl.full([], 0, tl.int64)
    begin = tl.full([], 0, tl.int64)
    end = begin + N
    if offsets_ptr is not None:
        beyond = segment + segments
        while beyond - segment > 1:
            middle = (segment + beyond) // 2
            before = tl.load(offsets_ptr + middle) // BLOCK + middle <= program
            segment = tl.where(before, middle, segment)
            beyond = tl.where(before, beyond, middle)
        begin = tl.load(offsets_ptr + segment)
        end = tl.load(offsets_ptr + segment + 1)
        program -= begin // BLOCK + segment
    return row, segment, begin, end, program


@triton.jit
def _next_values(v_ptr, mask_ptr, t, inside, end, bootstrap, BLOCK: tl.constexpr):
    """The value of the next token that counts, beyond the segment `bootstrap`."""
    last = t + 1 >= end
    v = tl.where(last, bootstrap, tl.load(v_ptr + t + 1, inside & ~last, other=0.0))
    if mask_ptr is not None:
        known = last | (tl.load(mask_ptr + t + 1, inside & ~last, other=0) != 0)
        known, v = tl.associative_scan((known, v), 0, _nearest, reverse=True)
        if tl.sum((inside & ~known).to(tl.int32)) > 0:
            at = tl.max(t) + 2
            lane = tl.arange(0, BLOCK)
            first = end
            while (first == end) & (at < end):
                kept = tl.load(mask_ptr + at + lane, at + lane < end, other=0) != 0
                first = tl.minimum(first, tl.min(tl.where(kept, at + lane, end)))
                at += BLOCK
            beyond = tl.where(first < end, tl.load(v_ptr + first, first < end, other=0.0), bootstrap)
            v = tl.where(known, v, beyond)
    return v


@triton.jit
def _tile(
    b_ptr, a_ptr, value_ptr, gamma_ptr, lam_ptr, bootstrap_ptr, mask_ptr, factor, gamma, lam, t, begin, end,
    FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Links and summands of a tile's tokens, 1 and 0 where there is none."""
    inside = (t >= begin) & (t < end)
    b = tl.load(b_ptr + t, inside, other=0.0)
    dtype: tl.constexpr = b.dtype
    if value_ptr is None:
        a = tl.full([BLOCK], factor, dtype)
        if a_ptr is not None:
            if FORWARD:
                a = tl.load(a_ptr + t - 1, inside & (t > begin), other=1.0)
            else:
                a = tl.load(a_ptr + t, inside, other=1.0)
    else:
        g = tl.full([BLOCK], gamma, dtype)
        if gamma_ptr is not None:
            g = tl.load(gamma_ptr + t, inside, other=1.0)
        a = tl.full([BLOCK], lam, dtype)
        if lam_ptr is not None:
            a = tl.load(lam_ptr + t, inside, other=1.0)
        a *= g
        bootstrap = tl.full([], 0.0, dtype)
        if bootstrap_ptr is not None:
            bootstrap = tl.load(bootstrap_ptr)
        following = _next_values(value_ptr, mask_ptr, t, inside, end, bootstrap, BLOCK)
        b += g * following - tl.load(value_ptr + t, inside, other=0.0)
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + t, inside, other=0) != 0)
    return tl.where(inside, a, 1.0), tl.where(inside, b, 0.0), inside


@triton.jit
def _after(state_ptr, tile, TILES: tl.constexpr):
    """The scan at the end of the tiles before this one."""
    carry = tl.full([], 0.0, state_ptr.dtype.element_ty)
    lane = tl.arange(0, TILES)
    for first in range(0, tile, TILES):
        known = first + lane < tile
        a = tl.load(state_ptr + 2 * (first + lane), known, other=1.0)
        b = tl.load(state_ptr + 2 * (first + lane) + 1, known, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _joined)
        of_last = lane == TILES - 1
        a = tl.sum(tl.where(of_last, a, 0.0))
        carry = tl.sum(tl.where(of_last, b, 0.0)) + tl.where(carry == 0, 0.0, a * carry)
    return carry


@triton.jit(**_RUNTIME)
def _tile_kernel(
    b_ptr, a_ptr, offsets_ptr, value_ptr, gamma_ptr, lam_ptr, bootstrap_ptr, mask_ptr, x_ptr, returns_ptr, state_ptr,
    N, segments, programs, factor: tl.float64, gamma: tl.float64, lam: tl.float64,
    FORWARD: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile: what it does to any x that comes to it, into state (rows, programs, 2), or with WRITE its x."""
    row, segment, begin, end, tile = _place(offsets_ptr, N, segments, programs, BLOCK)
    lane = tl.arange(0, BLOCK)
    first = begin + tile * BLOCK if FORWARD else end - (tile + 1) * BLOCK
    if begin + tile * BLOCK < end:
        b_ptr += row * N
        if a_ptr is not None:
            a_ptr += row * N
        if value_ptr is not None:
            value_ptr += row * N
        if gamma_ptr is not None:
            gamma_ptr += row * N
        if lam_ptr is not None:
            lam_ptr += row * N
        if mask_ptr is not None:
            mask_ptr += row * N
        if bootstrap_ptr is not None:
            bootstrap_ptr += row * segments + segment
        t = first + lane
        a, b, inside = _tile(
            b_ptr, a_ptr, value_ptr, gamma_ptr, lam_ptr, bootstrap_ptr, mask_ptr, factor, gamma, lam, t, begin, end,
            FORWARD, BLOCK,
        )  # fmt: skip
        a, b = tl.associative_scan((a, b), 0, _joined, reverse=not FORWARD)
        state_ptr += 2 * tl.program_id(0).to(tl.int64)
        if WRITE:
            carry = _after(state_ptr - 2 * tile, tile, TILES)
            x = b + tl.where(carry == 0, 0.0, a * carry)
            written = (t >= begin) & (t < end)
            if value_ptr is not None:
                value = tl.load(value_ptr + t, inside, other=0.0)
                x = tl.where(inside, x, 0.0)
                tl.store(returns_ptr + row * N + t, x + value, written)
            tl.store(x_ptr + row * N + t, x, written)
        else:
            at_end = lane == (BLOCK - 1 if FORWARD else 0)
            tl.store(state_ptr, tl.sum(tl.where(at_end, a, 0.0)))
            tl.store(state_ptr + 1, tl.sum(tl.where(at_end, b, 0.0)))


def launch(tensors: dict[str, Tensor | None], *, factor=1.0, gamma=1.0, lam=1.0, forward=False) -> None:
    """Run both kernels on `tensors`, named as the kernel's pointers without `_ptr`: (C, N) each, offsets (B + 1,)."""
    b, offsets, block = tensors["b"], tensors.get("offsets"), LAUNCH["BLOCK"]
    rows, N = b.shape
    segments = 1 if offsets is None else len(offsets) - 1
    programs = triton.cdiv(N, block) + (0 if offsets is None else segments)
    state = b.new_empty((rows, programs, 2))
    pointers = [tensors.get(name.removesuffix("_ptr")) for name in _POINTERS[:-1]]
    arguments = *pointers, state, N, segments, programs, factor, gamma, lam
    with torch.cuda.device_of(b):
        for write in (False, True):
            if write or block < N:  # else there is one tile a segment, with nothing before it
                _tile_kernel[(rows * programs,)](*arguments, FORWARD=forward, WRITE=write, **LAUNCH)
