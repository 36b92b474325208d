"""Any token loss straight from hidden states: three matrix products, one chunk of logits, whatever the loss.

    z = head(hidden @ weight.T) / temperature         out.logprob[n] = log_softmax(z[n])[ids[n]], out.entropy[n], ...
    loss = sum_n token_loss(out, rows)[n]

The loss is a function of a few numbers per row, so for each chunk of rows it is evaluated and differentiated by
autograd on those numbers alone; what they make of the logits' gradient (`head_outputs`) takes the logits' place before
the two products that give d_hidden and d_weight. Divergences from a reference are outputs, too (`second_head`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuserl.kernels import head_outputs, head_products, loss_contract, second_head, softmax_rows, vocabulary_shards
from fuserl.kernels.allowed import Allowed, check_lists
from fuserl.kernels.dispatch import choose
from fuserl.kernels.head_outputs import Head, Outputs

__all__ = ["linear_policy_loss"]

_NAME = "linear_policy_loss"


def reference(call: Call, hidden: Tensor, weight: Tensor, *_terms_and_params: Tensor | None) -> Tensor:
    """The definition: all logits at once and autograd through them."""
    for name, given in (("grad_weight", call.grad_weight), ("group", call.head.shards)):
        if given is not None:
            raise ValueError(f"linear_policy_loss: the reference cannot take {name}=; got one. Use another backend.")
    rows = call.rows if call.rows is not None else torch.arange(len(hidden), device=hidden.device)
    every = head_outputs.definition(hidden, weight, call.ids, rows, call.head)
    if call.second is not None:
        every |= call.second.definition(hidden, weight, call.head, rows)
    losses = call.evaluate(Outputs(**{name: every[name] for name in call.outputs}), rows)
    return losses.sum().to(call.dtype)


@dataclass
class Call:
    """The arguments of one call that autograd does not see, and the per-row results it leaves."""

    ids: Tensor
    token_loss: Callable
    outputs: tuple[str, ...]
    rows: Tensor | None  # live rows, ascending, or None for all
    spans: list[tuple[int, int]] | None  # rollouts as [begin, end) among the live rows; None when rows are independent
    chunk: int
    batch_invariant: bool
    head: Head
    second: second_head.SecondHead | None
    allowed: Allowed | None  # the lists of the live rows
    grad_weight: Tensor | None
    backward: bool  # whether gradients are wanted at all; inside autograd's forward nothing tells
    dtype: torch.dtype
    backend: str
    out: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.outputs:
            self.out[name] = self._unknown()

    def _unknown(self) -> Tensor:
        return torch.full(self.ids.shape, torch.nan, dtype=self.dtype, device=self.ids.device)

    def evaluate(self, out: Outputs, rows: Tensor) -> Tensor:
        """Run token_loss, keep its outputs and statistics at their rows, and return its per-row losses."""
        result = self.token_loss(out, rows)
        losses, stats = result if isinstance(result, tuple) else (result, {})
        for name, value in {"the loss": losses, **stats}.items():
            per_row = isinstance(value, Tensor) and value.shape == rows.shape
            packed = name in stats and isinstance(value, Tensor) and value.dim() == 2 and len(value) == 1
            if not (per_row or packed):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"linear_policy_loss: token_loss must return one value per row, ({len(rows)},), and statistics of "
                    f"that shape or (1, K); got {got} for {name}. Weight rows inside token_loss, do not reduce them."
                )
        for name, value in vars(out).items():
            self.out.setdefault(name, self._unknown())[rows] = value.detach().to(self.dtype)
        for name, value in stats.items():
            value = value.detach().to(self.dtype)
            if value.dim() == 2:
                self.stats[name] = torch.cat([self.stats[name], value]) if name in self.stats else value
            else:
                self.stats.setdefault(name, self._unknown())[rows] = value
        return losses

    @property
    def own(self) -> tuple[str, ...]:
        """The outputs that are no divergence from a reference."""
        return second_head.split(self.outputs)[0]

    def statistics(self, x: Tensor, rows: Tensor, piece: slice) -> Tensor:
        """(4 or 7, n) statistics of a chunk, and those of the divergences."""
        statistics = self.head.statistics(x, self.ids, rows, self.own, self.backend)
        return statistics if self.second is None else torch.cat([statistics, self.second.statistics(x, rows, piece)])

    def named(self, statistics: Tensor) -> dict[str, Tensor]:
        """The outputs out of the statistics."""
        count = head_outputs.kinds(self.own)
        found = head_outputs.named(statistics[:count], self.own)
        return found if self.second is None else found | self.second.named(statistics[count:])

    def coefficients(self, statistics: Tensor, derivatives: dict[str, Tensor | None], vocabulary: int) -> Tensor:
        """The head's row coefficients, and those of the divergences."""
        own = self.head.coefficients(statistics[: head_outputs.kinds(self.own)], derivatives, vocabulary)
        return own if self.second is None else torch.cat([own, self.second.coefficients(own[0], derivatives)])

    def pieces(self, count: int) -> Iterator[list[slice]]:
        """Slices of the `count` live rows to run together: one per chunk, several for a rollout longer than a chunk."""
        if self.spans is None:
            yield from ([piece] for piece in head_products.pieces(0, count, self.chunk))
            return
        begin = end = 0
        for first, last in self.spans:
            if last - begin > self.chunk and end > begin:
                yield head_products.pieces(begin, end, self.chunk)
                begin = first
            end = last
        if end > begin:
            yield head_products.pieces(begin, end, self.chunk)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, hidden: Tensor, weight: Tensor, bias, down, up, *params: Tensor):
        needs = [call.backward and need for need in ctx.needs_input_grad[1:]]
        loss, gradients = _run(call, hidden.detach(), weight.detach(), params, needs)
        ctx.accumulated, ctx.gradients = call.grad_weight is not None, gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        gradients, ctx.gradients = ctx.gradients, None  # ours to hand over: scaled in place, gone afterwards
        if gradients is None:
            raise RuntimeError(
                "linear_policy_loss: backward must run once per call; got a second one. Its gradients exist after the "
                "forward and were handed over: call the op again, and checkpoint the backbone, not this op."
            )
        if ctx.accumulated and g.device.type == "cpu" and g != 1:
            raise RuntimeError(
                f"linear_policy_loss: with grad_weight= the loss must be the root of backward; got an upstream "
                f"gradient of {g.item()}. Scale inside token_loss, whose gradient is already in grad_weight."
            )
        if g.device.type != "cpu" or g != 1:
            gradients = [None if d is None else d.mul_(g) for d in gradients]
        return None, *gradients


