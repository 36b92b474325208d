"""Sums and means of tokens over ragged segments, and values of segments spread over their tokens.

    sum[s] = sum of x[t] over offsets[s] <= t < offsets[s + 1]        to_tokens(y)[t] = y[segment of t]

Each is the other's gradient. A segment is added up in a fixed order, whatever lies beside it: on CPU in double.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.registration import register

__all__ = ["segment_mean", "segment_sum", "to_tokens"]

LAUNCH = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def reference(x: Tensor, offsets: Tensor) -> Tensor:
    """The definition of the sums, in plain torch."""
    return x.new_zeros((x.shape[0], len(offsets) - 1)).index_add(1, _segments(offsets, x.shape[1]), x)


def _segments(offsets: Tensor, tokens: int) -> Tensor:
    """Which segment each token is of, (N,)."""
    return torch.searchsorted(offsets[1:], torch.arange(tokens, device=offsets.device), right=True)


@triton.jit(do_not_specialize=["N", "segments"])
def _sum_kernel(x_ptr, offsets_ptr, out_ptr, N, segments, BLOCK: tl.constexpr):
    """One segment of one row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    segment = program - row * segments
    begin = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    x_ptr += row * N
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for first in range(begin, end, BLOCK):
        total += tl.load(x_ptr + first + lane, first + lane < end, other=0.0)
    tl.store(out_ptr + program, tl.sum(total))


@triton.jit(do_not_specialize=["N", "segments", "programs"])
def _spread_kernel(x_ptr, offsets_ptr, out_ptr, N, segments, programs, BLOCK: tl.constexpr):
    """BLOCK tokens of one row; each finds its segment by search."""
    program = tl.program_id(0).to(tl.int64)
    row = program // programs
    t = (program - row * programs) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.zeros([BLOCK], tl.int64)
    beyond = segment + segments
    while tl.max(beyond - segment) > 1:
        middle = (segment + beyond) // 2
        begun = tl.load(offsets_ptr + middle) <= t
        segment, beyond = tl.where(begun, middle, segment), tl.where(begun, beyond, middle)
    inside = t < N
    tl.store(out_ptr + row * N + t, tl.load(x_ptr + row * segments + segment, inside, other=0.0), inside)


def _triton_sum(x, offsets):
    out = _per_segment(x, offsets)
    with torch.cuda.device_of(x):
        _sum_kernel[(out.numel(),)](x, offsets, out, x.shape[1], out.shape[1], **LAUNCH)
    return out


def _triton_spread(x, offsets, tokens):
    out = x.new_empty((x.shape[0], tokens))
    programs = triton.cdiv(tokens, LAUNCH["BLOCK"])
    with torch.cuda.device_of(x):
        _spread_kernel[(x.shape[0] * programs,)](x, offsets, out, tokens, x.shape[1], programs, **LAUNCH)
    return out


def _cpu_sum(x, offsets):
    from fuserl import _C

    out = _per_segment(x, offsets)
    _C.segment_sum(x, offsets, out, torch.get_num_threads())
    return out


def _cpu_spread(x, offsets, tokens):
    from fuserl import _C

    out = x.new_empty((x.shape[0], tokens))
    _C.to_tokens(x, offsets, out, torch.get_num_threads())
    return out


def _reference_spread(x, offsets, tokens):
    return x[:, _segments(offsets, tokens)]


def _per_segment(x, offsets):
    return x.new_empty((x.shape[0], offsets.shape[0] - 1))


IMPLS = {"triton": _triton_sum, "cpu": _cpu_sum, "reference": reference}
SPREADS = {"triton": _triton_spread, "cpu": _cpu_spread, "reference": _reference_spread}


def _dispatch_sum(x, offsets, backend):
    backend = choose("segment_sum", IMPLS, x.device, backend)
    if x.numel() == 0 or len(offsets) == 1:
        return _per_segment(x, offsets).zero_()
    return IMPLS[backend](x.contiguous(), offsets.contiguous())


