"""Divergence of each token's whole distribution from another's, straight from the hidden states of two models.

    z_p = head_p(hidden_p @ weight_p.T) / temperature         p = softmax(z_p)
    z_q = head_q(hidden_q @ weight_q.T) / temperature_q       q = softmax(z_q)
    divergence[n] = sum_v F(p, q)                             entropy[n] = -sum_v p log p
    d_hidden = du @ weight      d_weight = du.T @ hidden      d_bias = sum_n du[n]      of either side

with F and dz as in `divergence`. Chunks of rows stream through two buffers of logits, forward and, computed again,
backward: two products forward, four backward where q is data. A gradient takes the place of its logits; where a soft
cap's tanh is still to be passed, which needs those, that of p takes the place of q's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels import head_outputs
from fuserl.kernels.dispatch import choose
from fuserl.kernels.divergence import divergence
from fuserl.kernels.divergence_rows import IMPLS, STATISTICS
from fuserl.kernels.divergence_terms import Rule, rule
from fuserl.kernels.head_outputs import Head
from fuserl.kernels.head_products import HeadProducts, pieces, rows_alive, taken_rows, through_tanh
from fuserl.kernels.registration import register
from fuserl.kernels.softmax_rows import accumulator

__all__ = ["IMPLS", "linear_divergence"]

_NAME = "linear_divergence"


class _Side(NamedTuple):
    """One of the two models as the caller describes it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float | None
    temperature: float | Tensor

    def head(self) -> Head:
        """What follows the product."""
        given = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        tokens = self.hidden[..., 0]
        return head_outputs.head_of(_NAME, tokens, accumulator(tokens.dtype), temperature=self.temperature, **given)

    def flat(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operands of the product, a row per token."""
        return self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias

    def detached(self) -> _Side:
        """The same as data."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)


def reference(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    kind: str,
    *,
    beta: float = 0.5,
    alpha: float = 0.5,
    mask: Tensor | None = None,
    detach_q: bool = True,
    **given,
) -> tuple[Tensor, Tensor]:
    """The definition: all logits of both at once, and autograd through them."""
    rows = torch.arange(hidden_p.shape[:-1].numel(), device=hidden_p.device)
    z_p, z_q = (
        head_outputs.scaled_logits(*side.flat()[:2], rows, side.head())
        for side in _sides(hidden_p, weight_p, hidden_q, weight_q, **given)
    )
    found = divergence(z_p, z_q, kind, beta=beta, alpha=alpha, detach_q=detach_q, backend="reference")
    found = [x.view(hidden_p.shape[:-1]) for x in found]
    return tuple(found) if mask is None else tuple(torch.where(mask, x, 0.0) for x in found)


class _Call(NamedTuple):
    """The arguments of the registered op, rows flat; the schema is below."""

    hidden_p: Tensor
    weight_p: Tensor
    bias_p: Tensor | None
    hidden_q: Tensor
    weight_q: Tensor
    bias_q: Tensor | None
    mask: Tensor | None
    temperatures: Tensor  # (2, N), that turn x into z
    inner_p: float | None
    inner_q: float | None
    kind: int
    parameter: float
    scale: float
    chunk: int | None
    backend: str | None

    def rule(self) -> Rule:
        """The kind as the row kernels take it."""
        return Rule(self.kind, self.parameter, self.scale)

    def rows(self) -> tuple[Tensor | None, int, int]:
        """The rows that the mask keeps, None for all; their number; how many of them run together."""
        return taken_rows(self.mask, self.hidden_p, self.weight_p, self.chunk)

    def products(
        self, rows: Tensor | None, chunk: int, needs: Sequence[bool] = (False,) * 6
    ) -> tuple[HeadProducts, HeadProducts]:
        """The products of some rows, of p and of q."""
        given = {"chunk": chunk, "dtype": self.temperatures.dtype}
        return (
            HeadProducts(*self[:2], rows, bias=self.bias_p, inner=self.inner_p, needs=needs[:3], **given),
            HeadProducts(*self[3:5], rows, bias=self.bias_q, inner=self.inner_q, needs=needs[3:], **given),
        )


def _forward(*arguments):
    call = _Call(*arguments)
    backend, rows = choose(_NAME, IMPLS, call.hidden_p.device, call.backend), call.rows()
    kept = call.temperatures.new_zeros(STATISTICS, len(call.hidden_p))
    p, q = call.products(rows[0], rows[2])
    for piece in pieces(0, *rows[1:]):
        at = p.row_numbers(piece)
        logits = p.logits(piece)[None], q.logits(piece)[None]
        kept[:, at] = IMPLS[backend][0](*logits, call.temperatures[:, at], call.rule())
    return kept[0].clone(), kept[1].clone(), kept


def _backward(g, kept, needs, *arguments):
    call = _Call(*arguments)
    backend, (rows, _, chunk) = choose(_NAME, IMPLS, call.hidden_p.device, call.backend), call.rows()
    rows = rows_alive(g, rows)
    count = len(call.hidden_p) if rows is None else len(rows)
    p, q = call.products(rows, max(1, min(chunk, count)), needs)
    both, g = any(needs[3:]), g * p.factor
    for piece in pieces(0, count, chunk):
        at = p.row_numbers(piece)
        logits = p.logits(piece), q.logits(piece)
        d_p, d_q = _destination(p, piece, None if both else logits[1]), _destination(q, piece) if both else None
        rows_of = [None if x is None else x[None] for x in (*logits, d_p, d_q)]
        kept_of = call.temperatures[:, at], kept[:, at], g[:, at], call.rule()
        IMPLS[backend][1](*rows_of[:2], *kept_of, *rows_of[2:])
        _accumulate(p, d_p, piece)
        if both:
            _accumulate(q, d_q if q.factor == p.factor else d_q.mul_(q.factor / p.factor), piece)
    return [gradient for gradient, need in zip((*p.gradients(), *q.gradients()), needs, strict=True) if need]


def _destination(products: HeadProducts, piece: slice, spare: Tensor | None = None) -> Tensor:
    """Where the gradient to x goes: over x, unless that is a tanh, which its own gradient needs."""
    logits, out = products.gradient_buffers(piece)
    if products.inner is None:
        return out
    return torch.empty_like(logits) if spare is None else spare


def _accumulate(products: HeadProducts, gradient: Tensor, piece: slice) -> None:
    if products.inner is not None:
        x, out = products.gradient_buffers(piece)
        through_tanh(gradient, x, out)
        gradient = out
    products.accumulate(gradient, piece, None)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.settings = *inputs[:8], inputs[8:]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *tensors)


