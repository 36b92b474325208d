"""Log-probability of the chosen token, and whatever else of its distribution, straight from hidden states.

    z = head(hidden @ weight.T) / temperature         logprob[n] = log_softmax(z[n])[ids[n]], entropy[n], ...
    d_hidden = du @ weight        d_weight = du.T @ hidden        d_bias = sum_n du[n]

with du as `head_outputs` has it. Chunks of rows stream through one buffer of logits, forward and, computed again from
the saved normalisers, backward: one product forward and three backward. `linear_policy_loss` needs three in all, as it
knows the loss; here any graph may follow. Logits that fit in `memory` are kept instead of computed again, and rows
without a gradient are left out of every product on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels import head_outputs, softmax_rows, vocabulary_shards
from fuserl.kernels.allowed import Allowed, check_lists
from fuserl.kernels.dispatch import choose
from fuserl.kernels.head_outputs import Head, Outputs
from fuserl.kernels.head_products import BUCKET, HeadProducts, Lora, pieces, places_alive, taken_rows
from fuserl.kernels.registration import register
from fuserl.kernels.vocabulary_shards import VocabularyShards

__all__ = ["linear_logprob"]

_NAME = "linear_logprob"


def reference(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    outputs: Sequence[str] = ("logprob",),
    allowed: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    **given,
) -> Outputs:
    """The definition: all logits at once, and autograd through them; `given` as `head_outputs.head_of` takes it."""
    dtype, flat = softmax_rows.accumulator(hidden.dtype), ids.reshape(-1)
    allowed = None if allowed is None else Allowed(*allowed)
    head = head_outputs.head_of(_NAME, ids, dtype, allowed=allowed, **given)
    every = head_outputs.definition(
        hidden.reshape(-1, hidden.shape[-1]), weight, flat, torch.arange(len(flat), device=ids.device), head
    )
    found = {name: every[name].view(ids.shape) for name in outputs}
    return Outputs(**{name: x if mask is None else torch.where(mask, x, 0.0) for name, x in found.items()})


class _Call(NamedTuple):
    """The arguments of the registered op, rows flat; the schema is below."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    ids: Tensor
    mask: Tensor | None
    row_temperature: Tensor | None
    extra_ids: Tensor | None
    allowed_ids: Tensor | None
    allowed_offsets: Tensor | None
    sizes: Tensor | None  # of the ranks' shards of the vocabulary, with group
    group: str | None
    temperature: float
    softcap: float | None
    logit_scale: float
    lora_scale: float
    outputs: Sequence[str]
    chunk: int | None
    memory: int
    batch_invariant: bool
    backend: str | None

    def head(self) -> Head:
        """What belongs to the logits besides the product."""
        return Head(
            self.bias, self.softcap, self.logit_scale, self.temperature, self.row_temperature,
            None if self.down is None else Lora(self.down, self.up, self.lora_scale), self.extra_ids,
            None if self.allowed_ids is None else Allowed(self.allowed_ids, self.allowed_offsets),
            None if self.group is None else VocabularyShards(self.sizes, self.group),
        )  # fmt: skip

    def rows(self) -> tuple[Tensor | None, int, int]:
        """The rows that the mask keeps, None for all; their number; how many of them run together."""
        return taken_rows(self.mask, self.hidden, self.weight, BUCKET if self.batch_invariant else self.chunk)

    def empty_kept(self) -> Tensor:
        """As many rows of logits as `memory` holds, at most all."""
        dtype = softmax_rows.accumulator(self.hidden.dtype)
        size = torch.finfo(dtype).bits // 8 * self.weight.shape[0]
        rows = min(self.hidden.shape[0], self.memory // max(1, size)) if self.memory else 0
        return self.hidden.new_empty((rows, self.weight.shape[0]), dtype=dtype)

    def products(self, head: Head, rows: Tensor | None, chunk: int, needs: Sequence[bool]) -> HeadProducts:
        """The products of some rows."""
        allowed = None
        if head.allowed is not None:
            allowed = head.allowed.take(_NAME, rows if rows is None else rows.cpu())
        return HeadProducts(
            self.hidden, self.weight, rows, chunk=chunk, dtype=softmax_rows.accumulator(self.hidden.dtype),
            bias=head.bias, lora=head.lora, inner=head.inner, allowed=allowed, needs=needs, shards=head.shards,
            batch_invariant=self.batch_invariant,
        )  # fmt: skip


def _forward(*arguments):
    call = _Call(*arguments)
    if call.allowed_ids is not None:
        check_lists(_NAME, (call.allowed_ids, call.allowed_offsets), len(call.weight))
    backend, head = choose(_NAME, IMPLS, call.hidden.device, call.backend), call.head()
    rows, count, chunk = call.rows()
    products, kept = call.products(head, rows, chunk, [False] * 5), call.empty_kept()
    statistics = kept.new_zeros(head_outputs.kinds(call.outputs), len(call.ids))
    for piece in pieces(0, count, chunk):
        at = products.row_numbers(piece)
        x = products.logits(piece, kept[piece] if piece.stop <= len(kept) else None)
        statistics[:, at] = head.statistics(x, call.ids, at, call.outputs, backend)
    return torch.stack(list(head_outputs.named(statistics, call.outputs).values())), statistics, kept


def _backward(g, statistics, kept, needs, *arguments):
    call = _Call(*arguments)
    backend, head = choose(_NAME, IMPLS, call.hidden.device, call.backend), call.head()
    coefficients = head.coefficients(statistics, dict(zip(call.outputs, g, strict=True)), len(call.weight))
    rows, count, chunk = call.rows()
    stored = count if count <= len(kept) else len(kept) // chunk * chunk  # the forward kept whole chunks only
    places = places_alive(coefficients, rows)
    if places is not None:
        rows = places if rows is None else rows[places]
        stored, count = int((places < stored).sum()), len(places)
    products = call.products(head, rows, min(chunk, max(1, count)), needs)
    for piece in (*pieces(0, stored, chunk), *pieces(stored, count, chunk)):
        at = products.row_numbers(piece)
        x, out = products.gradient_buffers(piece)
        if piece.stop > stored:
            products.logits(piece)
        else:
            x = kept[piece if places is None else places[piece]]
        head.gradient(x, call.ids, at, statistics[2:4, at], coefficients[:, at], out, backend)
        products.accumulate(out, piece, None)
    return [gradient for gradient, need in zip(products.gradients(), needs, strict=True) if need]


def _setup_context(ctx, inputs, output):
    call = _Call(*inputs)
    tensors = call[: _Call._fields.index("group")]
    ctx.settings = call[len(tensors) :]
    ctx.save_for_backward(output[1], output[2], *tensors)


def _autograd(ctx, g, _g_statistics, _g_kept):
    statistics, kept, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    with torch.autocast(g.device.type, enabled=False):
        found = iter(_linear_logprob_backward(g, statistics, kept, needs, *tensors, *ctx.settings))
    rest = len(_Call._fields) - _DIFFERENTIABLE
    return *(next(found) if need else None for need in needs), *[None] * rest


_DIFFERENTIABLE = 5  # the first of them: hidden, weight, bias, down, up
_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, Tensor ids, Tensor? mask, "
    "Tensor? row_temperature, Tensor? extra_ids, Tensor? allowed_ids, Tensor? allowed_offsets, Tensor? sizes, "
    "str? group, float temperature, float? softcap, float logit_scale, float lora_scale, str[] outputs, SymInt? chunk, "
    "SymInt memory, bool batch_invariant, str? backend"
)


