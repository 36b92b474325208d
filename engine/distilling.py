"""What losses of distillation read beside the outputs of linear_policy_loss: a teacher's best tokens, and short lists.

    make(HeadInput) -> (n,) with its graph        Loss(outputs=("hard",), made={"hard": likelihood_of_best})

Each goes from hidden states to a number per token, in chunks: no distribution is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fuserl.engine.contracts import require
from fuserl.engine.losses import Loss, token_mean
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_topk_divergence import linear_topk_divergence
from fuserl.kernels.second_head import Reference
from fuserl.kernels.top_tokens import top_tokens


@dataclass(frozen=True)
class HeadInput:
    """What the heads of the policy and of its teacher are given at n tokens."""

    hidden: Tensor  # (n, D), the policy's states
    weight: Tensor  # (V, D), its head
    tokens: Tensor  # (n,) int64
    terms: dict  # of its head: bias, softcap, logit_scale, lora, temperature, chunk
    live: Tensor | None  # (n,) bool on the host, or None: the tokens that have a gradient
    reference: Reference  # the teacher's states and head

    @property
    def of_teacher(self) -> tuple[Tensor, Tensor, dict]:
        """The teacher's states and head, and what its head does: what the policy's does, without its adapter."""
        return self.reference.hidden, self.reference.weight, self.terms | {"bias": self.reference.bias, "lora": None}


def likelihood_of_best(given: HeadInput) -> Tensor:
    """log p of the token that the teacher finds likeliest, (n,)."""
    hidden, weight, terms = given.of_teacher
    best = top_tokens(hidden, weight, 1, **terms)[0].squeeze(-1)
    return linear_logprob(given.hidden, given.weight, best, mask=_mask(given), **given.terms).logprob


def teacher_logprob(given: HeadInput) -> Tensor:
    """The teacher's log-prob of each token, (n,)."""
    hidden, weight, terms = given.of_teacher
    return top_tokens(hidden, weight, 1, ids=given.tokens[:, None], **terms)[1].squeeze(-1)


def listed_divergence(kind: str, k: int, *, tail: bool = True, beta: float = 0.5) -> Callable:
    """Divergence of the policy from the teacher over the policy's k likeliest tokens.

    Args:
        kind: as in `divergence`.
        k: tokens; those of a smaller vocabulary are all.
        tail: with the other tokens as one more; without it both are normalised over the k.
        beta: of jensen_shannon.
    """
    require("listed_divergence", "k", k, k >= 1, "an integer >= 1")

    def made(given: HeadInput) -> Tensor:
        if given.terms["lora"] is not None:
            raise ValueError(
                "listed_divergence: the policy's head must be one matrix; it carries an adapter. Leave lm_head out of "
                "--lora-targets."
            )
        hidden, weight, terms = given.of_teacher
        count = min(k, len(given.weight))
        ids = top_tokens(given.hidden.detach(), given.weight.detach(), count, **given.terms)[0]
        theirs = top_tokens(hidden, weight, count, ids=ids, **terms)[1]
        plain = {name: value for name, value in given.terms.items() if name != "lora"}
        return linear_topk_divergence(
            given.hidden, given.weight, ids, theirs, kind, beta=beta, tail=tail, mask=_mask(given), **plain
        )[0]

    return made


def distilled(kind: str, *, reduce: Callable = token_mean, **numbers: float) -> Loss:
    """A divergence from the teacher's whole distribution at each token, as a loss; `numbers` are its beta and alpha."""

    def loss(out, batch):
        each = getattr(out, kind)
        return each * reduce(batch), {"distilled": each}

    return Loss(loss, outputs=("logprob", kind), divergence=numbers or None)


def hard(*, reduce: Callable = token_mean) -> Loss:
    """The cross-entropy of the token that the teacher finds likeliest, -log p(argmax q), as a loss."""

    def loss(out, batch):
        return -out.likelihood_of_best * reduce(batch), {"distilled": -out.likelihood_of_best}

    made = {"likelihood_of_best": likelihood_of_best}
    return Loss(loss, outputs=("logprob", *made), made=made)


def following(*, reduce: Callable = token_mean) -> Loss:
    """The score-function form of the reverse KL, its reward of the policy as it is: -sg(log q - log p) log p."""

    def loss(out, batch):
        gap = (out.teacher_logprob - out.logprob).detach()
        return -gap * out.logprob * reduce(batch), {"distilled": -gap}

    made = {"teacher_logprob": teacher_logprob}
    return Loss(loss, outputs=("logprob", *made), made=made)


def _mask(given: HeadInput) -> Tensor | None:
    return None if given.live is None or bool(given.live.all()) else given.live.to(given.hidden.device)
