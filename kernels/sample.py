"""One token per row of logits: temperature, top-k, top-p and min-p, drawn by one fused op that sorts nothing.

    w[v]  = round(2^((x[v] - max x) log2(e) / temperature + bits)),  bits = 52 - bit_length(V)
    kept  = {v: x[v] >= cut},  cut the largest of those asked for:
            top_k   the k-th largest logit
            top_p   the largest logit that with all above it has top_p of the weight that top_k left
            min_p   max x + temperature log(min_p)
    id    = the first v with w[0] + ... + w[v] > floor(r W / 2^64) over kept tokens, W their total weight

    logprob = log(p[id] / p(kept))        full_logprob = log p[id]        p = softmax(x / temperature)

Weights are integers whose sum is below 2^53, so it is the same in whatever order it is taken: threads, tiles and
neighbours cannot show in a draw. Every backend rounds a weight in the same places, float32 operations one by one and
none fused, so all of them draw the same token. One less likely than the likeliest by 2^-(bits + 1) is never drawn.

r is 64 random bits of Philox4x32-10, keyed by the seed, at the counter (rollout_id, position): kernels/philox.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels.dispatch import choose
from fuserl.kernels.jit import tl, triton
from fuserl.kernels.philox import high_product, random_bits, row_bits
from fuserl.kernels.registration import register

__all__ = ["check_settings", "sample"]

# A program draws a row, which lies in the L2 cache after its first look at it.
LAUNCH = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": False}

_LOG2E, _ROUND = 1.4426950408889634, 12582912.0  # adding _ROUND leaves the nearest integer in a float's low bits
_EXP2 = (
    0.00015353361959569156, 0.0013398873852565885, 0.00961843691766262, 0.055503323674201965, 0.24022647738456726,
    0.6931471824645996, 1.0,
)  # fmt: skip


class Rule(NamedTuple):
    """The numbers of a call; top_k 0, top_p 1 and log_min_p -infinity cut nothing."""

    temperature: float
    top_k: int
    top_p: float
    log_min_p: float
    seed: int


def reference(logits: Tensor, temperature: Tensor, rule: Rule, random: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in plain torch: ids (N,), and both log-probs and the least logit that is not cut (3, N)."""
    x, greedy, bits = logits.float(), temperature == 0, weight_bits(logits.shape[1])
    t, peak = torch.where(greedy, 1.0, temperature)[:, None], x.amax(-1, keepdim=True)
    weights = _weights(x - peak, _LOG2E / t, bits)
    ordered, order = x.sort(descending=True, stable=True)
    cut = peak + rule.log_min_p * t
    kth = ordered[:, min(rule.top_k or x.shape[1], x.shape[1]) - 1, None]
    cut = cut.maximum(kth)
    if rule.top_p < 1:
        mass = weights.masked_fill(x < kth, 0).gather(-1, order).cumsum(-1).double()
        cut = cut.maximum(ordered.gather(-1, (mass >= rule.top_p * mass[:, -1:]).int().argmax(-1, keepdim=True)))
    kept = weights.masked_fill(x < torch.where(greedy[:, None], peak, cut), 0).cumsum(-1)
    target = torch.where(greedy, 0, high_product(random, kept[:, -1]))
    ids = (kept > target[:, None]).int().argmax(-1)
    z = (x.gather(-1, ids[:, None]) - peak)[:, 0].double() / t[:, 0]
    full = z - (weights.sum(-1).double() * 2.0**-bits).log()
    of_kept = torch.where(greedy, full, z - (kept[:, -1].double() * 2.0**-bits).log())
    logprobs = torch.stack([of_kept, full, torch.where(greedy[:, None], peak, cut)[:, 0]])
    valid = peak[:, 0].isfinite() & ~x.isnan().any(-1)
    return ids.masked_fill(~valid, -1), logprobs.float().masked_fill(~valid, torch.nan)


def weight_bits(vocabulary: int) -> int:
    """The weight of the likeliest token is two to this, and the sum of all below 2^53."""
    return 52 - vocabulary.bit_length()


def _weights(distance: Tensor, scale: Tensor, bits: int) -> Tensor:
    y = (distance * scale).clamp_min(-(bits + 2.0))
    whole = (y + _ROUND) - _ROUND
    f = y - whole
    p = torch.full_like(f, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = p * f + coefficient
    scaled = p.view(torch.int32) + ((whole + bits).int() << 23)
    return (scaled.view(torch.float32) + 0.5).long()


@triton.jit
def _tile(x_ptr, first, V, least, peak, scale, bits, BLOCK: tl.constexpr):
    """The logits of a tile, and the weights of those that are not below `least`."""
    v = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + v, v < V - first, other=float("-inf")).to(tl.float32)
    y = tl.maximum((x - peak) * scale, -(bits + 2.0))
    shifted = y + 12582912.0
    f = y - (shifted - 12582912.0)
    p = 0.00015353361959569156 * f + 0.0013398873852565885
    p = p * f + 0.00961843691766262
    p = p * f + 0.055503323674201965
    p = p * f + 0.24022647738456726
    p = p * f + 0.6931471824645996
    p = p * f + 1.0
    exponent = (shifted.to(tl.int32, bitcast=True) + bits) << 23
    weights = ((p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True) + 0.5).to(tl.int64)
    return x, tl.where(x >= least, weights, 0)