def _autograd(ctx, g_divergence, g_entropy, _g_kept):
    kept, *tensors = ctx.saved_tensors
    needs, g = list(ctx.needs_input_grad[:6]), torch.stack([g_divergence, g_entropy])
    with torch.autocast(g.device.type, enabled=False):
        found = iter(_linear_divergence_backward(g, kept, needs, *tensors, *ctx.settings))
    return *(next(found) if need else None for need in needs), *[None] * 9


_CALL = (
    "Tensor hidden_p, Tensor weight_p, Tensor? bias_p, Tensor hidden_q, Tensor weight_q, Tensor? bias_q, Tensor? mask, "
    "Tensor temperatures, float? inner_p, float? inner_q, int kind, float parameter, float scale, SymInt? chunk, "
    "str? backend"
)


def _fake_forward(*arguments):
    temperatures = _Call(*arguments).temperatures
    count = temperatures.shape[1]
    return *(temperatures.new_empty(count) for _ in range(2)), temperatures.new_empty((STATISTICS, count))


def _fake_backward(_g, _kept, needs, *arguments):
    return [torch.empty_like(x) for x, need in zip(arguments[:6], needs, strict=True) if need]


_linear_divergence = register(
    f"linear_divergence({_CALL}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_linear_divergence_backward = register(
    f"linear_divergence_backward(Tensor g, Tensor kept, bool[] needs, {_CALL}) -> Tensor[]", _backward, _fake_backward
)