def _run(call: Call, hidden: Tensor, weight: Tensor, params: Sequence[Tensor], needs):
    """Stream the live rows: the loss, and its gradients to hidden, weight, the head's terms and params."""
    count = len(hidden) if call.rows is None else len(call.rows)
    products = head_products.HeadProducts(
        hidden, weight, call.rows, chunk=min(call.chunk, count), dtype=call.dtype, bias=call.head.bias,
        lora=call.head.lora, inner=call.head.inner, allowed=call.allowed, needs=needs[:5],
        grad_weight=call.grad_weight, shards=call.head.shards, batch_invariant=call.batch_invariant,
    )  # fmt: skip
    if call.second is not None:
        call.second.start(call.rows, min(call.chunk, count), call.batch_invariant)
    backward = any(needs) or call.grad_weight is not None
    d_params = [
        torch.zeros_like(p, dtype=call.dtype) if need else None for p, need in zip(params, needs[5:], strict=True)
    ]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for pieces in call.pieces(count):
        rows = products.row_numbers(slice(pieces[0].start, pieces[-1].stop))
        statistics = [call.statistics(products.logits(piece), products.row_numbers(piece), piece) for piece in pieces]
        joined = statistics[0] if len(pieces) == 1 else torch.cat(statistics, dim=1)
        losses, derivatives = _differentiate(call, joined, rows, params, d_params, backward)
        total += losses.detach().sum(dtype=torch.float64)
        if not backward:
            continue
        coefficients = call.coefficients(joined, derivatives, weight.shape[0])
        for piece in reversed(pieces):  # the last piece's logits are still in the buffer
            if piece is not pieces[-1]:
                products.logits(piece)
                if call.second is not None:
                    call.second.products.logits(piece)
            at = slice(piece.start - pieces[0].start, piece.stop - pieces[0].start)
            _backpropagate(call, products, piece, rows[at], joined[:, at], coefficients[:, at])
    return total.to(call.dtype), [*products.gradients(), *d_params]


