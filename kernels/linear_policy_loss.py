"""Any token loss straight from hidden states: three matrix products, one chunk of logits, whatever the loss.

    z = hidden @ weight.T / temperature      out.logprob[n] = log_softmax(z[n])[ids[n]], out.entropy[n], ...
    loss = sum_n token_loss(out, rows)[n]

The loss is a function of a few numbers per row, so for each chunk of rows it is evaluated and differentiated by
autograd on those numbers alone; with its derivatives g the logits' gradient is, elementwise,

    dz[n, v] = g_logprob (1[v = id] - p) - g_entropy p (log p + entropy) + g_mean_logprob (1/V - p)
             + 2 g_sum_sq p (p - sum_sq) + g_mean_logit / V

and takes the logits' place before the two products that give d_hidden and d_weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.kernels import head_products, loss_contract, softmax_rows
from fuserl.kernels.dispatch import choose
from fuserl.kernels.token_logprob import split_temperature

__all__ = ["linear_policy_loss"]

OUTPUTS = loss_contract.OUTPUTS


class Outputs(SimpleNamespace):
    """The requested outputs, one (n,) tensor each, by name."""

    def __getattr__(self, name: str):
        raise AttributeError(
            f"linear_policy_loss: out has no {name!r}; got outputs={tuple(vars(self))}. "
            f"Ask for it in outputs=, out of {', '.join(OUTPUTS)}."
        )


def reference(call: Call, hidden: Tensor, weight: Tensor, *params: Tensor) -> Tensor:
    """The definition: all logits at once and autograd through them."""
    if call.grad_weight is not None:
        raise ValueError("linear_policy_loss: the reference cannot add to grad_weight; got one. Use another backend.")
    rows = call.rows if call.rows is not None else torch.arange(len(hidden), device=hidden.device)
    z = hidden[rows].to(call.dtype) @ weight.to(call.dtype).T / call.row_temperatures(rows)
    logp = z.log_softmax(-1)
    p, finite = logp.exp(), logp.masked_fill(logp == -torch.inf, 0.0)
    every = {
        "logprob": logp.gather(-1, call.ids[rows, None]).squeeze(-1),
        "entropy": -(p * finite).sum(-1),
        "mean_logprob": logp.mean(-1),
        "sum_sq_prob": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "is_top1": (z.gather(-1, call.ids[rows, None]).squeeze(-1) == z.amax(-1)).to(z.dtype),
    }
    losses = call.evaluate(Outputs(**{name: every[name] for name in call.outputs}), rows)
    return losses.sum().float() if call.dtype == torch.float32 else losses.sum()


@dataclass
class Call:
    """The arguments of one call that autograd does not see, and the per-row results it leaves."""

    ids: Tensor
    token_loss: Callable
    outputs: tuple[str, ...]
    rows: Tensor | None  # live rows, ascending, or None for all
    spans: list[tuple[int, int]] | None  # rollouts as [begin, end) among the live rows; None when rows are independent
    chunk: int
    temperature: float
    row_temperature: Tensor | None
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

    def statistics(self, logits: Tensor, rows: Tensor) -> Tensor:
        """(4 or 7, n) statistics of the chunk's logits: softmax_rows.forward's rows."""
        count = 4 if {"logprob", "entropy"}.issuperset(self.outputs) else 7
        temperatures = None if self.row_temperature is None else self.row_temperature[rows]
        return softmax_rows.forward(logits[None], self.ids[rows], self.temperature, temperatures, count, self.backend)

    def row_temperatures(self, rows: Tensor) -> float | Tensor:
        """The temperature that divides each row's logits, broadcastable to (n, V)."""
        return self.temperature if self.row_temperature is None else self.row_temperature[rows, None]

    def pieces(self, count: int) -> Iterator[list[slice]]:
        """Slices of the `count` live rows to run together: one per chunk, several for a rollout longer than a chunk."""
        if self.spans is None:
            for begin in range(0, count, self.chunk):
                yield [slice(begin, min(begin + self.chunk, count))]
            return
        begin = end = 0
        for first, last in self.spans:
            if last - begin > self.chunk and end > begin:
                yield _cut(begin, end, self.chunk)
                begin = first
            end = last
        if end > begin:
            yield _cut(begin, end, self.chunk)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, hidden: Tensor, weight: Tensor, *params: Tensor):
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


