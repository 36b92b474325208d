"""Divergence of each row of logits from a row of others, and the gradients of that and of the entropy: row kernels.

    p = softmax(logits_p / temperatures[0])        q = softmax(logits_q / temperatures[1])

    divergence   sum_v F(p, q)                     dz_p   p dF/dp - p slope_p
                                                   dz_q   q dF/dq - q slope_q
    entropy      -sum_v p log p                    dz_p   -p (log p + entropy)
    slope_p      sum_v p dF/dp                     -
    slope_q      sum_v q dF/dq                     -

F of every kind, and its derivatives, are in divergence_terms. One pass over both rows for the two normalisers, one for
the sums: on a CPU, where a row stays in the cache, memory is read once. The gradient is one read of both and one write.
log p - log q is taken from the logits' difference, which is exact where they are close, and not from two logarithms: so
where p is near q, divergences of 1e-10 and their gradients have as many digits as those of 1. The two slopes are summed
though they would follow from the divergence: an error of a normaliser is in them, too, and cancels in the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows
from fuserl.kernels.divergence_terms import TERMS, Rule, reference_terms, triton_terms
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.softmax_rows import _row_offset, _strides

# What is kept of each row: divergence, entropy, lse_p, what rounding it lost, lse_q, that, slope_p, slope_q.
STATISTICS = 8
# Elements of a row per program, tile of its loop; none depends on how many rows there are.
SUMS_LAUNCH = {"SEGMENT": 16384, "BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}
GRADIENT_LAUNCH = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": True}
MERGE_LAUNCH = {"ROWS": 8, "num_warps": 4, "enable_fp_fusion": True}
_SPECIALIZE = {
    "do_not_specialize": ["N", "R_p", "R_q"],
    "do_not_specialize_on_alignment": ["temperature_ptr", "statistics_ptr", "partial_ptr", "g_ptr"],
}


def reference(logits_p: Tensor, logits_q: Tensor, temperatures: Tensor, rule: Rule) -> Tensor:
    """All statistics of each row, (8, N): the definition, in plain torch."""
    log_p, log_q = _log_probs(logits_p, temperatures[0]), _log_probs(logits_q, temperatures[1])
    value, *slopes = (rule.scale * x.sum(-1) for x in reference_terms(log_p, log_q, rule))
    # p is 0 long before log p reaches -1e4: the floor changes nothing but 0 * -inf.
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
    lse = [_scaled(x, t).logsumexp(-1) for x, t in zip((logits_p, logits_q), temperatures, strict=True)]
    undefined = ~(lse[0] + lse[1]).isfinite()
    rows = [value.masked_fill(undefined, torch.nan), entropy, lse[0], 0 * lse[0], lse[1], 0 * lse[1], *slopes]
    return torch.stack(rows)


def reference_gradient(
    logits_p: Tensor, logits_q: Tensor, temperatures: Tensor, statistics: Tensor, g: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Gradients to both logits, (A, R, V): the definition, in plain torch."""
    log_p, log_q = _log_probs(logits_p, temperatures[0]), _log_probs(logits_q, temperatures[1])
    value, entropy, sum_p, sum_q = (statistics[i, :, None] for i in (0, 1, 6, 7))
    infinite, undefined = value.isinf(), value.isnan()
    g, g_entropy = g[:, :, None]
    _, p_slope, q_slope = reference_terms(log_p, log_q, rule)
    d_p = g * (rule.scale * p_slope - log_p.exp() * sum_p)
    d_q = g * (rule.scale * q_slope - log_q.exp() * sum_q)
    d_p, d_q = (x.masked_fill(infinite, 0.0) for x in (d_p, d_q))
    d_p = d_p - g_entropy * log_p.exp() * (log_p.clamp_min(-1e4) + entropy)
    dead = (g == 0) & (g_entropy == 0), g == 0
    logits = zip((d_p, d_q), dead, temperatures, (logits_p, logits_q), strict=True)
    return tuple(
        (x.masked_fill(undefined, torch.nan).masked_fill(none, 0.0) / t[:, None]).view(like.shape)
        for x, none, t, like in logits
    )


def _scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1]).to(temperature.dtype) / temperature[:, None]


def _log_probs(logits: Tensor, temperature: Tensor) -> Tensor:
    return _scaled(logits, temperature).log_softmax(-1)


@triton.jit
def _pair(x_p, x_q, temperature_ptr, statistics_ptr, row, N):
    """p, q, log p, log q and log p - log q of a tile of one row; nothing where neither has the token."""
    t_p, t_q = tl.load(temperature_ptr + row), tl.load(temperature_ptr + N + row)
    lse_p, error_p = tl.load(statistics_ptr + 2 * N + row), tl.load(statistics_ptr + 3 * N + row)
    lse_q, error_q = tl.load(statistics_ptr + 4 * N + row), tl.load(statistics_ptr + 5 * N + row)
    inverse = 1.0 / t_p
    log_p = tl.fma(x_p, tl.zeros_like(x_p) + inverse, tl.zeros_like(x_p) - lse_p) - error_p
    log_q = tl.fma(x_q, tl.zeros_like(x_q) + 1.0 / t_q, tl.zeros_like(x_q) - lse_q) - error_q
    # p is 0 long before log p reaches -1e4.
    p = tl.exp2(tl.maximum(log_p, -1e4, propagate_nan=tl.PropagateNan.ALL) * 1.4426950408889634)
    q = tl.exp2(tl.maximum(log_q, -1e4, propagate_nan=tl.PropagateNan.ALL) * 1.4426950408889634)
    gap = (lse_p - lse_q) + (error_p - error_q)
    d = (x_p - (t_p / t_q) * x_q) * inverse - gap
    none = (x_p == float("-inf")) & (x_q == float("-inf"))
    return p, q, log_p, log_q, tl.where(none, 0.0, d)


