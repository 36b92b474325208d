"""What losses of distillation read beside the outputs of linear_policy_loss: a teacher's best tokens, and short lists.

    make(HeadInput) -> (n,) with its graph        Loss(outputs=("hard",), made={"hard": likelihood_of_best})

Each goes from hidden states to a number per token, in chunks: no distribution is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import Loss, clipped, token_mean, truncated, with_advantage
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_topk_divergence import linear_topk_divergence
from fuserl.kernels.second_head import Reference
from fuserl.kernels.top_tokens import top_tokens

FORMS = ("opd", "reverse_kl", "forward_kl", "hard_ce", "ppo", "reinforce")  # of `on_policy`


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


def gap(batch: Batch) -> Tensor:
    """teacher_logprob - old_logprob of each token, raw, (N,): its expectation is -KL(policy || teacher)."""
    return batch.extra["teacher_logprob"] - batch.old_logprobs


def on_policy(form: str, *, low: float = 0.2, high: float = 0.2, most: int | None = None) -> Loss:
    """Distillation of a teacher on the policy's own tokens, averaged over all of them (VLA-OPD, arXiv:2603.26666).

    Args:
        form: opd (-A logprob) and ppo (the clipped ratio's), whose advantages are `gap`; reinforce, the first one with
            the gap of the policy as it is; reverse_kl, forward_kl or hard_ce, of the whole vocabulary.
        low, high: with ppo the ratio is clipped to [1 - low, 1 + high].
        most: tokens; each rollout weighs its length over that. None weighs all alike.
    """
    require_one_of("on_policy", "form", form, FORMS)

    def reduce(batch: Batch) -> Tensor:
        return token_mean(batch) if most is None else token_mean(batch) * batch.to_tokens(batch.lengths) / most

    if form == "opd":
        return truncated(low=0.0, high=0.0, reduce=reduce)  # no ratio, and so no bound
    if form == "ppo":
        return clipped(low=low, high=high, reduce=reduce)
    if form == "reinforce":
        return following(reduce=reduce)
    return hard(reduce=reduce) if form == "hard_ce" else distilled(form, reduce=reduce)


def taught(batch: Batch) -> Tensor:
    """1 for the tokens of rollouts whose fact `taught` is 1, over the share that they are of all, (N,).

    As advantages they make a mean over all tokens one over those.
    """
    chosen = batch.to_tokens(batch.facts["taught"].to(batch.dtype))
    return chosen * (len(chosen) / chosen.sum().clamp(min=1))


def self_distilled(
    alpha: float, *, k: int = 0, tail: bool = True, sampled: bool = False, is_clip: float | None = None
) -> Loss:
    """Distillation of a teacher on the policy's own rollouts (SDPO, arXiv:2601.20802), times the advantages.

    Args:
        alpha: 0 is KL(teacher || policy), 1 KL(policy || teacher), between them
            (1 - alpha) KL(p || m) + alpha KL(q || m) with m = (1 - alpha) p + alpha q.
        k: over the policy's k likeliest tokens; 0 is the whole vocabulary.
        tail: with the other tokens as one more; else both are normalised over the k.
        sampled: from log-probs of the tokens alone: the score-function form, for alpha 1.
        is_clip: most of the ratio to the old log-probs, by which each token counts; None is no ratio.
    """
    require("self_distilled", "alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    require("self_distilled", "k", k, k >= 0, "an integer >= 0")
    require("self_distilled", "sampled", sampled, not sampled or alpha == 1, "left out unless alpha is 1")
    require("self_distilled", "is_clip", is_clip, is_clip is None or is_clip > 0, "a number > 0, or None")
    kind = {0: "forward_kl", 1: "reverse_kl"}.get(alpha, "jensen_shannon")
    made, numbers = {}, {"beta": alpha} if kind == "jensen_shannon" else None
    if sampled:
        made = {"teacher_logprob": teacher_logprob}
    elif k:
        made = {"listed": listed_divergence(kind, k, tail=tail, **(numbers or {}))}
    name = next(iter(made), kind)

    def loss(out, batch: Batch):
        gap = out.logprob.detach() - out.teacher_logprob if sampled else None
        each = gap * out.logprob if sampled else getattr(out, name)
        weight = batch.advantages * token_mean(batch)
        if is_clip is not None and batch.old_logprobs is not None:
            weight = weight * (out.logprob.detach() - batch.old_logprobs).clamp(-20, 20).exp().clamp(max=is_clip)
        return each * weight, {"distilled": gap if sampled else each}

    divergence = None if made else numbers
    return Loss(loss, outputs=("logprob", name), live=with_advantage, divergence=divergence, made=made)


def _mask(given: HeadInput) -> Tensor | None:
    return None if given.live is None or bool(given.live.all()) else given.live.to(given.hidden.device)