@triton.jit
def _above(x_ptr, V, a, b, c, peak, scale, bits, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Total weight, or number, of the tokens at or above each of three logits, the least first."""
    total_a = tl.full([], 0, tl.int64)
    total_b = tl.full([], 0, tl.int64)
    total_c = tl.full([], 0, tl.int64)
    for first in range(0, V, BLOCK):
        x, measure = _tile(x_ptr, first, V, a, peak, scale, bits, BLOCK)
        if not WEIGHTED:
            measure = (x >= a).to(tl.int64)
        total_a += tl.sum(measure)
        total_b += tl.sum(tl.where(x >= b, measure, 0))
        total_c += tl.sum(tl.where(x >= c, measure, 0))
    return total_a, total_b, total_c


@triton.jit
def _total(x_ptr, V, least, peak, scale, bits, BLOCK: tl.constexpr):
    """Total weight of the tokens at or above a logit."""
    total = tl.full([], 0, tl.int64)
    for first in range(0, V, BLOCK):
        total += tl.sum(_tile(x_ptr, first, V, least, peak, scale, bits, BLOCK)[1])
    return total


@triton.jit
def _logit(key):
    """The float that stands at this place in the order of all floats, 0 at 0."""
    magnitude = tl.abs(key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)


@triton.jit
def _place(logit):
    bits = logit.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _reaching(x_ptr, V, goal, low, peak, scale, bits, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit that with all above it measures `goal` or more, as `low` must: two bits of it a look."""
    low = _place(low)
    high = _place(peak) + 1
    while high - low > 1:
        step = (high - low + 3) >> 2
        a = low + step
        b = tl.minimum(a + step, high)
        c = tl.minimum(b + step, high)
        at_a, at_b, at_c = _above(x_ptr, V, _logit(a), _logit(b), _logit(c), peak, scale, bits, WEIGHTED, BLOCK)
        a_reaches = at_a.to(tl.float64) >= goal
        b_reaches = at_b.to(tl.float64) >= goal
        c_reaches = at_c.to(tl.float64) >= goal
        high = tl.where(a_reaches, tl.where(b_reaches, tl.where(c_reaches, high, c), b), a)
        low = tl.where(c_reaches, c, tl.where(b_reaches, b, tl.where(a_reaches, a, low)))
    return _logit(low)


@triton.jit
def _peak(x_ptr, V, BLOCK: tl.constexpr):
    """The largest logit; NaN if there is one."""
    v = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(x_ptr + first + v, v < V - first, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.sum((top != top).to(tl.int32)) > 0, float("nan"), tl.max(top))


_NUMBERS = ["temperature", "top_k", "top_p", "log_min_p", "seed", "N"]
_VECTORS = ["temperature_ptr", "rollout_ptr", "position_ptr", "id_ptr", "logprob_ptr"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_VECTORS)
def _row_kernel(
    x_ptr, temperature_ptr, rollout_ptr, position_ptr, id_ptr, logprob_ptr, temperature: tl.float32, top_k: tl.int64,
    top_p: tl.float64, log_min_p: tl.float32, seed: tl.int64, N: tl.int64, V, stride, bits: tl.int32, unit: tl.float32,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draws one row; `unit` is 2^-bits, and CUT says that any token may be cut."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    t = tl.where(greedy, 1.0, temperature)
    scale = tl.div_rn(1.4426950408889634, t)
    peak = _peak(x_ptr, V, BLOCK)
    valid = (peak > float("-inf")) & (peak < float("inf"))
    peak = tl.where(valid, peak, 0.0)

    least = tl.full([], float("-inf"), tl.float32)
    full = _total(x_ptr, V, least, peak, scale, bits, BLOCK)
    kept = full
    if CUT:
        least = tl.where(greedy, peak, peak + log_min_p * t)
        # Tokens below it weigh nothing, whether they are cut or not.
        low = tl.maximum(peak - (bits + 2.0) / scale, -3.4028234663852886e38)
        left = full
        if TOP_K:
            goal = top_k.to(tl.float64)
            if _above(x_ptr, V, low, low, low, peak, scale, bits, False, BLOCK)[0].to(tl.float64) >= goal:
                low = _reaching(x_ptr, V, goal, low, peak, scale, bits, False, BLOCK)
                least = tl.maximum(least, low)
                left = _total(x_ptr, V, low, peak, scale, bits, BLOCK)
        if TOP_P:
            goal = top_p * left.to(tl.float64)
            least = tl.maximum(least, _reaching(x_ptr, V, goal, low, peak, scale, bits, True, BLOCK))
        kept = _total(x_ptr, V, least, peak, scale, bits, BLOCK)
    # Here, where they take no register of the search.
    tl.store(logprob_ptr + 2 * N + row, least)
    log_full = tl.log(full.to(tl.float32) * unit)
    log_kept = tl.log(kept.to(tl.float32) * unit)
    random = row_bits(seed, tl.load(rollout_ptr + row), tl.load(position_ptr + row))
    target = tl.where(greedy, 0, tl.umulhi(random, kept.to(tl.uint64)).to(tl.int64))
    first = 0
    before = tl.full([], 0, tl.int64)
    mass = tl.sum(_tile(x_ptr, first, V, least, peak, scale, bits, BLOCK)[1])
    while (before + mass <= target) & (first + BLOCK < V):
        before += mass
        first += BLOCK
        mass = tl.sum(_tile(x_ptr, first, V, least, peak, scale, bits, BLOCK)[1])
    _, weights = _tile(x_ptr, first, V, least, peak, scale, bits, BLOCK)
    v = first + tl.arange(0, BLOCK)
    chosen = tl.min(tl.where(before + tl.cumsum(weights, 0) > target, v, V - 1))
    z = (tl.load(x_ptr + chosen).to(tl.float32) - peak) / t
    of_full = z - log_full
    of_kept = tl.where(greedy, of_full, z - log_kept)
    tl.store(id_ptr + row, tl.where(valid, chosen, -1))
    tl.store(logprob_ptr + row, tl.where(valid, of_kept, float("nan")))
    tl.store(logprob_ptr + N + row, tl.where(valid, of_full, float("nan")))


def _triton(logits, row_temperature, rule, rollout_ids, positions):
    N, V = logits.shape
    ids, logprobs = _outputs(logits)
    bits, top_k, top_p = weight_bits(V), 0 < rule.top_k < V, rule.top_p < 1
    cut = top_k or top_p or rule.log_min_p > -math.inf or row_temperature is not None or rule.temperature == 0
    with torch.cuda.device_of(logits):
        _row_kernel[(N,)](
            logits, row_temperature, rollout_ids, positions, ids, logprobs, *rule, N, V, logits.stride(0), bits,
            2.0**-bits, TOP_K=top_k, TOP_P=top_p, CUT=cut, **LAUNCH,
        )  # fmt: skip
    return ids, logprobs


def _cpu(logits, row_temperature, rule, rollout_ids, positions):
    from fuserl import _C

    ids, logprobs = _outputs(logits)
    _C.sample(logits, row_temperature, *rule, rollout_ids, positions, ids, logprobs, torch.get_num_threads())
    return ids, logprobs


def _reference(logits, row_temperature, rule, rollout_ids, positions):
    if row_temperature is None:
        row_temperature = torch.full_like(positions, rule.temperature, dtype=torch.float32)
    return reference(logits, row_temperature, rule, random_bits(rule.seed, rollout_ids, positions))


def _outputs(logits):
    rows = logits.shape[0]  # len() would tie what torch.compile makes to this number
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty((3, rows), dtype=torch.float32)


IMPLS = {"triton": _triton, "cpu": _cpu, "reference": _reference}


def _dispatch(logits, row_temperature, *numbers):
    *rule, rollout_ids, positions, backend = numbers
    backend = choose("sample", IMPLS, logits.device, backend)
    if len(logits) == 0:
        return _outputs(logits)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    row_temperature = None if row_temperature is None else row_temperature.contiguous()
    names = rollout_ids.contiguous(), positions.contiguous()
    ids, logprobs = IMPLS[backend](logits, row_temperature, Rule(*rule), *names)
    if ids.device.type == "cpu" and bool((ids < 0).any()):
        row = int((ids < 0).nonzero()[0])
        raise ValueError(
            f"sample: logits must have a finite maximum and no NaN in every row; row {row} has "
            f"{'NaN' if logits[row].isnan().any() else f'the maximum {logits[row].amax().item()}'}. "
            "Look for what overflowed in the model."
        )
    return ids, logprobs


_sample = register(
    "sample(Tensor logits, Tensor? row_temperature, float temperature, int top_k, float top_p, float log_min_p, "
    "int seed, Tensor rollout_ids, Tensor positions, str? backend) -> (Tensor, Tensor)",
    _dispatch,
    lambda logits, *_: _outputs(logits),
)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    rollout_ids: Tensor,
    positions: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A token drawn from each row of logits after temperature, top-k, top-p and min-p, with its log-probs.

        p = softmax(logits / temperature), cut and renormalised;  id = the first v with p_0 + ... + p_v > u

    A row's result is a function of its logits, the settings, `seed`, its rollout id and its position: the same alone
    and among others, on any number of threads and in every backend.

    Args:
        logits: (N, V) float32, bfloat16 or float16, any stride between rows. -inf is a token that cannot be drawn.
        temperature: 0, or 1e-30 to 1e30, or one per row; 0 takes the first of the largest logits, whatever the cuts.
        top_k: keep the k likeliest tokens, and ties with the k-th; 0 keeps all.
        top_p: then keep the fewest whose probabilities reach this share of what top_k left, and ties with the last;
            1 keeps all.
        min_p: then keep those at least this times as likely as the likeliest; 0 keeps all.
        seed: 64 bits, negative numbers by their two's complement; with the next two what the random number is made of.
        rollout_ids: (N,) int64: which rollout a row belongs to.
        positions: (N,) int64: which of its tokens this is.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (ids, logprob, full_logprob): (N,) int64, and (N,) float32 twice: log-probabilities of the id at this
        temperature, under what the cuts left, and under the uncut distribution. For temperature 0, where the first
        would be 0 throughout, both are the second at temperature 1. Nothing is differentiable.

    Raises:
        ValueError: on a wrong shape, dtype or setting, and on CPU for a row with NaN, +inf or nothing but -inf; on GPU,
            where a check would wait, such a row gets id -1 and log-probs NaN.

    Memory: on CPU two rows of float32 a thread, eight with top_k or top_p; none on GPU.
    Siblings: `token_logprob` gives these log-probs to a gradient; `kept` lists what the cuts left.
    """
    ids, logprobs = drawn(logits, temperature, (top_k, top_p, min_p), seed, rollout_ids, positions, backend)
    return ids, logprobs[0], logprobs[1]


def drawn(logits, temperature, cuts, seed, rollout_ids, positions, backend) -> tuple[Tensor, Tensor]:
    """What `sample` gives, its log-probs in one tensor with the least logit that is not cut: (N,) and (3, N)."""
    top_k, top_p, min_p = cuts
    check_settings(temperature, *cuts)
    _check(logits, temperature, rollout_ids, positions)
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature, temperature = temperature.detach().to(logits.device, torch.float32), 1.0
    # In float32 here, so that all backends mean the same number; without a tensor, of which nothing could be recorded.
    (log_min_p,) = struct.unpack("f", struct.pack("f", math.log(min_p) if min_p > 0 else -math.inf))
    seed = (int(seed) + 2**63) % 2**64 - 2**63
    return _sample(
        logits.detach(), row_temperature, float(temperature), top_k, float(top_p), log_min_p, seed, rollout_ids,
        positions, backend,
    )  # fmt: skip


def check_settings(temperature: float | Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError for a setting of `sample` that is out of its range."""
    usable = isinstance(temperature, Tensor) or temperature == 0 or 1e-30 <= temperature <= 1e30
    for name, value, good, contract in (
        ("temperature", temperature, usable, "be 0 or 1e-30 to 1e30"),
        ("top_k", top_k, top_k >= 0, "be 0 (off) or positive"),
        ("top_p", top_p, 0 < top_p <= 1, "lie in (0, 1]"),
        ("min_p", min_p, 0 <= min_p <= 1, "lie in [0, 1]"),
    ):
        if not good:
            raise ValueError(f"sample: {name} must {contract}; got {value}. Change the setting.")


def _check(logits: Tensor, temperature: float | Tensor, rollout_ids: Tensor, positions: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16) or logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(
            f"sample: logits must be (N, V) float32, bfloat16 or float16; got {tuple(logits.shape)} {logits.dtype}. "
            "Flatten leading dimensions, and convert float64 with .float()."
        )
    if isinstance(temperature, Tensor) and temperature.shape != logits.shape[:1]:
        raise ValueError(
            f"sample: temperature must be a number or ({len(logits)},); got {tuple(temperature.shape)}. Expand it."
        )
    for name, x in (("rollout_ids", rollout_ids), ("positions", positions)):
        if x.shape != logits.shape[:1] or x.dtype != torch.int64 or x.device != logits.device:
            raise ValueError(
                f"sample: {name} must be ({len(logits)},) int64 on {logits.device}; got {tuple(x.shape)} {x.dtype} on "
                f"{x.device}. Give each row its own."
            )