def _fake_forward(*arguments):
    call = _Call(*arguments)
    kept, count = call.empty_kept(), call.ids.shape[0]
    values, statistics = (kept.new_empty((n, count)) for n in (len(call.outputs), head_outputs.kinds(call.outputs)))
    return values, statistics, kept


def _fake_backward(_g, _statistics, _kept, needs, *arguments):
    return [torch.empty_like(x) for x, need in zip(arguments[:_DIFFERENTIABLE], needs, strict=True) if need]


_linear_logprob = register(
    f"linear_logprob({_CALL}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    keep=_setup_context,
    backward=_autograd,
)
_linear_logprob_backward = register(
    f"linear_logprob_backward(Tensor g, Tensor statistics, Tensor kept, bool[] needs, {_CALL}) -> Tensor[]",
    _backward,
    _fake_backward,
)


IMPLS = softmax_rows.IMPLS


def linear_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, *,
    outputs: Sequence[str] = ("logprob",), bias: Tensor | None = None, temperature: float | Tensor = 1.0,
    softcap: float | None = None, logit_scale: float | None = None, lora: tuple[Tensor, Tensor, float] | None = None,
    extra_ids: Tensor | None = None, allowed: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None, chunk: int | None = None, memory: int | None = None,
    batch_invariant: bool = False, backend: str | None = None,
) -> Outputs:  # fmt: skip
    """Log-probability of each chosen token, entropy and more, from hidden states, without ever holding the logits.

        out.logprob = log_softmax(z / temperature)[ids]
        z = logit_scale (hidden @ weight.T + scale (hidden @ A.T) @ B.T + bias);    with softcap c instead c tanh(z / c)

    Args:
        hidden: (N, D) or (B, T, D), any (..., D), float32, bfloat16, float16 or float64: the state that predicts each
            token. Logits are float32 whatever it is (float64 from float64).
        weight: (V, D), the head, of hidden's dtype (autocast casts both); its gradient is skipped if it requires none.
            A DTensor is gathered, and its gradient averaged over the mesh, as FSDP2 does: see `whole_weight`.
        ids: (...) int64 in [0, V), on hidden's device.
        outputs: what is returned: logprob, entropy, mean_logprob and mean_logit (over the vocabulary, of the scaled
            logits), sum_sq_prob, is_top1 (1.0 where the token has the largest logit). All but is_top1 carry gradient.
        bias: (V,), the head's; differentiable.
        temperature: positive number, or one per token, broadcastable to ids; not differentiable.
        softcap, logit_scale: positive numbers of the model, as above; not differentiable.
        lora: (A, B, scale), (r, D) and (V, r) of a floating dtype and a number: an adapter on the head, whose
            weight + scale B A is never formed; differentiable in A and B.
        extra_ids: (...) int64, a second token per row, whose log-probability is the output extra_logprob.
        allowed: (ids, offsets), (M,) int64 beside (N + 1,) int64 on the host: row n, flat, may choose among
            ids[offsets[n] : offsets[n + 1]] only, and all outputs are of its softmax over them, as `sample` drew:
            `kept.kept` makes the lists. Another token has logprob -inf and gradient 0; the two means are refused.
        mask: (...) bool; where False, as at padding, the outputs and gradients are 0 and no product is computed. On a
            GPU the number of tokens left is waited for, unless the mask is on the host.
        group: process group that cuts the vocabulary (`vocabulary_shards`): each rank gives its rows of weight and bias
            and the same of all else; outputs and d_hidden are those of the whole vocabulary.
        chunk: rows at a time; 512 on CPU; on GPU as many as make 512 MiB of logits, 2048 with group.
        memory: bytes of logits that may be kept from forward to backward, which then need not be computed again.
        batch_invariant: give every row the same bits whatever is beside it, in outputs and d_hidden (shown on CPU):
            products run on 64 rows at a time, which takes about a quarter longer; without chunk.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        The outputs by name, each of ids' shape, float32 (float64 from float64), differentiable in hidden, weight, bias,
        A and B.

    Raises:
        ValueError: on a wrong shape, dtype, device, name or number.

    Memory: one chunk of float32 logits (on GPU its gradient too), and `memory`. Four matrix products forward and
    backward, down to three where all logits are kept; one without gradient.
    Siblings: `linear_policy_loss` for a loss known at the call, in three; `token_logprob` from logits.
    """
    hidden, weight, bias = head_outputs.operands(_NAME, hidden, weight, bias, group)
    terms = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    terms |= {"lora": lora, "extra_ids": extra_ids, "allowed": allowed}
    given = {"mask": mask, "chunk": chunk, "memory": memory, "group": group, "batch_invariant": batch_invariant}
    call = _call(hidden, weight, ids, tuple(outputs), terms, backend=backend, **given)
    with torch.autocast(hidden.device.type, enabled=False):  # the operands are cast; the adapter stays as it is
        found, _, _ = _linear_logprob(*call)
    rows = zip(outputs, found.unbind(), strict=True)
    return Outputs(**{name: (row.detach() if name == "is_top1" else row).view(ids.shape) for name, row in rows})


