"""Triton kernels of gaussian_logprob: sums of rows over tiles of rows and dimensions, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.divergence_terms import TERMS, _log_one_plus
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.policy_tokens import _exponentials

__all__ = ["backward", "forward"]

# Elements of a tile: whole rows, or a piece of one. A row's sums depend on nothing but its own elements.
TILE = 1024
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _scales(ptr, row, column, rows, columns, D, LOGS: tl.constexpr, PER_ROW: tl.constexpr, PER_DIMENSION: tl.constexpr):
    """Scales as given, one over each standard deviation, and its logarithm; a column, a row or a number where alike."""
    r, c = tl.arange(0, rows.shape[0])[:, None], tl.arange(0, columns.shape[1])[None, :]
    nowhere: tl.constexpr = 0.0 if LOGS else 1.0
    if PER_ROW and PER_DIMENSION:
        x = tl.load(ptr + row * D + column + r * D + c, rows & columns, other=nowhere)
    elif PER_ROW:
        x = tl.load(ptr + row + r, rows, other=nowhere)
    elif PER_DIMENSION:
        x = tl.load(ptr + column + c, columns, other=nowhere)
    else:
        x = tl.load(ptr + tl.zeros([1, 1], tl.int32))
    if LOGS:
        inverse, log = tl.exp(-x), x
    else:
        inverse, log = 1.0 / x, tl.log(x)
    return x, inverse, log


@triton.jit
def _log_ratio(scale, ref, ref_inverse, LOGS: tl.constexpr, LOG_TERMS: tl.constexpr):
    """Log of the standard deviation over the reference's, to its own last digits where the two are close."""
    if LOGS:
        t = scale - ref
    else:
        less_one = (scale - ref) * ref_inverse
        close = tl.abs(less_one) < 0.5
        t = tl.where(close, _log_one_plus(tl.where(close, less_one, 0.0), LOG_TERMS), tl.log(scale * ref_inverse))
    return t


@triton.jit
def _place(N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """First row and dimension of a program's tile, which of its rows and dimensions there are, and what piece it is."""
    program, pieces = tl.program_id(0).to(tl.int64), tl.cdiv(D, BLOCK)
    row, piece = program // pieces * ROWS, program % pieces
    rows = tl.arange(0, ROWS)[:, None] < tl.minimum(N - row, ROWS).to(tl.int32)
    columns = tl.arange(0, BLOCK)[None, :] < tl.minimum(D - piece * BLOCK, BLOCK).to(tl.int32)
    return row, piece * BLOCK, rows, columns, piece


@triton.jit
def _kept(mask_ptr, row, column, at, rows, columns, D, MASK_PER_ROW: tl.constexpr):
    """Which elements of a tile have a part."""
    keep = rows & columns
    if mask_ptr is not None:
        if MASK_PER_ROW:
            keep = keep & (tl.load(mask_ptr + row * D + column + at, keep, other=0) != 0)
        else:
            c = tl.arange(0, columns.shape[1])[None, :]
            keep = keep & (tl.load(mask_ptr + column + c, columns, other=0) != 0)
    return keep


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    action_ptr, mean_ptr, scale_ptr, ref_mean_ptr, ref_scale_ptr, mask_ptr, logprob_ptr, entropy_ptr, kl_ptr, N, D,
    LOGS: tl.constexpr, PER_ROW: tl.constexpr, PER_DIMENSION: tl.constexpr, REF_PER_ROW: tl.constexpr,
    REF_PER_DIMENSION: tl.constexpr, MASK_PER_ROW: tl.constexpr, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's rows, each (pieces, N)."""
    dtype: tl.constexpr = logprob_ptr.dtype.element_ty
    row, column, rows, columns, piece = _place(N, D, ROWS, BLOCK)
    first = row * D + column
    at = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, BLOCK)[None, :]
    inside = rows & columns
    keep = _kept(mask_ptr, row, column, at, rows, columns, D, MASK_PER_ROW)
    mean = tl.load(mean_ptr + first + at, inside, other=0.0)
    scale, inverse, log = _scales(scale_ptr, row, column, rows, columns, D, LOGS, PER_ROW, PER_DIMENSION)
    z = (tl.load(action_ptr + first + at, inside, other=0.0) - mean) * inverse
    log += tl.full([1, 1], 0.91893853320467274178, dtype)
    out = piece * N + row + tl.arange(0, ROWS)
    there = tl.arange(0, ROWS) < tl.minimum(N - row, ROWS).to(tl.int32)
    tl.store(logprob_ptr + out, tl.sum(tl.where(keep, -0.5 * z * z - log, 0.0), 1), there)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + out, tl.sum(tl.where(keep, log + 0.5, 0.0), 1), there)
    if kl_ptr is not None:
        ref, ref_inverse, _ = _scales(
            ref_scale_ptr, row, column, rows, columns, D, LOGS, REF_PER_ROW, REF_PER_DIMENSION
        )  # fmt: skip
        apart = (mean - tl.load(ref_mean_ptr + first + at, inside, other=0.0)) * ref_inverse
        _, _, rest = _exponentials(2.0 * _log_ratio(scale, ref, ref_inverse, LOGS, LOG_TERMS), TERMS)
        tl.store(kl_ptr + out, tl.sum(tl.where(keep, 0.5 * (rest + apart * apart), 0.0), 1), there)