def linear_divergence(
    hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor, kind: str, *,
    beta: float = 0.5, alpha: float = 0.5, bias_p: Tensor | None = None, bias_q: Tensor | None = None,
    softcap_p: float | None = None, softcap_q: float | None = None,
    logit_scale_p: float | None = None, logit_scale_q: float | None = None,
    temperature: float | Tensor = 1.0, temperature_q: float | Tensor | None = None,
    detach_q: bool = True, mask: Tensor | None = None, chunk: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Divergence of each token's whole distribution p from another's, q, and the entropy of p, from hidden states.

        p = softmax(z_p / temperature),    z_p = logit_scale_p (hidden_p @ weight_p.T + bias_p)
        with softcap_p c instead c tanh(z_p / c);    q from its own;    divergence(p, q) as in `divergence`, by kind

    Args:
        hidden_p: (N, D) or (B, T, D), any (..., D), float32, bfloat16, float16 or float64: the states of the student or
            policy. Logits are float32 whatever it is (float64 from float64).
        weight_p: (V, D), its head, of hidden_p's dtype (autocast casts both); no gradient where it requires none.
        hidden_q, weight_q: (..., D_q) and (V, D_q) of the teacher or reference, at the same tokens, over the same
            vocabulary, of any width and another dtype if need be, but float64 goes with float64 only.
        kind, beta, alpha: forward_kl, reverse_kl, jensen_shannon, alpha, ... and its number, as in `divergence`.
        bias_p, bias_q: (V,), the heads'; differentiable.
        softcap_p, softcap_q, logit_scale_p, logit_scale_q: positive numbers of the models; not differentiable.
        temperature, temperature_q: of p, and of q, None for the same; positive number or (...); not differentiable.
        detach_q: take hidden_q, weight_q and bias_q as data; False for their gradients, too.
        mask: (...) bool; where False, as at padding, the results and gradients are 0 and no product is computed. On a
            GPU the number of tokens left is waited for, unless the mask is on the host.
        chunk: rows at a time; 512 on CPU; on GPU as many as make 512 MiB of logits.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (divergence, entropy of p), each (...), float32 (float64 from float64), infinite or NaN as in `divergence`.

    Raises:
        ValueError: on a wrong shape, dtype, device, name or number.

    Memory: two chunks of float32 logits (on GPU a gradient's, too), eight numbers a row. Products of the rows with a
    head: two forward; four backward where q is data, three with a frozen head, none on a CPU for rows that get no
    gradient. Siblings: `divergence`, `linear_topk_divergence`, `linear_policy_loss` with a reference. Source: GKD.
    """
    sides = _sides(
        hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, softcap_p=softcap_p, softcap_q=softcap_q,
        logit_scale_p=logit_scale_p, logit_scale_q=logit_scale_q, temperature=temperature, temperature_q=temperature_q,
    )  # fmt: skip
    operands = _operands(sides, mask, detach_q, chunk)
    with torch.autocast(hidden_p.device.type, enabled=False):
        found = _linear_divergence(*operands, *rule(_NAME, kind, beta, alpha), chunk, backend)
    return found[0].view(hidden_p.shape[:-1]), found[1].view(hidden_p.shape[:-1])


def _sides(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    *,
    softcap_p: float | None = None,
    softcap_q: float | None = None,
    logit_scale_p: float | None = None,
    logit_scale_q: float | None = None,
    temperature: float | Tensor = 1.0,
    temperature_q: float | Tensor | None = None,
) -> tuple[_Side, _Side]:
    hidden_p, weight_p, hidden_q, weight_q = map(head_outputs.as_autocast, (hidden_p, weight_p, hidden_q, weight_q))
    p = _Side(hidden_p, weight_p, bias_p, softcap_p, logit_scale_p, temperature)
    other = temperature if temperature_q is None else temperature_q
    return p, _Side(hidden_q, weight_q, bias_q, softcap_q, logit_scale_q, other)


def _operands(sides: tuple[_Side, _Side], mask: Tensor | None, detach_q: bool, chunk: int | None) -> tuple:
    """What the registered op is given of both models, checked."""
    _check(sides, mask, chunk)
    p, q = sides[0], sides[1].detached() if detach_q else sides[1]
    heads, tokens = (p.head(), q.head()), p.hidden[..., 0]
    given = tokens.numel(), accumulator(tokens.dtype), tokens.device
    return (
        *p.flat(), *q.flat(), None if mask is None else mask.reshape(-1),
        torch.stack([head.each_temperature(*given) for head in heads]), *(head.inner for head in heads),
    )  # fmt: skip


def _check(sides: tuple[_Side, _Side], mask: Tensor | None, chunk: int | None) -> None:
    require, (p, q) = head_outputs.requirer(_NAME), sides
    head_outputs.check_chunk(_NAME, chunk)
    for side, name in ((p, "_p"), (q, "_q")):
        head_outputs.check_head(_NAME, side.hidden, side.weight, side.bias, name)
    tokens = tuple(p.hidden.shape[:-1])
    require(
        q.hidden.shape[:-1] == tokens and q.hidden.device == p.hidden.device,
        f"hidden_q must be {tokens} tokens on {p.hidden.device} like hidden_p",
        f"{tuple(q.hidden.shape[:-1])} on {q.hidden.device}", "Take both models' states at the same tokens.",
    )  # fmt: skip
    require(
        len(q.weight) == len(p.weight), f"weight_q must have {len(p.weight)} rows like weight_p", len(q.weight),
        "Cut both to the vocabulary that they share.",
    )  # fmt: skip
    require(
        (p.hidden.dtype == torch.float64) == (q.hidden.dtype == torch.float64),
        "hidden_p and hidden_q must both be float64 or neither", f"{p.hidden.dtype} and {q.hidden.dtype}",
        "Convert one model with .to().",
    )  # fmt: skip
    head_outputs.check_mask(_NAME, mask, p.hidden)
