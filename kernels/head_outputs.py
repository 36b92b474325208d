"""What a vocabulary head makes of a product, and what is read of it: the outputs that both ops of the head share.

    u = hidden @ weight.T + bias, with an adapter + scale (hidden @ down.T) @ up.T
    z = logit_scale u / temperature                                  softcap tanh(logit_scale u / softcap) / temperature
    logprob, entropy, mean_logprob, sum_sq_prob, mean_logit, is_top1, extra_logprob of softmax(z), per row

A chunk's buffer holds x = u, or x = tanh(logit_scale u / softcap), so that z is x over a temperature that the row
kernels divide by anyway. Its gradient is, elementwise, with g the derivatives of the loss to the outputs

    dz[v] = g_logprob (1[v = id] - p) - g_entropy p (log p + entropy) + g_mean_logprob (1/V - p)
          + 2 g_sum_sq p (p - sum_sq) + g_mean_logit / V + g_extra (1[v = extra_id] - p)

Where lists of allowed tokens are given, z is -inf everywhere else; the log-prob of a token that is not in its row's
list is -inf, a constant, and its gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows, vocabulary_shards, whole_weight
from fuserl.kernels.allowed import Allowed, check_form
from fuserl.kernels.head_products import Lora
from fuserl.kernels.token_logprob import each_temperature, split_temperature
from fuserl.kernels.vocabulary_shards import VocabularyShards

OUTPUTS = ("logprob", "entropy", "mean_logprob", "sum_sq_prob", "mean_logit", "is_top1")
EXTRA = "extra_logprob"  # the output that extra_ids adds to these
_MEANS = ("mean_logprob", "mean_logit")


class Outputs:
    """The requested outputs, one number per row each, by name."""

    def __init__(self, **values: Tensor):
        for name, value in values.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"Outputs({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    def __getattr__(self, name: str):
        raise AttributeError(
            f"outputs: out has no {name!r}; got outputs={tuple(vars(self))}. Ask for it in outputs=, out of "
            f"{', '.join(OUTPUTS)}."
        )


@dataclass(frozen=True)
class Head:
    """What follows the product hidden @ weight.T, with the numbers as the caller gave them."""

    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    temperature: float
    row_temperature: Tensor | None  # (N,), in place of the one temperature
    lora: Lora | None = None
    extra_ids: Tensor | None = None  # (N,), the tokens of extra_logprob
    allowed: Allowed | None = None  # lists for all N rows
    shards: VocabularyShards | None = None  # where other ranks hold the rest of the vocabulary

    @property
    def inner(self) -> float | None:
        """Factor of u inside the tanh that gives x; None where x = u."""
        return None if self.softcap is None else self.logit_scale / self.softcap

    @property
    def terms(self) -> int:
        """How many coefficients a row's gradient has."""
        return 5 + (self.extra_ids is not None)

    def temperatures(self, rows: Tensor | slice) -> tuple[float, Tensor | None]:
        """The number, or one per row, that turns x into z."""
        outer = self.logit_scale if self.softcap is None else self.softcap
        if self.row_temperature is None:
            return self.temperature / outer, None
        return 1.0, self.row_temperature[rows] / outer

    def each_temperature(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What turns x into z in each of all rows, (N,)."""
        number, rows = self.temperatures(slice(None))
        return each_temperature(rows, number, count, dtype, device)

    def statistics(self, x: Tensor, ids: Tensor, rows: Tensor, outputs: Sequence[str], backend: str) -> Tensor:
        """(K, n) rows of softmax_rows.forward of a chunk, and extra_logprob as the last; K from `kinds`.

        ids is (N,) and rows (n,), the chunk's rows of the whole.
        """
        temperatures, count = self.temperatures(rows), kinds(outputs) - (EXTRA in outputs)
        given = ids[rows], *temperatures, count, backend
        if self.shards is not None:
            return self.shards.statistics(x, *given, top=self.bias is not None or "is_top1" in outputs)
        statistics = softmax_rows.forward(x[None], *given)
        if EXTRA not in outputs:
            return statistics
        logprob = self._logprob(x, self._extra(rows, x.shape[1]), statistics[2:4], temperatures)
        return torch.cat([statistics, logprob.to(statistics.dtype)[None]])

    def coefficients(self, statistics: Tensor, derivatives: dict[str, Tensor | None], vocabulary: int) -> Tensor:
        """The (5, n) row coefficients of softmax_rows.gradient, dz = a + p (b + c log p + d p) + e 1[v = id].

        With extra_ids a sixth row, f of + f 1[v = extra_id].
        """
        vocabulary = vocabulary if self.shards is None else self.shards.vocabulary
        zero = torch.zeros_like(statistics[0])
        g = {name: zero if derivatives.get(name) is None else derivatives[name] for name in (*OUTPUTS, EXTRA)}
        if self.allowed is not None:
            for name, logprob in (("logprob", statistics[0]), (EXTRA, statistics[-1])):
                if derivatives.get(name) is not None:
                    g[name] = torch.where(logprob == -torch.inf, zero, g[name])
        a = (g["mean_logprob"] + g["mean_logit"]) / vocabulary
        b = -g["logprob"] - g["entropy"] * statistics[1] - g["mean_logprob"] - g[EXTRA]
        if len(statistics) >= 8:
            b = b - 2 * g["sum_sq_prob"] * statistics[5]
        extra = [] if self.extra_ids is None else [g[EXTRA]]
        coefficients = torch.stack([a, b, -g["entropy"], 2 * g["sum_sq_prob"], g["logprob"], *extra])
        return coefficients if self.inner is None else coefficients * self.inner

    def gradient(
        self, x: Tensor, ids: Tensor, rows: Tensor, lse: Tensor, coefficients: Tensor, out: Tensor, backend: str
    ) -> None:
        """Write the gradient to u of a chunk, (n, V), from its lse (2, n) and coefficients; out may be x."""
        extra, chosen = None, ids[rows]
        if self.extra_ids is not None:
            extra = self._extra(rows, x.shape[1])[:, None]
            column = self._column(x, chosen, extra, rows, lse, coefficients)  # before x is overwritten
        if self.shards is not None:
            chosen, coefficients = self.shards.owned(chosen, coefficients)
        softmax_rows.gradient(
            x[None], chosen, lse.contiguous(), coefficients[:5].contiguous(), *self.temperatures(rows), out[None],
            backend, through_tanh=self.inner is not None,
        )  # fmt: skip
        if extra is not None:
            out.scatter_(1, extra, column[:, None].to(out.dtype))

    def _extra(self, rows: Tensor, vocabulary: int) -> Tensor:
        extra = self.extra_ids[rows]
        if extra.device.type == "cpu" and not ((extra >= 0) & (extra < vocabulary)).all():
            raise ValueError(
                f"extra_ids: each must lie in [0, {vocabulary}); got {extra.amin().item()} to {extra.amax().item()}. "
                "Give every row a token."
            )
        return extra

    def _logprob(self, x: Tensor, tokens: Tensor, lse: Tensor, temperatures) -> Tensor:
        """log p of one token per row, float64: a rounded difference from lse would hide what lse's error corrects."""
        one, per_row = temperatures
        z = x.gather(1, tokens[:, None])[:, 0].double() / (one if per_row is None else per_row.double())
        return (z - lse[0].double()) - lse[1].double()

    def _column(self, x, ids, extra, rows, lse, coefficients) -> Tensor:
        """The gradient to u at each row's extra token, float64: g (1 - p) of a likely one would lose all its digits."""
        one, per_row = temperatures = self.temperatures(rows)
        a, b, c, d, e, f = coefficients.double()
        logp = self._logprob(x, extra[:, 0], lse, temperatures).clamp_min(-1e4)
        p = logp.exp()
        column = (a + p * (b + c * logp + d * p) + torch.where(ids == extra[:, 0], e, 0.0) + f) / (
            one if per_row is None else per_row.double()
        )
        return column if self.inner is None else column * (1 - x.gather(1, extra)[:, 0].double().clamp_min(-1).square())


def head_of(
    op: str,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    temperature: float | Tensor = 1.0,
    lora: Sequence | None = None,
    extra_ids: Tensor | None = None,
    allowed: Allowed | None = None,
    shards: VocabularyShards | None = None,
) -> Head:
    """The head that a caller of `op` describes; a temperature per token comes out flat, in `dtype`."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{op}: {name} must be positive; got {value}. Leave it out for a head without one.")
    row_temperature, temperature = split_temperature(op, temperature, ids)
    if row_temperature is not None:
        row_temperature = row_temperature.to(dtype)
    extra_ids = None if extra_ids is None else extra_ids.reshape(-1)
    return Head(
        bias, softcap, 1.0 if logit_scale is None else float(logit_scale), temperature, row_temperature,
        None if lora is None else Lora(lora[0], lora[1], float(lora[2])), extra_ids, allowed, shards,
    )  # fmt: skip


def shards_of(
    op: str,
    group: torch.distributed.ProcessGroup | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    terms: dict,
    *,
    outputs: Sequence[str],
    chunk: int | None,
    mask: Tensor | None,
    reference: Sequence | None = None,
) -> VocabularyShards | None:
    """The shards of which this rank's weight is one, once all ranks have been seen to make the same call."""
    if group is None:
        return None
    for name, given in (("extra_ids", terms["extra_ids"]), ("allowed", terms["allowed"]), ("reference", reference)):
        requirer(op)(given is None, f"{name} must be left out with group=", "both", "Give each rank the whole head.")
    lora = terms["lora"]
    flags = [hidden.requires_grad, terms["bias"] is not None, lora is not None, lora and lora[0].requires_grad]
    agreed = [chunk or 0, *map(bool, flags), *(name in outputs for name in OUTPUTS)]
    sizes = vocabulary_shards.sizes(op, group, ids, mask, weight.shape[0], agreed=[int(x) for x in agreed])
    return VocabularyShards(sizes, group.group_name)


def kinds(outputs: Sequence[str]) -> int:
    """How many statistics the outputs need."""
    return (4 if {"logprob", "entropy", EXTRA}.issuperset(outputs) else 8) + (EXTRA in outputs)


def named(statistics: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The requested outputs out of softmax_rows' statistics."""
    order = ("logprob", "entropy", "lse", "lse_error", "mean_logit", "sum_sq_prob", "is_top1", "mean_logprob")
    rows = {**dict(zip(order, statistics, strict=False)), EXTRA: statistics[-1]}
    return {name: rows[name] for name in outputs}


def scaled_logits(hidden: Tensor, weight: Tensor, rows: Tensor, head: Head) -> Tensor:
    """z of some rows, (n, V), in plain torch."""
    dtype = softmax_rows.accumulator(hidden.dtype)
    z = hidden[rows].to(dtype) @ weight.to(dtype).T
    if head.lora is not None:
        down, up, scale = head.lora
        z = z + scale * (hidden[rows].to(dtype) @ down.to(dtype).T) @ up.to(dtype).T
    z = head.logit_scale * (z if head.bias is None else z + head.bias.to(dtype))
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    z = z / (head.temperature if head.row_temperature is None else head.row_temperature[rows, None])
    return z if head.allowed is None else z.masked_fill(head.allowed.barred(z.shape[1])[rows], -torch.inf)


def definition(hidden: Tensor, weight: Tensor, ids: Tensor, rows: Tensor, head: Head) -> dict[str, Tensor]:
    """Every output at some rows in plain torch, through all logits at once."""
    z = scaled_logits(hidden, weight, rows, head)
    logp, chosen = z.log_softmax(-1), ids[rows, None]
    p, finite = logp.exp(), logp.masked_fill(logp == -torch.inf, 0.0)

    def logprob(tokens: Tensor) -> Tensor:
        found = logp.gather(-1, tokens).squeeze(-1)
        return found if head.allowed is None else torch.where(found == -torch.inf, found.detach(), found)

    extra = {} if head.extra_ids is None else {EXTRA: logprob(head.extra_ids[rows, None])}
    return {
        **extra,
        "logprob": logprob(chosen),
        "entropy": -(p * finite).sum(-1),
        "mean_logprob": logp.mean(-1),
        "sum_sq_prob": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "is_top1": (z.gather(-1, chosen).squeeze(-1) == z.amax(-1)).to(z.dtype),
    }


def operands(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: torch.distributed.ProcessGroup | None,
    **plain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias as the products take them: cast where autocast says so, and gathered where sharded.

    Raises ValueError where hidden, or another tensor that must be `plain`, by name, is a DTensor.
    """
    whole_weight.refuse(op, hidden=hidden, **plain)
    hidden = as_autocast(hidden)
    bias = whole_weight.whole(bias, group=group, op=op)
    return hidden, as_autocast(whole_weight.whole(weight, dtype=hidden.dtype, group=group, op=op)), bias


def as_autocast(operand: Tensor) -> Tensor:
    """A float32 operand of a product in the dtype that autocast, where it is on, gives to products."""
    device = operand.device.type
    if not torch.is_autocast_enabled(device) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(device))


def check(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    outputs: Sequence[str],
    bias: Tensor | None,
    chunk: int | None,
    batch_invariant: bool = False,
    lora: Sequence | None = None,
    extra_ids: Tensor | None = None,
    allowed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Raise ValueError with the first broken contract of the arguments that both ops have."""
    require, shape = requirer(op), tuple(hidden.shape[:-1])
    check_head(op, hidden, weight, bias)
    require(
        ids.shape == shape and ids.dtype == torch.int64 and ids.device == hidden.device,
        f"ids must be {shape} int64 on {hidden.device}", f"{tuple(ids.shape)} {ids.dtype} on {ids.device}",
        "Pass one token per row of hidden.",
    )  # fmt: skip
    names = OUTPUTS if extra_ids is None else (*OUTPUTS, EXTRA)
    require(
        bool(outputs) and set(outputs) <= set(names), f"outputs must be among {', '.join(names)}", outputs,
        "Correct the name." if EXTRA not in outputs else "Give extra_ids for extra_logprob.",
    )  # fmt: skip
    if extra_ids is not None:
        require(
            extra_ids.shape == shape and extra_ids.dtype == torch.int64 and extra_ids.device == hidden.device,
            f"extra_ids must be {shape} int64 on {hidden.device}",
            f"{tuple(extra_ids.shape)} {extra_ids.dtype} on {extra_ids.device}", "Pass a second token per row.",
        )  # fmt: skip
        require(EXTRA in outputs, "extra_ids must be read", f"outputs={outputs}", f"Ask for {EXTRA!r} in outputs=.")
    if allowed is not None:
        check_form(op, allowed, ids)
        means = [name for name in outputs if name in _MEANS]
        require(not means, "outputs must be finite where some tokens are not allowed", means, "Leave the means out.")
    if lora is not None:
        _check_lora(require, weight, lora)
    check_chunk(op, chunk)
    require(not (chunk and batch_invariant), "chunk must be left out with batch_invariant", chunk, "It is 64 then.")


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, side: str = "") -> None:
    """As `check`, of the operands of one product; `side` is what their names end in."""
    require = requirer(op)
    require(
        hidden.dim() >= 2 and hidden.is_floating_point(), f"hidden{side} must be (..., D) of a floating dtype",
        f"{tuple(hidden.shape)} {hidden.dtype}", "Pass the states before the head.",
    )  # fmt: skip
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        f"weight{side} must be (V, {hidden.shape[-1]})", tuple(weight.shape),
        "Pass the head's weight, not its transpose.",
    )  # fmt: skip
    require(
        weight.dtype == hidden.dtype and weight.device == hidden.device,
        f"weight{side} must be {hidden.dtype} on {hidden.device} like hidden{side}",
        f"{weight.dtype} on {weight.device}", "Convert one to the other.",
    )  # fmt: skip
    if bias is not None:
        require(
            bias.shape == weight.shape[:1] and bias.is_floating_point() and bias.device == weight.device,
            f"bias{side} must be ({weight.shape[0]},) of a floating dtype on {weight.device}",
            f"{tuple(bias.shape)} {bias.dtype} on {bias.device}", "Pass the head's own.",
        )  # fmt: skip


def check_chunk(op: str, chunk: int | None) -> None:
    """As `check`, of how many rows are taken at a time."""
    requirer(op)(chunk is None or chunk > 0, "chunk must be a positive number of rows", chunk, "Leave it out.")


def check_mask(op: str, mask: Tensor | None, hidden: Tensor) -> None:
    """As `check`, of the mask of tokens."""
    tokens = tuple(hidden.shape[:-1])
    if mask is not None:
        requirer(op)(
            mask.shape == tokens and mask.dtype == torch.bool and mask.device.type in ("cpu", hidden.device.type),
            f"mask must be {tokens} bool on the host or {hidden.device}",
            f"{tuple(mask.shape)} {mask.dtype} on {mask.device}", "Use mask != 0.",
        )  # fmt: skip


def _check_lora(require, weight: Tensor, lora: Sequence) -> None:
    require(
        isinstance(lora, tuple | list) and len(lora) == 3 and isinstance(lora[2], int | float),
        "lora must be (A, B, scale), two matrices and a number", type(lora).__name__, "Take scale = alpha / rank.",
    )  # fmt: skip
    (vocabulary, width), rank = weight.shape, lora[0].shape[0]
    for name, x, shape in (("A", lora[0], (rank, width)), ("B", lora[1], (vocabulary, rank))):
        require(
            x.shape == shape and x.is_floating_point() and x.device == weight.device,
            f"lora's {name} must be {shape} of a floating dtype on {weight.device}",
            f"{tuple(x.shape)} {x.dtype} on {x.device}", "Pass the adapter's matrices as peft has them.",
        )  # fmt: skip


def requirer(op: str):
    """A function that raises ValueError in the op's name unless a contract holds: (holds, contract, got, cure)."""

    def require(holds: bool, contract: str, got: object, cure: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {contract}; got {got}. {cure}")

    return require