@triton.jit
def _store_scale(
    ptr, gradient, row, column, piece, at, rows, columns, N, D, PER_ROW: tl.constexpr, PER_DIMENSION: tl.constexpr
):  # fmt: skip
    """A tile's part of the gradient of a scale: (N, D), or sums over what the scale does not tell apart."""
    r, c = tl.arange(0, rows.shape[0]), tl.arange(0, columns.shape[1])
    if PER_ROW and PER_DIMENSION:
        tl.store(ptr + row * D + column + at, gradient, rows & columns)
    elif PER_ROW:
        tl.store(ptr + piece * N + row + r, tl.sum(gradient, 1), r < tl.minimum(N - row, rows.shape[0]).to(tl.int32))
    elif PER_DIMENSION:
        there = c < tl.minimum(D - column, columns.shape[1]).to(tl.int32)
        tl.store(ptr + row // rows.shape[0] * D + column + c, tl.sum(gradient, 0), there)
    else:
        tl.store(ptr + tl.program_id(0), tl.sum(gradient))


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    action_ptr, mean_ptr, scale_ptr, ref_mean_ptr, ref_scale_ptr, mask_ptr, g_logprob_ptr, g_entropy_ptr, g_kl_ptr,
    d_action_ptr, d_mean_ptr, d_scale_ptr, d_ref_mean_ptr, d_ref_scale_ptr, N, D,
    LOGS: tl.constexpr, PER_ROW: tl.constexpr, PER_DIMENSION: tl.constexpr, REF_PER_ROW: tl.constexpr,
    REF_PER_DIMENSION: tl.constexpr, MASK_PER_ROW: tl.constexpr, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's elements, and its parts of those of scales."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    row, column, rows, columns, piece = _place(N, D, ROWS, BLOCK)
    first = row * D + column
    r = tl.arange(0, ROWS)[:, None]
    at = r * D + tl.arange(0, BLOCK)[None, :]
    inside = rows & columns
    keep = _kept(mask_ptr, row, column, at, rows, columns, D, MASK_PER_ROW)
    mean = tl.load(mean_ptr + first + at, inside, other=0.0)
    scale, inverse, _ = _scales(scale_ptr, row, column, rows, columns, D, LOGS, PER_ROW, PER_DIMENSION)
    to_mean = tl.zeros([ROWS, BLOCK], dtype)
    to_action, to_log = to_mean, to_mean
    if g_logprob_ptr is not None:
        g = tl.load(g_logprob_ptr + row + r, rows, other=0.0)
        z = (tl.load(action_ptr + first + at, inside, other=0.0) - mean) * inverse
        alive = keep & (g != 0)
        to_mean = tl.where(alive, g * z * inverse, 0.0)
        to_action = -to_mean
        to_log = tl.where(alive, g * (z * z - 1.0), 0.0)
    if g_entropy_ptr is not None:
        to_log += tl.where(keep, tl.load(g_entropy_ptr + row + r, rows, other=0.0), 0.0)
    if g_kl_ptr is not None:
        g = tl.load(g_kl_ptr + row + r, rows, other=0.0)
        ref, ref_inverse, _ = _scales(
            ref_scale_ptr, row, column, rows, columns, D, LOGS, REF_PER_ROW, REF_PER_DIMENSION
        )  # fmt: skip
        apart = (mean - tl.load(ref_mean_ptr + first + at, inside, other=0.0)) * ref_inverse
        _, less_one, _ = _exponentials(2.0 * _log_ratio(scale, ref, ref_inverse, LOGS, LOG_TERMS), TERMS)
        alive = keep & (g != 0)
        to_apart = tl.where(alive, g * apart * ref_inverse, 0.0)
        to_mean += to_apart
        to_log += tl.where(alive, g * less_one, 0.0)
        if d_ref_mean_ptr is not None:
            tl.store(d_ref_mean_ptr + first + at, -to_apart, inside)
        if d_ref_scale_ptr is not None:
            to_ref = tl.where(alive, -g * (less_one + apart * apart), 0.0)
            if not LOGS:
                to_ref = tl.where(to_ref == 0, 0.0, to_ref * ref_inverse)
            _store_scale(
                d_ref_scale_ptr, to_ref, row, column, piece, at, rows, columns, N, D, REF_PER_ROW, REF_PER_DIMENSION
            )  # fmt: skip
    if d_action_ptr is not None:
        tl.store(d_action_ptr + first + at, to_action, inside)
    if d_mean_ptr is not None:
        tl.store(d_mean_ptr + first + at, to_mean, inside)
    if d_scale_ptr is not None:
        if not LOGS:
            to_log = tl.where(to_log == 0, 0.0, to_log * inverse)
        _store_scale(d_scale_ptr, to_log, row, column, piece, at, rows, columns, N, D, PER_ROW, PER_DIMENSION)


def _launched(given):
    """What both kernels are compiled for, and programs, (of rows, of pieces of a row)."""
    N, D = given.actions.shape
    block = min(triton.next_power_of_2(D), TILE)
    rows = TILE // block
    (per_row, per_dimension), (ref_per_row, ref_per_dimension) = (_told_apart(x, D) for x in given[2:5:2])
    settings = {
        "LOGS": given.logs, "PER_ROW": per_row, "PER_DIMENSION": per_dimension, "REF_PER_ROW": ref_per_row,
        "REF_PER_DIMENSION": ref_per_dimension, "MASK_PER_ROW": given.mask is not None and given.mask.dim() == 2,
        "ROWS": rows, "BLOCK": block, **TERMS[given.actions.dtype], **LAUNCH,
    }  # fmt: skip
    return settings, (triton.cdiv(N, rows), triton.cdiv(D, block))


def _told_apart(scale, D):
    """Whether a scale has an entry for each row, and for each dimension."""
    if scale is None:
        return False, False
    return scale.dim() == 2, scale.shape[-1] == D


def forward(given, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Log-probs, entropies and divergences, (N,), of a `Given` on the current stream; None if not wanted."""
    N, D = given.actions.shape
    settings, (tiles, pieces) = _launched(given)
    out = [given.actions.new_empty((pieces, N)) if want else None for want in wanted]
    if N:
        with torch.cuda.device_of(given.actions):
            _forward_kernel[(tiles * pieces,)](*given[:6], *out, N, D, **settings)
    return [x if x is None else _summed(x) for x in out]


def backward(given, g: list[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    """Gradients to the first five of a `Given` on the current stream; None if not wanted."""
    N, D = given.actions.shape
    settings, (tiles, pieces) = _launched(given)
    scales = _parts(given.scale, N, D, tiles, pieces), _parts(given.ref_scale, N, D, tiles, pieces)
    shapes = (N, D), (N, D), scales[0], (N, D), scales[1]
    out = [given.mean.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    if N:
        with torch.cuda.device_of(given.actions):
            _backward_kernel[(tiles * pieces,)](*given[:6], *g, *out, N, D, **settings)
    for i in (2, 4):
        if wanted[i] and _told_apart(given[i], D) != (True, True):
            out[i] = _summed(out[i]).view(given[i].shape)
    return out


def _parts(scale, N, D, tiles, pieces):
    """The shape of what tiles write of a scale's gradient."""
    per_row, per_dimension = _told_apart(scale, D)
    if per_row:
        return (N, D) if per_dimension else (pieces, N)
    return (tiles, D) if per_dimension else (tiles * pieces, 1)


def _summed(parts):
    return parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float64).to(parts.dtype)
