"""A policy's own verdict on an answer: how likely it finds one special token right after the answer's end.

    score = beta_v (log pi(z | prompt, answer) - c_ref)        right where above 1/2

c_ref stands for log pi_ref(z | prompt, answer), which is nearly one number for a token that no text has.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch, Rollouts, batch_of
from fuserl.engine.contracts import WEIGHT, one_token, require
from fuserl.engine.evaluation import EVALUATION
from fuserl.engine.losses import Loss
from fuserl.engine.mixtures import appended
from fuserl.engine.verifiers import answer_in

_SPREAD = 0.1  # standard deviation of a group's scores from which on they say something


def token(tokenizer, text: str | None = None, number: int | None = None) -> int:
    """The id of the token z.

    Args:
        tokenizer: a transformers tokenizer.
        text, number: the token itself, or its id. By default the last special token that does not begin, end, pad or
            stand for unknown text; where there is none the one that ends a text, which nothing follows.

    Raises:
        ValueError: `text` is no one token, or the tokenizer has neither kind.
    """
    if number is not None:
        return number
    if text is not None:
        return one_token("verdict", tokenizer, text)
    used = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
    spare = sorted({*getattr(tokenizer, "all_special_ids", ())} - used)
    found = spare[-1] if spare else tokenizer.eos_token_id
    if found is None:
        raise ValueError("verdict: the tokenizer must have a special token; it has none. Name one with --verdict.")
    return found


def known(text: str | None = None, number: int | None = None) -> Callable:
    """Facts that `with_verdicts` needs: (policy, Rollouts) -> {"finished": (B,) 0 or 1, "verdict": (B, 1) z's id}.

    Args:
        text, number: as of `token`.
    """

    def facts(policy, rollouts: Rollouts) -> dict[str, Tensor]:
        finished = torch.tensor([float(each == "stop") for each in rollouts.finish])
        z = token(policy.tokenizer, text, number)
        return {"finished": finished, "verdict": torch.full((len(rollouts), 1), z)}

    return facts


def with_verdicts(batch: Batch, *, temperature: float, among: bool = True) -> Batch:
    """The batch with the token z behind each finished rollout as objective 1, which is read at temperature 1.

    The extra "balance" of z is the weight that gives right and wrong ones the same say: (n1 + n0) / (2 n1) where the
    reward is above 1/2, (n1 + n0) / (2 n0) elsewhere, of the whole batch's finished rollouts.

    Args:
        temperature: of sampling, at which the other tokens are read.
        among: False puts none there.
    """
    finished = (batch.facts["finished"] > 0) & among
    right = batch.rewards > 0.5
    sizes = [(finished & side).sum() for side in (right, ~right)]
    shares = torch.where(right, *(sum(sizes) / (2 * size.clamp(min=1)) for size in sizes))
    batch = appended(batch, batch.facts["verdict"][:, 0], finished)
    of_verdict = batch.objective == 1
    return batch.replace(
        extra=batch.extra
        | {
            "temperature": torch.where(of_verdict, 1.0, temperature),
            "balance": torch.where(of_verdict, shares[batch.rollout], 0.0).to(batch.dtype),
        }
    )


def scores(logprob: Tensor, batch: Batch, *, beta_v: float, c_ref: float | None) -> Tensor:
    """beta_v (logprob - c_ref), the reference's own log-prob in c_ref's place where that is None, (n,)."""
    return beta_v * (logprob - (batch.ref_logprobs if c_ref is None else c_ref))


def squared_verdict(*, alpha: float, beta_v: float, c_ref: float | None) -> Loss:
    """alpha times the mean over finished rollouts of balance (score - reward)^2, of the tokens z alone.

    Statistics: the error, and where the reward says right (or wrong) whether the score does.
    """
    require("squared_verdict", "alpha", alpha, 0 <= alpha < math.inf, WEIGHT)
    require("squared_verdict", "beta_v", beta_v, 0 < beta_v < math.inf, "a finite number > 0")

    def loss(out, batch: Batch):
        score, reward = scores(out.logprob, batch, beta_v=beta_v, c_ref=c_ref), batch.to_tokens(batch.rewards)
        error, said = (score - reward).square(), (score > 0.5).to(score.dtype)
        right, weight = reward > 0.5, alpha * batch.extra["balance"] / batch.counts.tokens
        return weight * error, {
            "verdict_error": error,
            "verdict_right": torch.where(right, said, torch.nan),
            "verdict_wrong": torch.where(right, torch.nan, 1 - said),
        }

    def live(batch: Batch) -> Tensor:
        return alpha * batch.extra["balance"] > 0

    return Loss(loss, live=live, reads=("ref_logprobs",) if c_ref is None else ())


def mixed_advantage(*, tau: float, w1: int, w2: int, beta_v: float, c_ref: float | None) -> Callable:
    """(1 - tau) A + tau A_s after step w1 + w2, A before: A of the rewards, A_s of the scores, (B,).

    Scores are those of the policy as the update starts, held to [0, 1], 0 where nothing was finished. In a group whose
    scores have a standard deviation of at most 0.1, A_s is A.
    """
    require("mixed_advantage", "tau", tau, 0 <= tau <= 1, "in [0, 1]")
    for name, steps in (("w1", w1), ("w2", w2)):
        require("mixed_advantage", name, steps, steps >= 0, "an integer >= 0")

    def advantage(batch: Batch) -> Tensor:
        ordinary = standardized(batch)
        if batch.step <= w1 + w2 or not tau:
            return ordinary
        said = scores(batch.old_logprobs, batch, beta_v=beta_v, c_ref=c_ref).clamp(0.0, 1.0)
        score = batch.rollout_sum(torch.where(batch.objective == 1, said, 0.0)).to(batch.dtype)
        others = (batch.group_sum(torch.ones_like(score)) - 1).clamp(min=1)
        spread = (batch.group_sum((score - batch.group_mean(score)).square()) / others).sqrt()
        own = torch.where(spread > _SPREAD, standardized(batch.replace(rewards=score)), ordinary)
        return (1 - tau) * ordinary + tau * own

    return advantage


def votes(samples: int, reward: Callable, known: Callable, *, beta_v: float, c_ref: float | None) -> Callable:
    """An evaluation slot: which answer most of `samples` completions give, by number and by the sum of their scores.

    Args:
        samples: of each held-out problem, drawn as in training.
        reward: (Rollouts) -> ((B,), facts); an answer is right where that of its first completion is 1.0 or more.
        known: (policy, Rollouts) -> the facts that `with_verdicts` needs.

    Returns:
        (policy, prompts) -> {"vote_accuracy", "weighted_vote_accuracy"}; a completion without an end has no weight in
        the second.
    """

    def evaluate(policy, prompts) -> dict[str, float]:
        rollouts = policy.generate(list(prompts), group_size=samples, stream=EVALUATION)
        right = reward(rollouts)[0] >= 1.0
        batch = batch_of(rollouts, right.float())
        batch = batch.replace(facts=known(policy, rollouts))
        batch = with_verdicts(batch, temperature=policy.sampling.temperature or 1.0)
        batch = policy.score(batch, ["old_logprobs", *(["ref_logprobs"] if c_ref is None else [])])
        said = scores(batch.old_logprobs, batch, beta_v=beta_v, c_ref=c_ref)
        score = batch.rollout_sum(torch.where(batch.objective == 1, said, 0.0))
        winners = [elected(rollouts, weight) for weight in (torch.ones_like(score), score)]
        names = ("vote_accuracy", "weighted_vote_accuracy")
        return {name: float(right[won].float().mean()) for name, won in zip(names, winners, strict=True)}

    return evaluate


def elected(rollouts: Rollouts, weight: Tensor) -> Tensor:
    """The first completion (G,) of the answer with the largest sum of weights (B,) in each group; of several the first.

    Answers are compared as they are read out of the text.
    """
    totals: list[dict[str, list]] = [{} for _ in rollouts.prompts]
    for b, (group, text) in enumerate(zip(rollouts.group.tolist(), rollouts.texts, strict=True)):
        answer = answer_in(text, rollouts.prompts[group].answer)
        totals[group].setdefault(answer, [0.0, b])[0] += float(weight[b])
    return torch.tensor([max(each.values(), key=lambda known: known[0])[1] for each in totals])
