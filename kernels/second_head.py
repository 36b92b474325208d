"""The second head of linear_policy_loss: divergences of the policy's whole distribution from a reference's.

    z_q = head(reference.hidden @ reference.weight.T + reference.bias)        out.<kind> of softmax(z) and softmax(z_q)

The reference is data: its chunk of logits costs one product, beside the policy's in a buffer of its own, over which the
divergences' gradient to the policy's logits is written before that of the other outputs is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.kernels import head_outputs
from fuserl.kernels.divergence import divergence
from fuserl.kernels.divergence_rows import IMPLS, STATISTICS
from fuserl.kernels.divergence_terms import KINDS, Rule, rule
from fuserl.kernels.head_outputs import Head
from fuserl.kernels.head_products import HeadProducts, through_tanh
from fuserl.kernels.softmax_rows import accumulator

_NAME = "linear_policy_loss"


class Reference(NamedTuple):
    """A reference or teacher as linear_policy_loss takes it; never differentiated.

    Its soft cap, scale and temperature are those of the policy: `linear_divergence` takes others.

    Args:
        hidden: (N, D_q), its states at the policy's tokens, of any floating dtype, but float64 with float64 only.
        weight: (V, D_q), its head, of that dtype.
        bias: (V,), the head's.
        beta, alpha: of the outputs jensen_shannon and alpha, as in `divergence`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    beta: float = 0.5
    alpha: float = 0.5


@dataclass
class SecondHead:
    """A reference, what is asked of it, and its chunk of logits.

    Args:
        head: what follows the reference's product.
        rules: kinds of divergence by name.
        temperatures: (2, N), of the policy and of the reference.
    """

    reference: Reference
    head: Head
    rules: dict[str, Rule]
    temperatures: Tensor
    backend: str
    products: HeadProducts = field(init=False)

    def start(self, rows: Tensor | None, chunk: int, batch_invariant: bool) -> None:
        """Take the live rows, and memory for a chunk of them."""
        terms = {"bias": self.head.bias, "inner": self.head.inner, "dtype": self.temperatures.dtype}
        terms |= {"batch_invariant": batch_invariant}
        self.products = HeadProducts(*self.reference[:2], rows, chunk=chunk, **terms)

    def statistics(self, x: Tensor, rows: Tensor, piece: slice) -> Tensor:
        """(8 K, n) rows of divergence_rows for each of K kinds, of the policy's x and the reference's of a piece."""
        logits = x[None], self.products.logits(piece)[None], self.temperatures[:, rows]
        return torch.cat([IMPLS[self.backend][0](*logits, rule) for rule in self.rules.values()])

    def named(self, statistics: Tensor) -> dict[str, Tensor]:
        """The divergences out of `statistics`."""
        return dict(zip(self.rules, statistics[::STATISTICS], strict=True))

    def coefficients(self, like: Tensor, derivatives: dict[str, Tensor | None]) -> Tensor:
        """(K, n) derivatives of the loss to each divergence, 0 where there is none."""
        found = [derivatives.get(kind) for kind in self.rules]
        return torch.stack([torch.zeros_like(like) if g is None else g for g in found])

    def gradient(self, x: Tensor, rows: Tensor, statistics: Tensor, g: Tensor) -> Tensor | None:
        """Gradient to the policy's u of a chunk, (n, V), over the reference's logits; None where it is 0."""
        other, total = self.products.buffer[: len(rows)], None
        # Elsewhere the answer would have to be waited for.
        wanted = [i for i in range(len(g)) if g.device.type != "cpu" or g[i].any()]
        for i in wanted:
            out = other if i == wanted[-1] else torch.empty_like(other)
            kept = statistics[STATISTICS * i : STATISTICS * (i + 1)].contiguous()
            given = self.temperatures[:, rows], kept, torch.stack([g[i], torch.zeros_like(g[i])]) * self.products.factor
            IMPLS[self.backend][1](x[None], other[None], *given, list(self.rules.values())[i], out[None], None)
            total = out if total is None else out.add_(total)
        if wanted and self.head.inner is not None:
            through_tanh(total, x, total)
        return total

    def definition(self, hidden: Tensor, weight: Tensor, head: Head, rows: Tensor) -> dict[str, Tensor]:
        """The divergences at some rows in plain torch, through all logits of both at once."""
        z_p = head_outputs.scaled_logits(hidden, weight, rows, head)
        z_q = head_outputs.scaled_logits(*self.reference[:2], rows, self.head)
        given = {"beta": self.reference.beta, "alpha": self.reference.alpha, "backend": "reference"}
        return {kind: divergence(z_p, z_q, kind, **given)[0] for kind in self.rules}


def split(outputs: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The outputs of the policy's head alone, and the divergences."""
    return tuple(x for x in outputs if x not in KINDS), tuple(x for x in outputs if x in KINDS)


def second_head(
    policy: tuple[Tensor, Tensor, Head], reference: Sequence | None, outputs: Sequence[str], backend: str
) -> SecondHead | None:
    """What linear_policy_loss was told of a reference, checked against the policy's; None if nothing."""
    require, (_, kinds), (hidden, weight, head) = head_outputs.requirer(_NAME), split(outputs), policy
    require(
        (reference is None) == (not kinds), "reference must be given where outputs name a divergence, and only there",
        f"outputs {tuple(outputs)}", f"Ask for some of {', '.join(KINDS)}, of a reference.",
    )  # fmt: skip
    if reference is None:
        return None
    reference = Reference(*reference)
    tensors = [None if x is None else x.detach() for x in reference[:3]]
    states, other = map(head_outputs.as_autocast, tensors[:2])
    head_outputs.check_head(_NAME, states, other, tensors[2], " of the reference")
    require(
        states.shape[:-1] == hidden.shape[:-1] and states.device == hidden.device and len(other) == len(weight),
        f"hidden and weight of the reference must have {len(hidden)} and {len(weight)} rows on {hidden.device}",
        f"{tuple(states.shape)} and {tuple(other.shape)} on {states.device}",
        "Take both models' states at the same tokens, and the vocabulary that they share.",
    )  # fmt: skip
    double = hidden.dtype == torch.float64
    require(
        (states.dtype == torch.float64) == double, "policy and reference must both be float64 or neither",
        f"{hidden.dtype} and {states.dtype}", "Convert one model with .to().",
    )  # fmt: skip
    require(
        head.allowed is None, "allowed must be left out with a reference, as a divergence is of the whole vocabulary",
        "both", "Take the divergence in a call of its own.",
    )  # fmt: skip
    rules = {kind: rule(_NAME, kind, reference.beta, reference.alpha) for kind in kinds}
    temperature = head.each_temperature(len(hidden), accumulator(hidden.dtype), hidden.device)
    operands, both = Reference(states, other, *reference[2:]), torch.stack([temperature, temperature])
    return SecondHead(operands, replace(head, bias=tensors[2], lora=None, extra_ids=None), rules, both, backend)
