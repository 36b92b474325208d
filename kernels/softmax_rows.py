"""Statistics of the softmax of each row of logits, and the gradient of any function of them: two row kernels.

    z = logits / temperature        p = softmax(z)        log p = z - lse

    logprob      z[id] - lse                     dz_v   [v == id] - p
    entropy      -sum_v p log p                  dz_v   -p (log p + entropy)
    lse          log sum_v e^z                   dz_v   p
    lse_error    what rounding lse lost          -
    mean_logit   sum_v z / V                     dz_v   1 / V
    sum_sq_prob  sum_v p^2                       dz_v   2 p (p - sum_sq_prob)
    is_top1      1 where z[id] == max_v z        dz_v   0
    mean_logprob sum_v log p / V                 dz_v   1 / V - p

Every gradient has the form a + p (b + c log p + d p) + e [v == id] with coefficients that do not depend on v, so one
kernel writes the gradient of any function of the statistics: its caller adds up a to e row by row.

On a GPU a row is cut into segments at fixed places, and each lane of a program runs through its share of one segment
with a running maximum of its own; lanes, then segments, are merged in a fixed order. So a row's result never depends on
its neighbours, a few long rows still occupy many multiprocessors, and no thread waits for another inside the loop. The
sums are of e^z and z e^z with z measured from the running maximum: nothing cancels, however large the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.jit import tl, triton

# Elements of a row per program, tile of the loop, warps: benchmarks/gpu.sh tries others. None depends on how many rows.
# Fused products are stated as their default changes in Triton 3.10; they would break the exact residuals of the merge.
STATISTICS_LAUNCH = {"SEGMENT": 16384, "DEPTH": 4, "LANES": 1024, "num_warps": 4, "enable_fp_fusion": True}
GRADIENT_LAUNCH = {"BLOCK": 8192, "num_warps": 8, "enable_fp_fusion": True}
MERGE_LAUNCH = {"ROWS": 8, "num_warps": 4, "enable_fp_fusion": False}

# No recompilation for another length or temperature, nor for where a vector of one number per row happens to lie.
_ROW_VECTORS = ["id_ptr", "lse_ptr", "coefficients_ptr", "row_temperature_ptr", "partial_ptr", "statistics_ptr"]
_SPECIALIZE = {"do_not_specialize": ["temperature", "N", "R"], "do_not_specialize_on_alignment": _ROW_VECTORS}

# Which rows of the full list above a caller gets, by how many it asks for.
_CHOSEN_ROWS = {3: [0, 1, 2], 4: [0, 1, 2, 3], 7: [0, 1, 2, 4, 5, 6, 7], 8: [0, 1, 2, 3, 4, 5, 6, 7]}


def reference(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """All eight statistics of each row, (8, N): the definition, in plain torch."""
    z = _scaled(logits, temperature)
    top = z.amax(-1, keepdim=True)
    log_sum = (z - top).exp().sum(-1, keepdim=True).log()
    logp = z - top - log_sum
    p = logp.exp()
    lse = top + log_sum
    # p is 0 long before log p reaches -1e4: the floor changes nothing but 0 * -inf.
    entropy = -(p * logp.clamp_min(-1e4)).sum(-1, keepdim=True)
    valid = ((ids >= 0) & (ids < z.shape[-1]))[:, None]
    chosen = torch.where(valid, ids[:, None], 0)
    is_top1 = (z.gather(-1, chosen) == top).to(z.dtype)
    rows = [logp.gather(-1, chosen), entropy, lse, log_sum - (lse - top)]
    rows += [z.mean(-1, keepdim=True), p.square().sum(-1, keepdim=True), is_top1, logp.mean(-1, keepdim=True)]
    return torch.cat(rows, -1).masked_fill(lse.isnan() | ~valid, torch.nan).t().contiguous()


def reference_gradient(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float | Tensor = 1.0,
    through_tanh: bool = False,
) -> Tensor:
    """(a + p (b + c log p + d p) + e [v == id]) / temperature, (A, R, V): the definition, in plain torch."""
    lse, error = lse if lse.dim() == 2 else (lse, torch.zeros_like(lse))
    logp = _scaled(logits, temperature) - lse[:, None] - error[:, None]
    p = logp.exp()
    a, b, c, d, e = coefficients[:, :, None]
    gradient = a + p * (b + c * logp.clamp_min(-1e4) + d * p)
    gradient.scatter_add_(-1, ids[:, None], e)
    gradient /= temperature[:, None] if isinstance(temperature, Tensor) else temperature
    if through_tanh:
        gradient *= 1 - logits.reshape(gradient.shape).to(gradient.dtype).clamp_min(-1).square()
    return gradient.masked_fill((coefficients == 0).all(0)[:, None], 0.0).view(logits.shape)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of logits of `dtype`: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1]).to(accumulator(logits.dtype))
    return rows / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


@triton.jit
def _row_offset(row, R, stride_a, stride_r):
    """Elements before row `row` of an (A, R, V) view: 32-bit divisions, 64-bit products."""
    return (row // R).to(tl.int64) * stride_a + (row % R).to(tl.int64) * stride_r


@triton.jit
def _merged(top, total, weighted, scale, axis: tl.constexpr):
    """Sums over different elements, each relative to a maximum of its own, as one relative to the greatest."""
    greatest = tl.max(top, axis)
    gap = top - tl.expand_dims(greatest, axis)
    weight = tl.exp2(gap * scale)
    return greatest, tl.sum(weight * total, axis), tl.sum(weight * (weighted + gap * total), axis), weight


@triton.jit(**_SPECIALIZE)
def _segment_kernel(
    x_ptr, row_temperature_ptr, partial_ptr, temperature, N, R, V, stride_a, stride_r,
    MORE: tl.constexpr, SEGMENT: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Partial sums of one segment of one row: (3, N, segments), or 6 with MORE."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    segments = tl.cdiv(V, SEGMENT)
    program = tl.program_id(0)
    row = program // segments
    start = program % segments * SEGMENT
    x_ptr += _row_offset(row, R, stride_a, stride_r)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    scale = tl.full([LANES], 1.4426950408889634 / temperature, dtype)

    # A finite start and a finite floor: a lane that has met nothing but -inf makes no inf - inf and no 0 * inf.
    top = tl.full([LANES], -1e30, dtype)
    total = tl.zeros([LANES], dtype)
    weighted = tl.zeros([LANES], dtype)
    squares = tl.zeros([LANES], dtype)
    linear = tl.zeros([LANES], dtype)
    shifted = tl.zeros([LANES], dtype)
    count = tl.zeros([LANES], dtype)
    v = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for first in range(start, tl.minimum(start + SEGMENT, V), DEPTH * LANES):
        inside = v < V - first
        x = tl.load(x_ptr + first + v, inside, other=float("-inf")).to(dtype)
        raised = tl.maximum(top, tl.max(x, 0))
        gap = tl.maximum(x - raised[None, :], -1e30, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.exp2(gap * scale[None, :])
        fall = top - raised
        decay = tl.exp2(fall * scale)
        weighted = decay * (weighted + fall * total) + tl.sum(gap * weight, 0)
        total = decay * total + tl.sum(weight, 0)
        if MORE:
            squares = decay * decay * squares + tl.sum(weight * weight, 0)
            linear += tl.sum(tl.where(inside, x, 0.0), 0)
            shifted += count * fall + tl.sum(tl.where(inside, x - raised[None, :], 0.0), 0)
            count += tl.sum(inside.to(dtype), 0)
        top = raised

    greatest, total, weighted, weight = _merged(top, total, weighted, scale, 0)
    partial_ptr += program
    plane = N.to(tl.int64) * segments
    tl.store(partial_ptr, greatest)
    tl.store(partial_ptr + plane, total)
    tl.store(partial_ptr + 2 * plane, weighted)
    if MORE:
        tl.store(partial_ptr + 3 * plane, tl.sum(weight * weight * squares))
        tl.store(partial_ptr + 4 * plane, tl.sum(linear))
        tl.store(partial_ptr + 5 * plane, tl.sum(shifted + count * (top - greatest)))


@triton.jit(**_SPECIALIZE)
def _merge_kernel(
    x_ptr, id_ptr, row_temperature_ptr, partial_ptr, statistics_ptr, temperature, N, R, V, stride_a, stride_r, segments,
    ERROR: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Statistics of ROWS rows from their partial sums; SEGMENTS is `segments` rounded up to a power of two."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    if row_temperature_ptr is not None:
        inverse = 1.0 / tl.load(row_temperature_ptr + row, inside, other=1.0)
    else:
        inverse = tl.full([ROWS], 1.0 / temperature, dtype)
    segment = tl.arange(0, SEGMENTS)[None, :]
    present = inside[:, None] & (segment < segments)
    partial_ptr += row.to(tl.int64)[:, None] * segments + segment
    plane = N.to(tl.int64) * segments
    tops = tl.load(partial_ptr, present, other=-1e30)
    total = tl.load(partial_ptr + plane, present, other=0.0)
    weighted = tl.load(partial_ptr + 2 * plane, present, other=0.0)
    top, total, weighted, weight = _merged(tops, total, weighted, (inverse * 1.4426950408889634)[:, None], 1)

    chosen = tl.load(id_ptr + row, inside, other=0)
    # Nothing is left of a row of -inf, of one with NaN or +inf, or of one whose id does not exist.
    defined = (chosen >= 0) & (chosen < V) & (total > 0)
    total = tl.where(defined, total, float("nan"))
    x = tl.load(x_ptr + _row_offset(row, R, stride_a, stride_r) + chosen, inside & defined, other=0.0).to(dtype)
    log_sum = tl.log(total)
    z_top = top * inverse
    lse = z_top + log_sum
    statistics_ptr += row
    N = N.to(tl.int64)
    tl.store(statistics_ptr, (x - top) * inverse - log_sum, inside)
    tl.store(statistics_ptr + N, log_sum - weighted / total * inverse, inside)
    tl.store(statistics_ptr + 2 * N, lse, inside)
    if ERROR:
        statistics_ptr += N
        tl.store(statistics_ptr + 2 * N, log_sum - (lse - z_top) + tl.fma(top, inverse, -z_top), inside)
    if MORE:
        squares = tl.sum(weight * weight * tl.load(partial_ptr + 3 * plane, present, other=0.0), 1)
        linear = tl.sum(tl.load(partial_ptr + 4 * plane, present, other=0.0), 1)
        tl.store(statistics_ptr + 3 * N, tl.where(defined, linear / V * inverse, total), inside)
        tl.store(statistics_ptr + 4 * N, squares / (total * total), inside)
        tl.store(statistics_ptr + 5 * N, tl.where(defined, (x == top).to(dtype), total), inside)
        count = tl.minimum(V - segment * SEGMENT, SEGMENT)
        shifted = tl.load(partial_ptr + 5 * plane, present, other=0.0) + count * (tops - top[:, None])
        shifted = tl.sum(tl.where(present, shifted, 0.0), 1)
        tl.store(statistics_ptr + 6 * N, tl.where(defined, shifted / V * inverse - log_sum, total), inside)


@triton.jit(**_SPECIALIZE)
def _gradient_kernel(
    x_ptr, id_ptr, lse_ptr, coefficients_ptr, row_temperature_ptr, out_ptr, temperature, N, R, V, stride_a, stride_r,
    out_stride_a, out_stride_r, ERROR: tl.constexpr, THROUGH_TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of one row; a row whose coefficients are all zero is written and not read."""
    blocks = tl.cdiv(V, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    v = program % blocks * BLOCK + tl.arange(0, BLOCK)
    coefficients_ptr += row
    N = N.to(tl.int64)
    a = tl.load(coefficients_ptr)
    b = tl.load(coefficients_ptr + N)
    c = tl.load(coefficients_ptr + 2 * N)
    d = tl.load(coefficients_ptr + 3 * N)
    e = tl.load(coefficients_ptr + 4 * N)
    live = (a != 0) | (b != 0) | (c != 0) | (d != 0) | (e != 0)
    if row_temperature_ptr is not None:
        temperature = tl.load(row_temperature_ptr + row)
    scale = tl.full([BLOCK], 1.0 / temperature, a.dtype)

    # A dead row goes through unread as p = 0, and so does what lies beyond the row.
    x_ptr += _row_offset(row, R, stride_a, stride_r)
    x = tl.load(x_ptr + v, v < tl.where(live, V, 0), other=float("-inf")).to(a.dtype)
    lse = tl.load(lse_ptr + row, live, other=0.0)
    logp = tl.fma(x, scale, tl.full([BLOCK], -lse, a.dtype))
    if ERROR:
        logp -= tl.load(lse_ptr + N + row, live, other=0.0)
    # p is 0 long before log p reaches -1e4: the floor changes nothing but 0 * -inf.
    logp = tl.maximum(logp, -1e4, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(logp * 1.4426950408889634)
    a *= scale
    constant = tl.where(v == tl.load(id_ptr + row).to(tl.int32), a + e * scale, a)
    gradient = constant + p * (b * scale + c * scale * logp + d * scale * p)
    if THROUGH_TANH:
        x = tl.maximum(x, -1.0)  # what was not read, and -inf
        gradient *= 1.0 - x * x
    out_ptr += _row_offset(row, R, out_stride_a, out_stride_r)
    tl.store(out_ptr + v, gradient.to(out_ptr.dtype.element_ty), v < V)


def _triton_statistics(logits, ids, temperature, row_temperature, rows):
    A, R, V = logits.shape
    segments = triton.cdiv(V, STATISTICS_LAUNCH["SEGMENT"])
    statistics = logits.new_empty((rows, A * R), dtype=accumulator(logits.dtype))
    partial = statistics.new_empty((6 if rows > 4 else 3, A * R, segments))
    row_temperature = _precise(temperature, row_temperature, logits, A * R)
    sizes = temperature, A * R, R, V, *_strides(logits)
    with torch.cuda.device_of(logits):
        _segment_kernel[(A * R * segments,)](
            logits, row_temperature, partial, *sizes, MORE=rows > 4, **STATISTICS_LAUNCH
        )
        _merge_kernel[(triton.cdiv(A * R, MERGE_LAUNCH["ROWS"]),)](
            logits, ids, row_temperature, partial, statistics, *sizes, segments,
            ERROR=rows in (4, 8), MORE=rows > 4, SEGMENTS=triton.next_power_of_2(segments),
            SEGMENT=STATISTICS_LAUNCH["SEGMENT"], **MERGE_LAUNCH,
        )  # fmt: skip
    return statistics


def _triton_gradient(logits, ids, lse, coefficients, temperature, row_temperature, out, through_tanh):
    A, R, V = logits.shape
    row_temperature = _precise(temperature, row_temperature, logits, A * R)
    sizes = temperature, A * R, R, V, *_strides(logits), *_strides(out)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(A * R * triton.cdiv(V, GRADIENT_LAUNCH["BLOCK"]),)](
            logits, ids, lse, coefficients, row_temperature, out, *sizes,
            ERROR=lse.dim() == 2, THROUGH_TANH=through_tanh, **GRADIENT_LAUNCH,
        )  # fmt: skip


def _strides(x):
    """The strides that address a row; that of a single leading index only tells lengths apart, so it is left out."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def _precise(temperature, row_temperature, logits, N):
    """Triton passes a number as float32; float64 logits take theirs from memory."""
    if row_temperature is not None or logits.dtype != torch.float64:
        return row_temperature
    return logits.new_full((N,), temperature)


def _cpu_statistics(logits, ids, temperature, row_temperature, rows):
    from fuserl import _C

    statistics = logits.new_empty((rows, ids.numel()), dtype=accumulator(logits.dtype))
    _C.softmax_rows_forward(logits, ids, row_temperature, temperature, statistics, torch.get_num_threads())
    return statistics


def _cpu_gradient(logits, ids, lse, coefficients, temperature, row_temperature, out, through_tanh):
    from fuserl import _C

    threads = torch.get_num_threads()
    _C.softmax_rows_gradient(logits, ids, lse, coefficients, row_temperature, temperature, out, threads, through_tanh)


def _reference_statistics(logits, ids, temperature, row_temperature, rows):
    return reference(logits, ids, temperature if row_temperature is None else row_temperature)[_CHOSEN_ROWS[rows]]


def _reference_gradient(logits, ids, lse, coefficients, temperature, row_temperature, out, through_tanh):
    temperature = temperature if row_temperature is None else row_temperature
    out.copy_(reference_gradient(logits, ids, lse, coefficients, temperature, through_tanh))


IMPLS = {
    "triton": (_triton_statistics, _triton_gradient),
    "cpu": (_cpu_statistics, _cpu_gradient),
    "reference": (_reference_statistics, _reference_gradient),
}


def forward(
    logits: Tensor, ids: Tensor, temperature: float, row_temperature: Tensor | None, rows: int, backend: str
) -> Tensor:
    """Statistics of each row of logits, read once; the list, with equations, is at the top of this file.

    Args:
        logits: (A, R, V) of N = A * R rows, floating, stride 1 in V, any other strides. -inf is a token that cannot be
            drawn; NaN, +inf or -inf everywhere makes the row's statistics NaN.
        ids: (N,) int64, contiguous, in [0, V). The C++ backend raises on any other; elsewhere its row is NaN.
        temperature: positive; unread where row_temperature is given.
        row_temperature: (N,) positive, contiguous, of the statistics' dtype, or None.
        rows: 3 for logprob, entropy, lse; 7 for mean_logit, sum_sq_prob, is_top1 and mean_logprob as well; 4 or 8 for
            the same with lse_error after lse.
        backend: a key of IMPLS.

    Returns:
        (rows, N), float32, or float64 from float64 logits.

    Memory: up to six numbers per 16,384 logits, on a GPU.
    """
    if ids.numel() == 0:
        return logits.new_empty((rows, 0), dtype=accumulator(logits.dtype))
    return IMPLS[backend][0](logits, ids, temperature, row_temperature, rows)


def gradient(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    temperature: float,
    row_temperature: Tensor | None,
    out: Tensor,
    backend: str,
    *,
    through_tanh: bool = False,
) -> None:
    """Write out = (a + p (b + c log p + d p) + e [v == id]) / temperature, where p == 0 contributes 0.

    Args:
        logits, ids, temperature, row_temperature: as `forward` had them.
        lse: (N,) as `forward` returned it, or (2, N) with lse_error: it matters where |lse| is in the thousands.
        coefficients: (5, N) rows a, b, c, d, e, contiguous, in the dtype of lse. A row of zeros is filled, not read.
        out: (A, R, V), stride 1 in V, floating; may be logits itself.
        backend: a key of IMPLS.
        through_tanh: logits are tanh(u): write the gradient to u, (1 - logits^2) times that to logits, and 0 at -inf.
    """
    if out.numel() > 0:
        IMPLS[backend][1](logits, ids, lse, coefficients, temperature, row_temperature, out, through_tanh)