@triton.jit(**_SPECIALIZE)
def _sums_kernel(
    p_ptr, q_ptr, temperature_ptr, statistics_ptr, partial_ptr, N, V, R_p, stride_a_p, stride_r_p,
    R_q, stride_a_q, stride_r_q, parameter: tl.float64, KIND: tl.constexpr, TERMS: tl.constexpr,
    LOG_TERMS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of F, p dF/dp and q dF/dq over one segment of one row: (3, N, segments)."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    segments = tl.cdiv(V, SEGMENT)
    program = tl.program_id(0)
    row = program // segments
    start = program % segments * SEGMENT
    p_ptr += _row_offset(row, R_p, stride_a_p, stride_r_p)
    q_ptr += _row_offset(row, R_q, stride_a_q, stride_r_q)
    N = N.to(tl.int64)
    v = tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], dtype)
    sum_p = tl.zeros([BLOCK], dtype)
    sum_q = tl.zeros([BLOCK], dtype)
    for first in range(start, tl.minimum(start + SEGMENT, V), BLOCK):
        inside = v < V - first
        x_p = tl.load(p_ptr + first + v, inside, other=float("-inf")).to(dtype)
        x_q = tl.load(q_ptr + first + v, inside, other=float("-inf")).to(dtype)
        p, q, log_p, log_q, d = _pair(x_p, x_q, temperature_ptr, statistics_ptr, row, N)
        term, p_slope, q_slope = triton_terms(
            p, q, log_p, log_q, d, tl.full([BLOCK], parameter, dtype), KIND, TERMS, LOG_TERMS
        )
        value += term
        sum_p += p_slope
        sum_q += q_slope
    tl.store(partial_ptr + program, tl.sum(value))
    tl.store(partial_ptr + N * segments + program, tl.sum(sum_p))
    tl.store(partial_ptr + 2 * N * segments + program, tl.sum(sum_q))


