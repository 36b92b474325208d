"""Divergence from a teacher of whom only the best tokens of each row are known: k of them, and the rest as one bucket.

    buckets of p: p[ids[0]], ..., p[ids[k-1]], 1 - their sum        those of q: exp(teacher_logprobs), 1 - their sum
    divergence[n] = sum over buckets of F(p, q), as in divergence
    dz[n, v]      = G[i] where v = ids[i], else G[k] p[v] / (1 - sum of the listed)

with G the gradient to the logarithms of the buckets. Merging tokens never makes a divergence greater, so this is a
bound from below, and with k = V the divergence itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows
from fuserl.kernels.dispatch import choose
from fuserl.kernels.divergence import divergence
from fuserl.kernels.registration import register
from fuserl.kernels.softmax_rows import accumulator
from fuserl.kernels.token_logprob import row_temperatures, rows_of

__all__ = ["topk_divergence"]

IMPLS = softmax_rows.IMPLS


def reference(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Logarithms of the buckets of p, (..., k + 1), or k where that is V: the definition, in plain torch."""
    temperature = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    logp = (logits.to(accumulator(logits.dtype)) / temperature).log_softmax(-1)
    listed = logp.gather(-1, ids)
    if ids.shape[-1] == logits.shape[-1]:
        return listed
    return torch.cat([listed, _log_of_rest(listed, listed.dtype)], -1)


def _log_of_rest(listed: Tensor, dtype: torch.dtype) -> Tensor:
    """log(1 - sum e^listed), (..., 1) of `dtype`, at least the logarithm of its epsilon."""
    rest = 1 - listed.double().exp().sum(-1, keepdim=True)
    return rest.clamp_min(torch.finfo(dtype).eps).log().to(dtype)


def buckets_of(logits, ids, temperature, backend, op="topk_divergence"):
    """Logarithms of the buckets of p, the entropy of p, and what is kept of the rows for the gradient, (4, N)."""
    backend = choose(op, IMPLS, logits.device, backend)
    rows, flat = rows_of(logits), ids.reshape(-1, ids.shape[-1])
    if flat.device.type == "cpu" and flat.numel() and not (flat.min() >= 0 and flat.max() < logits.shape[-1]):
        raise ValueError(
            f"{op}: ids must lie in [0, {logits.shape[-1]}); got {int(flat.min())} to {int(flat.max())}. "
            "Cut the lists to tokens that the student has."
        )
    statistics = softmax_rows.forward(rows, flat[:, 0].contiguous(), 1.0, temperature, 4, backend)
    entropy, lse = statistics[1], statistics[2:].double().sum(0)[:, None]
    z = logits.gather(-1, ids).reshape(flat.shape).double() / temperature[:, None]
    buckets = (z - lse).to(temperature.dtype)
    if ids.shape[-1] < logits.shape[-1]:
        buckets = torch.cat([buckets, _log_of_rest(z - lse, buckets.dtype)], -1)
    shape = ids.shape[:-1]
    return buckets.view(*shape, buckets.shape[-1]), entropy.reshape(shape).clone(), statistics


def _backward(logits, *arguments):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    write_gradient(out, logits, *arguments)
    return out


def write_gradient(out, logits, ids, temperature, buckets, statistics, *upstream, through_tanh=False):
    """Every token as one of the rest, then the listed ones as they are; out may be logits, which may be tanh(u)."""
    g, g_entropy, backend = upstream
    backend = choose("topk_divergence", IMPLS, logits.device, backend)
    k = ids.shape[-1]
    flat, g, buckets = (x.reshape(-1, x.shape[-1]) for x in (ids, g, buckets))
    entropy, of_entropy = statistics[1][:, None], -g_entropy.reshape(-1, 1)
    p = buckets.exp()
    # To the logits by way of the buckets, whose logarithms are relative to their sum; then the entropy's part.
    g = g - p * g.sum(-1, keepdim=True) + p * of_entropy * (buckets + entropy).masked_fill(p == 0, 0.0)
    values = (g[:, :k] / temperature[:, None]).view(ids.shape)
    if through_tanh:
        values = values * (1 - logits.gather(-1, ids).to(values.dtype).square())
    if k == logits.shape[-1]:
        out.zero_()
    else:
        lse = statistics[2:].double().sum(0) + buckets[:, k].double()
        parts = torch.stack([lse.to(buckets.dtype), (lse - lse.to(buckets.dtype)).to(buckets.dtype)])
        weight = (p[:, k:] * of_entropy)[:, 0]
        zero = torch.zeros_like(weight)
        coefficients = torch.stack([zero, g[:, k], weight, zero, zero])
        rows = rows_of(logits), flat[:, 0].contiguous(), parts, coefficients
        softmax_rows.gradient(*rows, 1.0, temperature, rows_of(out), backend, through_tanh=through_tanh)
    out.scatter_(-1, ids, values.to(out.dtype))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*tensors, output[0], output[2])