def _run(call: Call, hidden: Tensor, weight: Tensor, params: Sequence[Tensor], needs: Sequence[bool]):
    """Stream the live rows: the loss, and its gradients to hidden, weight and params where they are needed."""
    count = len(hidden) if call.rows is None else len(call.rows)
    products = head_products.HeadProducts(
        hidden, weight, call.rows, chunk=min(call.chunk, count), dtype=call.dtype,
        hidden_grad=needs[0], weight_grad=needs[1], grad_weight=call.grad_weight,
    )  # fmt: skip
    backward = any(needs) or call.grad_weight is not None
    d_params = [
        torch.zeros_like(p, dtype=call.dtype) if need else None for p, need in zip(params, needs[2:], strict=True)
    ]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for pieces in call.pieces(count):
        rows = products.row_numbers(slice(pieces[0].start, pieces[-1].stop))
        statistics = [call.statistics(products.logits(piece), products.row_numbers(piece)) for piece in pieces]
        joined = statistics[0] if len(pieces) == 1 else torch.cat(statistics, dim=1)
        losses, derivatives = _differentiate(call, joined, rows, params, d_params, backward)
        total += losses.detach().sum(dtype=torch.float64)
        if not backward:
            continue
        coefficients = _coefficients(joined, derivatives, weight.shape[0])
        for piece in reversed(pieces):  # the last piece's logits are still in the buffer
            if piece is not pieces[-1]:
                products.logits(piece)
            at = slice(piece.start - pieces[0].start, piece.stop - pieces[0].start)
            _backpropagate(call, products, piece, rows[at], joined[2:4, at], coefficients[:, at])
    return total.to(call.dtype), [products.d_hidden, products.finished_weight(), *d_params]


def _differentiate(call, statistics, rows, params, d_params, backward):
    """Evaluate token_loss on leaves that hold the outputs; return its losses and its derivative to each output."""
    leaves = {name: value.detach().requires_grad_(backward) for name, value in _named(statistics, call.outputs).items()}
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


def _named(statistics: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The requested outputs out of softmax_rows' statistics."""
    order = ("logprob", "entropy", "lse", "lse_error", "mean_logit", "sum_sq_prob", "is_top1")
    named = dict(zip(order, statistics, strict=False))
    if len(statistics) == len(order):
        # good to eps times the largest logit: where all logits are near 1e4, to 1e-3
        named["mean_logprob"] = named["mean_logit"] - named["lse"] - named["lse_error"]
    return {name: named[name] for name in outputs}


def _coefficients(statistics: Tensor, derivatives: dict[str, Tensor | None], vocabulary: int) -> Tensor:
    """The (5, n) row coefficients of softmax_rows.gradient: dz = a + p (b + c log p + d p) + e 1[v = id]."""
    zero = torch.zeros_like(statistics[0])
    g = {name: zero if derivatives.get(name) is None else derivatives[name] for name in OUTPUTS}
    a = (g["mean_logprob"] + g["mean_logit"]) / vocabulary
    b = -g["logprob"] - g["entropy"] * statistics[1] - g["mean_logprob"]
    if len(statistics) > 4:
        b = b - 2 * g["sum_sq_prob"] * statistics[5]
    return torch.stack([a, b, -g["entropy"], 2 * g["sum_sq_prob"], g["logprob"]])


def _backpropagate(call, products, piece, rows, lse, coefficients):
    """Turn the chunk's logits into their gradient and add its products; rows without a gradient cost no product."""
    alive = None
    if rows.device.type == "cpu":  # elsewhere the count would have to be waited for
        alive = coefficients.any(dim=0).nonzero().squeeze(-1)
        alive = None if len(alive) == len(rows) else alive
    logits, out = products.gradient_buffers(piece)
    if alive is not None:
        _compact(logits, alive)
        logits, out, rows = logits[: len(alive)], out[: len(alive)], rows[alive]
        lse, coefficients = lse[:, alive], coefficients[:, alive]
    temperatures = None if call.row_temperature is None else call.row_temperature[rows]
    softmax_rows.gradient(
        logits[None], call.ids[rows], lse.contiguous(), coefficients.contiguous(), call.temperature, temperatures,
        out[None], call.backend,
    )  # fmt: skip
    products.accumulate(out, piece, alive)


def _compact(logits: Tensor, alive: Tensor) -> None:
    """Move the rows `alive` to the front, in place: row k is read from alive[k] >= k, so none is overwritten unread."""
    for k, row in enumerate(alive.tolist()):
        if k != row:
            logits[k] = logits[row]


def _as_autocast(operand: Tensor) -> Tensor:
    """A float32 operand of a product in the dtype that autocast, where it is on, gives to products."""
    device = operand.device.type
    if not torch.is_autocast_enabled(device) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device))