def _call(hidden, weight, ids, outputs, terms, *, mask, chunk, memory, group, batch_invariant, backend) -> _Call:
    """The arguments of linear_logprob, checked, as the registered op takes them."""
    bias, allowed = terms["bias"], terms["allowed"]
    checked = {name: terms[name] for name in ("bias", "lora", "extra_ids", "allowed")}
    checked |= {"chunk": chunk, "batch_invariant": batch_invariant}
    _check(hidden, weight, ids, outputs=outputs, mask=mask, memory=memory, **checked)
    head = head_outputs.head_of(_NAME, ids, softmax_rows.accumulator(hidden.dtype), **{**terms, "allowed": None})
    down, up, scale = head.lora or (None, None, 1.0)
    trained = any(x is not None and x.requires_grad for x in (hidden, weight, bias, down, up))
    flat, mask = ids.reshape(-1).contiguous(), None if mask is None else mask.reshape(-1)
    shards = head_outputs.shards_of(_NAME, group, hidden, weight, flat, terms, outputs=outputs, chunk=chunk, mask=mask)
    return _Call(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, down, up, flat, mask, head.row_temperature, head.extra_ids,
        *(allowed or (None, None)), *((None, None) if shards is None else (shards.sizes, shards.group)),
        head.temperature, head.softcap, head.logit_scale, scale, outputs,
        vocabulary_shards.chunk_of(chunk, group, ids), memory or 0 if torch.is_grad_enabled() and trained else 0,
        batch_invariant, backend,
    )  # fmt: skip


def _check(hidden, weight, ids, *, mask, memory, **terms) -> None:
    require = head_outputs.requirer(_NAME)
    head_outputs.check(_NAME, hidden, weight, ids, **terms)
    head_outputs.check_mask(_NAME, mask, hidden)
    require(memory is None or memory >= 0, "memory must be bytes, at least 0", memory, "Leave it out to keep nothing.")