def _differentiate(call, statistics, rows, params, d_params, backward):
    """Evaluate token_loss on leaves that hold the outputs; return its losses and its derivative to each output."""
    values = call.named(statistics)
    leaves = {name: value.detach().requires_grad_(backward) for name, value in values.items()}
    with torch.set_grad_enabled(backward):
        losses = call.evaluate(Outputs(**leaves), rows)
    if not backward:
        return losses, {}
    if not losses.requires_grad:
        raise ValueError(
            "linear_policy_loss: token_loss must depend on its outputs; got a loss without a graph. "
            "Use out.logprob without detach() or no_grad()."
        )
    wanted = [p for p, d in zip(params, d_params, strict=True) if d is not None]
    loss_contract.refuse_captured(losses, [*leaves.values(), *wanted])
    if os.environ.get("FUSERL_DEBUG") and call.spans is None:
        loss_contract.refuse_coupled(lambda part: call.token_loss(Outputs(**part(leaves)), part(rows)), losses)
    ones = torch.ones_like(losses)
    gradients = torch.autograd.grad(losses, [*leaves.values(), *wanted], grad_outputs=ones, allow_unused=True)
    accumulators = [d for d in d_params if d is not None]
    for accumulator, gradient in zip(accumulators, gradients[len(leaves) :], strict=True):
        if gradient is not None:
            accumulator += gradient
    return losses, dict(zip(leaves, gradients, strict=False))


def _backpropagate(call, products, piece, rows, statistics, coefficients):
    """Turn the chunk's logits into their gradient and add its products; rows without a gradient cost no product."""
    alive = head_products.places_alive(coefficients)
    logits, out = products.gradient_buffers(piece)
    if alive is not None:
        _compact(logits, alive)
        if call.second is not None:
            _compact(call.second.products.buffer, alive)
        logits, out, rows = logits[: len(alive)], out[: len(alive)], rows[alive]
        statistics, coefficients = statistics[:, alive], coefficients[:, alive]
    beside = None
    if call.second is not None:
        beside = call.second.gradient(
            logits, rows, statistics[head_outputs.kinds(call.own) :], coefficients[call.head.terms :]
        )
    into = out if beside is None else logits  # in full precision until both are added
    call.head.gradient(logits, call.ids, rows, statistics[2:4], coefficients[: call.head.terms], into, call.backend)
    if beside is not None:
        torch.add(logits, beside, out=out)
    products.accumulate(out, piece, alive)


def _compact(logits: Tensor, alive: Tensor) -> None:
    """Move the rows `alive` to the front, in place: row k is read from alive[k] >= k, so none is overwritten unread."""
    for k, row in enumerate(alive.tolist()):
        if k != row:
            logits[k] = logits[row]


def _chunk(hidden: Tensor, weight: Tensor, chunk: int | None, batch_invariant: bool) -> int:
    return head_products.BUCKET if batch_invariant else chunk or head_products.default_chunk(hidden, weight)


def _call(
    hidden,
    weight,
    ids,
    token_loss,
    outputs,
    terms,
    *,
    scope,
    offsets,
    live,
    grad_weight,
    reference,
    group,
    chunk,
    batch_invariant,
    backend,
) -> Call:
    """The arguments of linear_policy_loss, checked, as the implementations take them."""
    given = {name: terms[name] for name in ("bias", "lora", "extra_ids", "allowed")}
    loss_contract.check(
        hidden, weight, ids, outputs=outputs, scope=scope, live=live, chunk=chunk, grad_weight=grad_weight,
        batch_invariant=batch_invariant, **given,
    )  # fmt: skip
    dtype, backward = softmax_rows.accumulator(hidden.dtype), torch.is_grad_enabled()
    shards = head_outputs.shards_of(
        _NAME, group, hidden, weight, ids, terms, outputs=outputs, chunk=chunk, mask=live, reference=reference
    )
    rows, allowed = None if live is None or bool(live.all()) else live.nonzero().squeeze(-1), terms.pop("allowed")
    if allowed is not None:
        check_lists(_NAME, allowed, len(weight))
        allowed = Allowed(*allowed)
    backend = choose(_NAME, IMPLS, hidden.device, backend)
    head = head_outputs.head_of(_NAME, ids, dtype, allowed=allowed, shards=shards, **terms)
    return Call(
        ids, token_loss, outputs,
        rows=None if rows is None else rows.to(ids.device),
        spans=loss_contract.live_spans(scope, offsets, live, len(hidden)),
        chunk=_chunk(hidden, weight, vocabulary_shards.chunk_of(chunk, group, ids), batch_invariant),
        batch_invariant=batch_invariant,
        head=head,
        second=second_head.second_head((hidden, weight, head), reference, outputs, backend),
        allowed=None if allowed is None else allowed.take(_NAME, rows),
        grad_weight=grad_weight if backward else None,
        backward=backward,
        dtype=dtype,
        backend=backend,
    )  # fmt: skip