def _dispatch_spread(x, offsets, tokens, backend):
    backend = choose("to_tokens", SPREADS, x.device, backend)
    if x.numel() == 0 or tokens == 0:
        return x.new_zeros((x.shape[0], tokens))
    return SPREADS[backend](x.contiguous(), offsets.contiguous(), tokens)


def _keep(ctx, inputs, output):
    x, offsets, *_, ctx.backend = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(offsets)


def _backward_sum(ctx, g):
    return _to_tokens(g, *ctx.saved_tensors, ctx.tokens, ctx.backend), None, None


def _backward_spread(ctx, g):
    return _segment_sum(g, *ctx.saved_tensors, ctx.backend), None, None, None


def _fake_sum(x, offsets, _):
    return _per_segment(x, offsets)


def _fake_spread(x, _offsets, tokens, _):
    return x.new_empty((x.shape[0], tokens))


_segment_sum = register(
    "segment_sum(Tensor x, Tensor offsets, str? backend) -> Tensor",
    _dispatch_sum,
    _fake_sum,
    keep=_keep,
    backward=_backward_sum,
)
_to_tokens = register(
    "to_tokens(Tensor x, Tensor offsets, SymInt tokens, str? backend) -> Tensor",
    _dispatch_spread,
    _fake_spread,
    keep=_keep,
    backward=_backward_spread,
)


def segment_sum(x: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum of the tokens of each segment, in a fixed order.

        sum[s] = sum of x[t] over offsets[s] <= t < offsets[s + 1]

    Args:
        x: (..., N) float32 or float64, the tokens of all segments one after the other.
        offsets: (B + 1,) int64, where each segment begins, and N at the end. Segments may be empty. On GPU, where a
            check would wait, wrong ones give wrong numbers.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (..., B) of x's dtype, differentiable in x; 0 for an empty segment.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Sibling: `to_tokens` is its gradient.
    """
    _check("segment_sum", "x", x, offsets, x.dim() >= 1, "(..., N)")
    return _segment_sum(_rows(x), offsets, backend).view(*x.shape[:-1], offsets.shape[0] - 1)


def segment_mean(x: Tensor, offsets: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of the tokens of each segment, 0 for an empty one: `segment_sum` over the segment's length.

    Args:
        x, offsets, backend: as for `segment_sum`.

    Returns:
        (..., B) of x's dtype, differentiable in x.

    Raises:
        ValueError: as `segment_sum`.
    """
    return segment_sum(x, offsets, backend=backend) / offsets.diff().clamp(min=1)


def to_tokens(per_segment: Tensor, offsets: Tensor, tokens: int, *, backend: str | None = None) -> Tensor:
    """Each segment's value at every one of its tokens.

    Args:
        per_segment: (..., B) float32 or float64.
        offsets: (B + 1,) int64, as for `segment_sum`.
        tokens: N, which offsets end with; reading it from a GPU would wait.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (..., N) of per_segment's dtype, differentiable in it.

    Raises:
        ValueError: on a wrong shape, dtype or device, and on CPU for offsets that decrease or miss an end.

    Sibling: `segment_sum` is its gradient.
    """
    fits = per_segment.dim() >= 1 and offsets.dim() == 1 and per_segment.shape[-1] == len(offsets) - 1
    _check("to_tokens", "per_segment", per_segment, offsets, fits, "(..., B) for offsets (B + 1,),")
    out = _to_tokens(_rows(per_segment), offsets, tokens, backend)
    return out.view(*per_segment.shape[:-1], tokens)


def _check(function: str, name: str, x: Tensor, offsets: Tensor, fits: bool, shape: str) -> None:
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int64 or offsets.device != x.device:
        raise ValueError(
            f"{function}: offsets must be (B + 1,) int64 on {x.device}; got {tuple(offsets.shape)} {offsets.dtype} on "
            f"{offsets.device}. Give where each segment begins, and the end of the last."
        )
    if not fits or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{function}: {name} must be {shape} float32 or float64; got {tuple(x.shape)} {x.dtype}. "
            "Check which tensor was passed, and convert it with .float()."
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
