"""Divergence from a teacher of whom each row's best tokens are known, straight from the student's hidden states.

    z = head(hidden @ weight.T) / temperature      buckets of p = softmax(z), and the divergence, as in topk_divergence
    d_hidden = du @ weight        d_weight = du.T @ hidden        d_bias = sum_n du[n]

Chunks of rows stream through one buffer of logits, forward and, computed again, backward, where their gradient takes
their place: one product forward, three backward. What passes between is k + 1 numbers a row, the buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels import head_outputs, topk_divergence
from fuserl.kernels.head_products import HeadProducts, pieces, rows_alive, taken_rows
from fuserl.kernels.registration import register
from fuserl.kernels.softmax_rows import accumulator

__all__ = ["linear_topk_divergence"]

_NAME = "linear_topk_divergence"
IMPLS = topk_divergence.IMPLS


def reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    tail: bool = True,
    mask: Tensor | None = None,
    **given,
) -> tuple[Tensor, Tensor]:
    """The definition: all logits at once, and autograd through them."""
    shape, dtype = hidden.shape[:-1], accumulator(hidden.dtype)
    head, rows = head_outputs.head_of(_NAME, hidden[..., 0], dtype, **given), torch.arange(shape.numel())
    z = head_outputs.scaled_logits(hidden.reshape(-1, hidden.shape[-1]), weight, rows.to(hidden.device), head)
    listed = ids if mask is None else torch.where(mask[..., None], ids, torch.arange(ids.shape[-1]).to(ids))
    found = topk_divergence.topk_divergence(
        z.view(*shape, len(weight)), listed, teacher_logprobs, kind, beta=beta, alpha=alpha, tail=tail,
        backend="reference",
    )  # fmt: skip
    return found if mask is None else tuple(torch.where(mask, x, 0.0) for x in found)


class _Call(NamedTuple):
    """The arguments of the registered op, rows flat; the schema is below."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor
    mask: Tensor | None
    temperature: Tensor  # (N,), that turns x into z
    inner: float | None
    chunk: int | None
    backend: str | None

    def rows(self) -> tuple[Tensor | None, int, int]:
        """The rows that the mask keeps, None for all; their number; how many of them run together."""
        return taken_rows(self.mask, self.hidden, self.weight, self.chunk)

    def products(self, rows: Tensor | None, chunk: int, needs: Sequence[bool] = (False, False, False)) -> HeadProducts:
        """The products of some rows."""
        given = {"dtype": self.temperature.dtype, "bias": self.bias, "inner": self.inner, "needs": needs}
        return HeadProducts(self.hidden, self.weight, rows, chunk=chunk, **given)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Buckets, entropies and statistics of all rows, all 0."""
        count, k = self.ids.shape
        shapes = (count, k + (k < len(self.weight))), (count,), (4, count)
        return tuple(self.temperature.new_zeros(shape) for shape in shapes)


def _forward(*arguments):
    call = _Call(*arguments)
    rows, count, chunk = call.rows()
    products, (buckets, entropy, statistics) = call.products(rows, chunk), call.results()
    for piece in pieces(0, count, chunk):
        at = products.row_numbers(piece)
        given = call.ids[at], call.temperature[at], call.backend
        buckets[at], entropy[at], statistics[:, at] = topk_divergence.buckets_of(products.logits(piece), *given, _NAME)
    return buckets, entropy, statistics


def _backward(g, g_entropy, buckets, statistics, needs, *arguments):
    call = _Call(*arguments)
    rows, _, chunk = call.rows()
    rows = rows_alive(torch.cat([g.T, g_entropy[None]]), rows)
    count = len(call.hidden) if rows is None else len(rows)
    products = call.products(rows, max(1, min(chunk, count)), needs)
    g, g_entropy = g * products.factor, g_entropy * products.factor
    for piece in pieces(0, count, chunk):
        at, x = products.row_numbers(piece), products.logits(piece)
        out = products.gradient_buffers(piece)[1]
        topk_divergence.write_gradient(
            out, x, call.ids[at], call.temperature[at], buckets[at], statistics[:, at], g[at], g_entropy[at],
            call.backend, through_tanh=call.inner is not None,
        )  # fmt: skip
        products.accumulate(out, piece, None)
    return [gradient for gradient, need in zip(products.gradients(), needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.settings = *inputs[:6], inputs[6:]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[0], output[2], *tensors)


def _autograd(ctx, g_buckets, g_entropy, _g_statistics):
    buckets, statistics, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    given = g_buckets, g_entropy, buckets, statistics, needs, *tensors, *ctx.settings
    with torch.autocast(statistics.device.type, enabled=False):
        found = iter(_linear_topk_buckets_backward(*given))
    return *(next(found) if need else None for need in needs), *[None] * 6


_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? mask, Tensor temperature, float? inner, "
    "SymInt? chunk, str? backend"
)


def _fake_forward(*arguments):
    return _Call(*arguments).results()


def _fake_backward(_g, _g_entropy, _buckets, _statistics, needs, *arguments):
    return [torch.empty_like(x) for x, need in zip(arguments[:3], needs, strict=True) if need]


_linear_topk_buckets = register(
    f"linear_topk_buckets({_CALL}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_linear_topk_buckets_backward = register(
    "linear_topk_buckets_backward(Tensor g, Tensor g_entropy, Tensor buckets, Tensor statistics, bool[] needs, "
    f"{_CALL}) -> Tensor[]",
    _backward,
    _fake_backward,
)


def linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    tail: bool = True,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of the student from a teacher known by its k best tokens of each row, and the student's entropy.

        p = softmax(z / temperature),  z = logit_scale (hidden @ weight.T + bias);  with softcap c instead c tanh(z / c)
        divergence of (p[ids], 1 - sum p[ids]) from (e^teacher_logprobs, 1 - sum e^teacher_logprobs)

    Args:
        hidden: (N, D) or (B, T, D), any (..., D), float32, bfloat16, float16 or float64: the student's states. Logits
            are float32 whatever it is (float64 from float64).
        weight: (V, D), the head, of hidden's dtype (autocast casts both); its gradient is skipped if it requires none.
        ids: (..., k) int64 in [0, V), of each row's tokens, no token twice, in any order. On CPU an id outside raises.
        teacher_logprobs: (..., k) of those tokens under the teacher's whole distribution at its own temperature; may be
            -inf. With k = V they are normalised. Not differentiable.
        kind: as in `divergence`: forward_kl is KL(teacher || student), reverse_kl KL(student || teacher), ...
        beta, alpha: of jensen_shannon and of alpha, as in `divergence`.
        tail: the other tokens are one bucket more; False leaves them out, and both are normalised over the k.
        bias: (V,), the head's; differentiable.
        temperature: positive number, or one per token, broadcastable to them; not differentiable.
        softcap, logit_scale: positive numbers of the model, as above; not differentiable.
        mask: (...) bool; where False, as at padding, the results and gradients are 0 and no product is computed. On a
            GPU the number of tokens left is waited for, unless the mask is on the host.
        chunk: rows at a time; 512 on CPU; on GPU as many as make 512 MiB of logits.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (divergence, entropy over the whole vocabulary), each (...), float32 (float64 from float64), differentiable.

    Raises:
        ValueError: on a wrong shape, dtype, device, name, number or id.

    The tail, and what it cannot tell: as in `topk_divergence`. Rows without a gradient cost no product on a CPU.
    Memory: one chunk of float32 logits (on GPU its gradient too), 2 k + 7 numbers a row. Four products, one without
    gradient. Siblings: `topk_divergence` from logits, `linear_divergence` where the teacher's states are at hand.
    """
    hidden, weight = head_outputs.as_autocast(hidden), head_outputs.as_autocast(weight)
    terms = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    buckets, entropy = _buckets(hidden, weight, ids, teacher_logprobs, mask, chunk=chunk, backend=backend, terms=terms)
    given = {"kind": kind, "beta": beta, "alpha": alpha, "backend": backend}
    buckets = buckets if tail else buckets[..., : ids.shape[-1]]
    value = topk_divergence.from_teacher(buckets, teacher_logprobs, **given)
    return value if mask is None else torch.where(mask.to(value.device), value, 0.0), entropy


def _buckets(hidden, weight, ids, teacher_logprobs, mask, *, chunk, backend, terms) -> tuple[Tensor, Tensor]:
    """The buckets of p, (..., k + 1), and its entropy, of arguments that are checked here."""
    head_outputs.check_head(_NAME, hidden, weight, terms["bias"])
    head_outputs.check_chunk(_NAME, chunk)
    head_outputs.check_mask(_NAME, mask, hidden)
    rows, dtype = hidden[..., 0], accumulator(hidden.dtype)
    topk_divergence.check_lists(_NAME, ids, teacher_logprobs, rows, len(weight))
    head = head_outputs.head_of(_NAME, rows, dtype, **terms)
    with torch.autocast(hidden.device.type, enabled=False):
        buckets, entropy, _ = _linear_topk_buckets(
            hidden.reshape(-1, hidden.shape[-1]), weight, terms["bias"], ids.reshape(-1, ids.shape[-1]),
            None if mask is None else mask.reshape(-1), head.each_temperature(rows.numel(), dtype, rows.device),
            head.inner, chunk, backend,
        )  # fmt: skip
    return buckets.view(*rows.shape, buckets.shape[-1]), entropy.view(rows.shape)