IMPLS = {"triton": _OnePass.apply, "cpu": _OnePass.apply, "reference": reference}


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, token_loss: Callable, *,
    outputs: Sequence[str] = ("logprob",), scope: str = "token", offsets: Tensor | None = None,
    live: Tensor | None = None, params: Sequence[Tensor] = (), grad_weight: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None, bias: Tensor | None = None, softcap: float | None = None,
    logit_scale: float | None = None, temperature: float | Tensor = 1.0, reference: Sequence | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None, extra_ids: Tensor | None = None,
    allowed: tuple[Tensor, Tensor] | None = None, chunk: int | None = None, batch_invariant: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Outputs, dict[str, Tensor]]:  # fmt: skip
    """Sum of any per-token loss of the log-probs, from hidden states, with its gradients, in one pass.

        loss = sum_n token_loss(out, rows)[n],    out.logprob = log_softmax(z / temperature)[ids]
        z = logit_scale (hidden @ weight.T + scale (hidden @ A.T) @ B.T + bias);    with softcap c instead c tanh(z / c)

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64, the state that predicts each token of ids, (N,) int64.
        weight: (V, D), the head, of hidden's dtype, as `linear_logprob` takes it.
        token_loss: called as token_loss(out, rows) with out.<output> (n,) float32 for each requested output and rows
            (n,) int64, their indices in hidden. Returns one loss per row, already normalised, or that and a dict of
            statistics, each (n,), or (1, K) for numbers of the chunk. Evaluated once per chunk under autograd.
        outputs: what out holds: logprob, entropy, ... as in `linear_logprob`, and, with a reference, kinds of
            `divergence` from it over the whole vocabulary: forward_kl, reverse_kl, ...
        scope: "token" when a row's loss depends on that row only (checked under FUSERL_DEBUG=1); "rollout" when on its
            rollout's rows, "batch" on all, which token_loss then sees together: beyond a chunk, for one product more.
        offsets: (B + 1,) int64 on the host, rollout b is rows offsets[b] to offsets[b + 1]; for scope "rollout".
        live: (N,) bool on the host, constant within a "rollout"; False where loss and gradient are known to be 0: the
            row costs nothing and token_loss never sees it.
        params: trainable tensors that token_loss uses besides out; their gradients are returned to them.
        grad_weight: (V, D) float32, to which d_weight is added during this call, instead of being returned.
        group: process group that cuts the vocabulary (`vocabulary_shards`), of grad_weight and B too; token_loss, run
            by each rank on the same bits, must be deterministic. Not with extra_ids, allowed or a reference.
        bias: (V,), the head's; differentiable.
        softcap, logit_scale, temperature: positive numbers, temperature also (N,); not differentiable.
        lora: (A, B, scale), (r, D) and (V, r) of a floating dtype and a number: an adapter, as in `linear_logprob`.
        extra_ids: (N,) int64, a second token per row, whose log-probability is the output extra_logprob.
        allowed: (ids, offsets), (M,) and (N + 1,) int64 on the host: each row's tokens, as in `linear_logprob`.
        reference: hidden (N, D_q) and weight (V, D_q) of a reference or teacher, or a `second_head.Reference`; as data.
        chunk: rows at a time; 512 on CPU; on GPU as many as make 512 MiB of logits, 2048 with group.
        batch_invariant: the same bits for a row whatever is beside it, as in `linear_logprob`; without chunk.
        backend: "triton", "cpu" or "reference" (holds all logits); the fastest that runs here by default.

    Returns:
        (loss, out, stats): a scalar whose backward only scales gradients that exist already; outputs and statistics,
        each (N,), detached, NaN in rows that were not live, or (chunks, K).

    Raises:
        ValueError: on a wrong shape, dtype, device or name, and when token_loss captures a trainable tensor.

    Memory: a chunk of float32 logits (on GPU its gradient too), with a reference another. Sibling: `linear_logprob`.
    """
    hidden, weight, bias = head_outputs.operands(_NAME, hidden, weight, bias, group, grad_weight=grad_weight)
    terms = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale, "temperature": temperature, "lora": lora}
    terms |= {"extra_ids": extra_ids, "allowed": allowed}
    given = {"scope": scope, "offsets": offsets, "live": live, "grad_weight": grad_weight, "reference": reference}
    given |= {"group": group, "chunk": chunk, "batch_invariant": batch_invariant, "backend": backend}
    call = _call(hidden, weight, ids, token_loss, tuple(outputs), terms, **given)
    with torch.autocast(hidden.device.type, enabled=False):
        loss = IMPLS[call.backend](call, hidden, weight, bias, *(lora or (None, None))[:2], *params)
    return loss, Outputs(**call.out), call.stats
