"""What a vocabulary head makes of a product, and what is read of it: the outputs that both ops of the head share.

    u = hidden @ weight.T + bias
    z = logit_scale u / temperature                                  softcap tanh(logit_scale u / softcap) / temperature
    logprob, entropy, mean_logprob, sum_sq_prob, mean_logit, is_top1 of softmax(z), per row

A chunk's buffer holds x = u, or x = tanh(logit_scale u / softcap), so that z is x over a temperature that the row
kernels divide by anyway. Its gradient is, elementwise, with g the derivatives of the loss to the outputs

    dz[v] = g_logprob (1[v = id] - p) - g_entropy p (log p + entropy) + g_mean_logprob (1/V - p)
          + 2 g_sum_sq p (p - sum_sq) + g_mean_logit / V
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows
from fuserl.kernels.token_logprob import split_temperature

OUTPUTS = ("logprob", "entropy", "mean_logprob", "sum_sq_prob", "mean_logit", "is_top1")


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

    @property
    def inner(self) -> float | None:
        """Factor of u inside the tanh that gives x; None where x = u."""
        return None if self.softcap is None else self.logit_scale / self.softcap

    def temperatures(self, rows: Tensor | slice) -> tuple[float, Tensor | None]:
        """The number, or one per row, that turns x into z."""
        outer = self.logit_scale if self.softcap is None else self.softcap
        if self.row_temperature is None:
            return self.temperature / outer, None
        return 1.0, self.row_temperature[rows] / outer

    def each_temperature(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What turns x into z in each of all rows, (N,)."""
        number, rows = self.temperatures(slice(None))
        return torch.full((count,), number, dtype=dtype, device=device) if rows is None else rows

    def statistics(self, x: Tensor, ids: Tensor, rows: Tensor, outputs: Sequence[str], backend: str) -> Tensor:
        """(K, n) rows of softmax_rows.forward of a chunk, K from `kinds`; ids (N,) and rows (n,) of the whole."""
        return softmax_rows.forward(x[None], ids[rows], *self.temperatures(rows), kinds(outputs), backend)

    def coefficients(self, statistics: Tensor, derivatives: dict[str, Tensor | None], vocabulary: int) -> Tensor:
        """The (5, n) row coefficients of softmax_rows.gradient: dz = a + p (b + c log p + d p) + e 1[v = id]."""
        zero = torch.zeros_like(statistics[0])
        g = {name: zero if derivatives.get(name) is None else derivatives[name] for name in OUTPUTS}
        a = (g["mean_logprob"] + g["mean_logit"]) / vocabulary
        b = -g["logprob"] - g["entropy"] * statistics[1] - g["mean_logprob"]
        if len(statistics) > 4:
            b = b - 2 * g["sum_sq_prob"] * statistics[5]
        coefficients = torch.stack([a, b, -g["entropy"], 2 * g["sum_sq_prob"], g["logprob"]])
        return coefficients if self.inner is None else coefficients * self.inner

    def gradient(
        self, x: Tensor, ids: Tensor, rows: Tensor, lse: Tensor, coefficients: Tensor, out: Tensor, backend: str
    ) -> None:
        """Write the gradient to u of a chunk, (n, V), from its lse (2, n) and coefficients (5, n); out may be x."""
        softmax_rows.gradient(
            x[None], ids[rows], lse.contiguous(), coefficients.contiguous(), *self.temperatures(rows), out[None],
            backend, through_tanh=self.inner is not None,
        )  # fmt: skip


def head_of(
    op: str,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float | None,
    temperature: float | Tensor,
) -> Head:
    """The head that a caller of `op` describes; a temperature per token comes out flat, in `dtype`."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{op}: {name} must be positive; got {value}. Leave it out for a head without one.")
    row_temperature, temperature = split_temperature(op, temperature, ids)
    if row_temperature is not None:
        row_temperature = row_temperature.to(dtype)
    return Head(bias, softcap, 1.0 if logit_scale is None else float(logit_scale), temperature, row_temperature)


def kinds(outputs: Sequence[str]) -> int:
    """How many statistics of softmax_rows the outputs need."""
    return 4 if {"logprob", "entropy"}.issuperset(outputs) else 7


def named(statistics: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The requested outputs out of softmax_rows' statistics."""
    order = ("logprob", "entropy", "lse", "lse_error", "mean_logit", "sum_sq_prob", "is_top1")
    rows = dict(zip(order, statistics, strict=False))
    if len(statistics) == len(order):
        # good to eps times the largest logit: where all logits are near 1e4, to 1e-3
        rows["mean_logprob"] = rows["mean_logit"] - rows["lse"] - rows["lse_error"]
    return {name: rows[name] for name in outputs}


def scaled_logits(hidden: Tensor, weight: Tensor, rows: Tensor, head: Head) -> Tensor:
    """z of some rows, (n, V), in plain torch."""
    dtype = softmax_rows.accumulator(hidden.dtype)
    z = hidden[rows].to(dtype) @ weight.to(dtype).T
    z = head.logit_scale * (z if head.bias is None else z + head.bias.to(dtype))
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z / (head.temperature if head.row_temperature is None else head.row_temperature[rows, None])


def definition(hidden: Tensor, weight: Tensor, ids: Tensor, rows: Tensor, head: Head) -> dict[str, Tensor]:
    """Every output at some rows in plain torch, through all logits at once."""
    z = scaled_logits(hidden, weight, rows, head)
    logp, chosen = z.log_softmax(-1), ids[rows, None]
    p, finite = logp.exp(), logp.masked_fill(logp == -torch.inf, 0.0)
    return {
        "logprob": logp.gather(-1, chosen).squeeze(-1),
        "entropy": -(p * finite).sum(-1),
        "mean_logprob": logp.mean(-1),
        "sum_sq_prob": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "is_top1": (z.gather(-1, chosen).squeeze(-1) == z.amax(-1)).to(z.dtype),
    }


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
) -> None:
    """Raise ValueError with the first broken contract of the arguments that both ops have."""
    require = requirer(op)
    shape = tuple(hidden.shape[:-1])
    check_head(op, hidden, weight, bias)
    require(
        ids.shape == shape and ids.dtype == torch.int64 and ids.device == hidden.device,
        f"ids must be {shape} int64 on {hidden.device}", f"{tuple(ids.shape)} {ids.dtype} on {ids.device}",
        "Pass one token per row of hidden.",
    )  # fmt: skip
    unknown = [name for name in outputs if name not in OUTPUTS]
    require(not unknown and bool(outputs), f"outputs must be among {', '.join(OUTPUTS)}", outputs, "Correct the name.")
    require(chunk is None or chunk > 0, "chunk must be a positive number of rows", chunk, "Leave it out.")


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


def check_mask(op: str, mask: Tensor | None, hidden: Tensor) -> None:
    """As `check`, of the mask of tokens."""
    tokens = tuple(hidden.shape[:-1])
    if mask is not None:
        requirer(op)(
            mask.shape == tokens and mask.dtype == torch.bool and mask.device.type in ("cpu", hidden.device.type),
            f"mask must be {tokens} bool on the host or {hidden.device}",
            f"{tuple(mask.shape)} {mask.dtype} on {mask.device}", "Use mask != 0.",
        )  # fmt: skip


def requirer(op: str):
    """A function that raises ValueError in the op's name unless a contract holds: (holds, contract, got, cure)."""

    def require(holds: bool, contract: str, got: object, cure: str) -> None:
        if not holds:
            raise ValueError(f"{op}: {contract}; got {got}. {cure}")

    return require