def _autograd(ctx, g_buckets, g_entropy, _g_statistics):
    arguments = *ctx.saved_tensors, g_buckets, g_entropy, ctx.backend
    return _topk_buckets_backward(*arguments), None, None, None


def _fake_forward(logits, ids, temperature, backend):
    buckets = ids.shape[-1] + (ids.shape[-1] < logits.shape[-1])
    shapes = (*ids.shape[:-1], buckets), ids.shape[:-1], (4, temperature.numel())
    return tuple(temperature.new_empty(shape) for shape in shapes)


def _fake_backward(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_topk_buckets = register(
    "topk_buckets(Tensor logits, Tensor ids, Tensor temperature, str? backend) -> (Tensor, Tensor, Tensor)",
    buckets_of,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_topk_buckets_backward = register(
    "topk_buckets_backward(Tensor logits, Tensor ids, Tensor temperature, Tensor buckets, Tensor statistics, Tensor g, "
    "Tensor g_entropy, str? backend) -> Tensor",
    _backward,
    _fake_backward,
)


def topk_divergence(
    logits: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    tail: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of p = softmax(logits / temperature) from a teacher known by its k best tokens, and the entropy of p.

        divergence of (p[ids], 1 - sum p[ids]) from (e^teacher_logprobs, 1 - sum e^teacher_logprobs)

    The tail bucket keeps it a divergence: at least 0, 0 only if the student gives the listed tokens what the teacher
    does, and at most the divergence over the whole vocabulary, which it is for k = V.

    Args:
        logits: (..., V) of the student, float32, bfloat16, float16 or float64; any strides.
        ids: (..., k) int64 in [0, V), of each row's tokens, no token twice, in any order. On CPU an id outside raises.
        teacher_logprobs: (..., k) of those tokens under the teacher's whole distribution at its own temperature; may be
            -inf. With k = V they are normalised. Not differentiable.
        kind: as in `divergence`: forward_kl is KL(teacher || student), reverse_kl KL(student || teacher), ...
        beta: of jensen_shannon, as in `divergence`.
        alpha: of alpha, as in `divergence`.
        temperature: of the student; positive number, or one per row, broadcastable to the rows; not differentiable.
        tail: the other tokens are one bucket more; False leaves them out, and both are normalised over the k.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (divergence, entropy), each of the rows' shape, float32 (float64 from float64 logits), differentiable in logits;
        the entropy is that over the whole vocabulary.

    Raises:
        ValueError: on a wrong shape, dtype, temperature, name, number or id.

    A tail below the machine epsilon of the sums (1.2e-7 in float32) cannot be told from none: both are held there.
    Memory: k + 5 numbers a row forward; one tensor of the logits' size, the gradient, backward.
    """
    _check(logits, ids, teacher_logprobs)
    temperatures = row_temperatures("topk_divergence", temperature, logits)
    buckets, entropy, _ = _topk_buckets(logits, ids, temperatures, backend)
    given = {"kind": kind, "beta": beta, "alpha": alpha, "backend": backend}
    return from_teacher(buckets if tail else buckets[..., : ids.shape[-1]], teacher_logprobs, **given), entropy


def from_teacher(buckets: Tensor, teacher_logprobs: Tensor, **given) -> Tensor:
    """Divergence of the buckets, (..., k + 1) or k where that is V, from those of the teacher's (..., k) log-probs."""
    teacher = teacher_logprobs.detach().to(buckets.dtype)
    if buckets.shape[-1] > teacher.shape[-1]:
        teacher = torch.cat([teacher, _log_of_rest(teacher, buckets.dtype)], -1)
    return divergence(buckets, teacher, **given)[0]


def _check(logits: Tensor, ids: Tensor, teacher_logprobs: Tensor) -> None:
    if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"topk_divergence: logits must be (..., V) of a floating dtype; got {tuple(logits.shape)} {logits.dtype}. "
            "Pass the student's raw logits."
        )
    check_lists("topk_divergence", ids, teacher_logprobs, logits[..., 0], logits.shape[-1])


def check_lists(op: str, ids: Tensor, teacher_logprobs: Tensor, rows: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless each of `rows` has a list of tokens of the vocabulary, and as many log-probs."""
    fits = ids.dim() == rows.dim() + 1 and ids.shape[:-1] == rows.shape and 0 < ids.shape[-1] <= vocabulary
    if not fits or ids.dtype != torch.int64 or ids.device != rows.device:
        raise ValueError(
            f"{op}: ids must be {tuple(rows.shape)} with 1 to {vocabulary} in a row, int64 on {rows.device}; got "
            f"{tuple(ids.shape)} {ids.dtype} on {ids.device}. Give each row its own list."
        )
    if teacher_logprobs.shape != ids.shape or not teacher_logprobs.is_floating_point():
        raise ValueError(
            f"{op}: teacher_logprobs must be {tuple(ids.shape)} of a floating dtype, like ids; got "
            f"{tuple(teacher_logprobs.shape)} {teacher_logprobs.dtype}. Pass the teacher's log-probs of those ids."
        )