@triton.jit(**_SPECIALIZE)
def _merge_kernel(
    partial_ptr, statistics_ptr, N, segments, scale: tl.float64, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Divergence and both slopes of ROWS rows from their partial sums; NaN where either row has no softmax."""
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    segment = tl.arange(0, SEGMENTS)[None, :]
    present = inside[:, None] & (segment < segments)
    N = N.to(tl.int64)
    partial_ptr += row.to(tl.int64)[:, None] * segments + segment
    value = tl.sum(tl.load(partial_ptr, present, other=0.0), 1)
    slope_p = tl.sum(tl.load(partial_ptr + N * segments, present, other=0.0), 1)
    slope_q = tl.sum(tl.load(partial_ptr + 2 * N * segments, present, other=0.0), 1)
    scale = tl.full([ROWS], scale, dtype)
    statistics_ptr += row
    both = tl.load(statistics_ptr + 2 * N, inside, other=0.0) + tl.load(statistics_ptr + 4 * N, inside, other=0.0)
    scale = tl.where(both == both, scale, float("nan"))
    tl.store(statistics_ptr, scale * value, inside)
    tl.store(statistics_ptr + 6 * N, scale * slope_p, inside)
    tl.store(statistics_ptr + 7 * N, scale * slope_q, inside)


@triton.jit(**_SPECIALIZE)
def _gradient_kernel(
    p_ptr, q_ptr, temperature_ptr, statistics_ptr, g_ptr, out_p_ptr, out_q_ptr, N, V, R_p, stride_a_p, stride_r_p,
    R_q, stride_a_q, stride_r_q, out_stride_a, out_stride_r, parameter: tl.float64, scale: tl.float64,
    KIND: tl.constexpr, TERMS: tl.constexpr, LOG_TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of one row; out_q is dense, or None. A row whose g is zero is written and not read.

    All of a block is read before any of it is written: out_p may be the memory of either side, where out_q is None.
    """
    dtype: tl.constexpr = statistics_ptr.dtype.element_ty
    blocks = tl.cdiv(V, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    v = program % blocks * BLOCK + tl.arange(0, BLOCK)
    N = N.to(tl.int64)
    value = tl.load(statistics_ptr + row)
    g, g_entropy = tl.load(g_ptr + row), tl.load(g_ptr + N + row)
    # An infinite divergence has no part in the gradient.
    infinite = tl.abs(value) == float("inf")
    g = tl.where(infinite, 0.0, g)
    sum_p = tl.where(infinite, 0.0, tl.load(statistics_ptr + 6 * N + row))
    sum_q = tl.where(infinite, 0.0, tl.load(statistics_ptr + 7 * N + row))
    live = (g != 0) | (g_entropy != 0)
    # A dead row goes through unread as one that has no token, and so does what lies beyond the row.
    inside = v < tl.where(live, V, 0)
    x_p = tl.load(p_ptr + _row_offset(row, R_p, stride_a_p, stride_r_p) + v, inside, other=float("-inf")).to(dtype)
    x_q = tl.load(q_ptr + _row_offset(row, R_q, stride_a_q, stride_r_q) + v, inside, other=float("-inf")).to(dtype)
    p, q, log_p, log_q, d = _pair(x_p, x_q, temperature_ptr, statistics_ptr, row, N)
    _, p_slope, q_slope = triton_terms(
        p, q, log_p, log_q, d, tl.full([BLOCK], parameter, dtype), KIND, TERMS, LOG_TERMS
    )
    scaled = g * tl.full([BLOCK], scale, dtype)
    p_slope = tl.where(scaled == 0, 0.0, scaled * p_slope)
    log_p = tl.where(p > 0, log_p, 0.0)
    gradient = p_slope + p * (-g * sum_p - g_entropy * (log_p + tl.load(statistics_ptr + N + row)))
    gradient = tl.where(live, gradient / tl.load(temperature_ptr + row), 0.0)
    out_p_ptr += _row_offset(row, R_p, out_stride_a, out_stride_r) + v
    tl.store(out_p_ptr, gradient.to(out_p_ptr.dtype.element_ty), v < V)
    if out_q_ptr is not None:
        gradient = (scaled * q_slope - g * sum_q * q) / tl.load(temperature_ptr + N + row)
        out_q_ptr += row.to(tl.int64) * V + v
        tl.store(out_q_ptr, tl.where(g != 0, gradient, 0.0).to(out_q_ptr.dtype.element_ty), v < V)


def _triton_statistics(logits_p, logits_q, temperatures, rule):
    N, V = temperatures.shape[1], logits_p.shape[2]
    statistics = temperatures.new_empty((STATISTICS, N))
    ids = torch.zeros(N, dtype=torch.int64, device=logits_p.device)
    for logits, temperature, first in ((logits_p, temperatures[0], 2), (logits_q, temperatures[1], 4)):
        found = softmax_rows.forward(logits, ids, 1.0, temperature, 4, "triton")
        statistics[first : first + 2] = found[2:]
        if first == 2:
            statistics[1] = found[1]
    segments = triton.cdiv(V, SUMS_LAUNCH["SEGMENT"])
    partial = temperatures.new_empty((3, N, segments))
    with torch.cuda.device_of(logits_p):
        _sums_kernel[(N * segments,)](
            logits_p, logits_q, temperatures, statistics, partial, N, V, *_rows(logits_p), *_rows(logits_q),
            rule.parameter, KIND=rule.kind, **TERMS[statistics.dtype], **SUMS_LAUNCH,
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(N, MERGE_LAUNCH["ROWS"]),)](
            partial, statistics, N, segments, rule.scale, SEGMENTS=triton.next_power_of_2(segments), **MERGE_LAUNCH,
        )  # fmt: skip
    return statistics


def _triton_gradient(logits_p, logits_q, temperatures, statistics, g, rule, out_p, out_q):
    N, V = temperatures.shape[1], logits_p.shape[2]
    with torch.cuda.device_of(logits_p):
        _gradient_kernel[(N * triton.cdiv(V, GRADIENT_LAUNCH["BLOCK"]),)](
            logits_p, logits_q, temperatures, statistics, g, out_p, out_q, N, V, *_rows(logits_p), *_rows(logits_q),
            *_strides(out_p), rule.parameter, rule.scale,
            KIND=rule.kind, **TERMS[statistics.dtype], **GRADIENT_LAUNCH,
        )  # fmt: skip


def _rows(x):
    return x.shape[1], *_strides(x)


def _cpu_statistics(logits_p, logits_q, temperatures, rule):
    from fuserl import _C

    statistics = temperatures.new_empty((STATISTICS, temperatures.shape[1]))
    _C.divergence_forward(logits_p, logits_q, temperatures, *rule, statistics, torch.get_num_threads())
    return statistics


def _cpu_gradient(logits_p, logits_q, temperatures, statistics, g, rule, out_p, out_q):
    from fuserl import _C

    rows = logits_p, logits_q, temperatures, *rule, statistics, g, out_p, out_q
    _C.divergence_gradient(*rows, torch.get_num_threads())


def _reference_gradient(logits_p, logits_q, temperatures, statistics, g, rule, out_p, out_q):
    d_p, d_q = reference_gradient(logits_p, logits_q, temperatures, statistics, g, rule)
    out_p.copy_(d_p)
    if out_q is not None:
        out_q.copy_(d_q)


IMPLS = {
    "triton": (_triton_statistics, _triton_gradient),
    "cpu": (_cpu_statistics, _cpu_gradient),
    "reference": (reference, _reference_gradient),
}