def _cut(begin: int, end: int, chunk: int) -> list[slice]:
    return [slice(at, min(at + chunk, end)) for at in range(begin, end, chunk)]


IMPLS = {"triton": _OnePass.apply, "cpu": _OnePass.apply, "reference": reference}


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    token_loss: Callable,
    *,
    outputs: Sequence[str] = ("logprob",),
    scope: str = "token",
    offsets: Tensor | None = None,
    live: Tensor | None = None,
    params: Sequence[Tensor] = (),
    grad_weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Outputs, dict[str, Tensor]]:
    """Sum of any per-token loss of the log-probs, from hidden states, with its gradients, in one pass.

        loss = sum_n token_loss(out, rows)[n],    out.logprob = log_softmax(hidden @ weight.T / temperature)[ids]

    Args:
        hidden: (N, D) float32, bfloat16, float16 or float64, the state that predicts each token of ids, (N,) int64.
        weight: (V, D), the head, of hidden's dtype (autocast casts both); its gradient is skipped if it requires none.
        token_loss: called as token_loss(out, rows) with out.<output> (n,) float32 for each requested output and rows
            (n,) int64, their indices in hidden. Returns one loss per row, already normalised, or that and a dict of
            statistics, each (n,), or (1, K) for numbers of the chunk. Evaluated once per chunk under autograd.
        outputs: what out holds: logprob, entropy, mean_logprob and mean_logit (over the vocabulary, of the scaled
            logits), sum_sq_prob, is_top1 (1.0 where the token has the largest logit). All but is_top1 carry gradient.
        scope: "token" when a row's loss depends on that row only (checked under FUSERL_DEBUG=1); "rollout" when on its
            rollout's rows, which token_loss then sees together; a rollout longer than a chunk is computed twice.
        offsets: (B + 1,) int64 on the host, rollout b is rows offsets[b] to offsets[b + 1]; for scope "rollout".
        live: (N,) bool on the host; False marks a row whose loss and gradient are known to be zero: it costs nothing
            and token_loss never sees it. With scope "rollout", constant within a rollout.
        params: trainable tensors that token_loss uses besides out; their gradients are returned to them.
        grad_weight: (V, D) float32, to which d_weight is added during this call, instead of being returned.
        temperature: positive number, or (N,); not differentiable.
        chunk: rows at a time; 512 on CPU; on GPU as many as make 512 MiB of logits.
        backend: "triton", "cpu" or "reference" (holds all logits); the fastest that runs here by default.

    Returns:
        (loss, out, stats): a scalar whose backward only scales gradients that exist already; outputs and statistics,
        each (N,), detached, NaN in rows that were not live, or (chunks, K).

    Raises:
        ValueError: on a wrong shape, dtype, device or name, and when token_loss captures a trainable tensor.

    Memory: one chunk of float32 logits (on GPU its gradient too), the returned gradients. Sibling: `token_logprob`.
    """
    hidden, weight, outputs = _as_autocast(hidden), _as_autocast(weight), tuple(outputs)
    loss_contract.check(hidden, weight, ids, outputs=outputs, scope=scope, live=live, grad_weight=grad_weight)
    spans = loss_contract.live_spans(offsets, live, len(hidden)) if scope == "rollout" else None
    row_temperature, temperature = split_temperature("linear_policy_loss", temperature, ids)
    rows = None if live is None or bool(live.all()) else live.nonzero().squeeze(-1).to(ids.device)
    call = Call(
        ids, token_loss, outputs, rows, spans, chunk or head_products.default_chunk(hidden, weight), temperature,
        row_temperature, grad_weight if torch.is_grad_enabled() else None, torch.is_grad_enabled(),
        softmax_rows.accumulator(hidden.dtype), choose("linear_policy_loss", IMPLS, hidden.device, backend),
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        return IMPLS[call.backend](call, hidden, weight, *params), Outputs(**call.out), call.stats
