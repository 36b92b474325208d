"""What learning one problem does to another, and training where greedy decoding fails (SELF, arXiv:2510.02230).

I(i -> j) = <gradient of log p(correct answer of j), step on i>        negative off the diagonal: i unlearns j
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuserl.engine import rollouts as slots
from fuserl.engine.batch import Batch, Rollouts, batch_of
from fuserl.engine.contracts import require
from fuserl.engine.evaluation import EVALUATION
from fuserl.engine.losses import Loss
from fuserl.engine.prompts import Prompt

EDGES = (0.0, 0.1, 0.5, 1.0)


def unsolved(rewards: Tensor) -> Tensor:
    """Which problems a greedy answer does not solve, (G,) bool: those that are trained on."""
    return rewards < 1.0


def unsolved_by_greedy(group_size: int, reward: Callable) -> Callable:
    """A rollout slot: each prompt is answered greedily first, and those answered right are dropped.

    Facts are `dropped`, the share of prompts, and `solved`: 1 where all were and the step is to be skipped; the
    rollouts are the greedy ones then.
    """

    def rollout(policy, prompts: list[Prompt]) -> Rollouts:
        greedy = policy.generate(prompts, group_size=1, greedy=True)
        with policy.meter.phase("reward"):
            rewards, _ = reward(greedy)
        kept = unsolved(rewards)
        left = [prompt for prompt, keep in zip(prompts, kept.tolist(), strict=True) if keep]
        found = policy.generate(left, group_size=group_size) if left else greedy
        share = torch.full((len(found),), 1 - float(kept.float().mean()))
        facts = {"dropped": share, "solved": torch.full((len(found),), float(not left))}
        return dataclasses.replace(found, facts=found.facts | facts)

    return rollout


def skipping(loss: Loss) -> Loss:
    """The loss, 0 for rollouts whose fact `solved` is 1."""

    def function(out, batch: Batch):
        each, statistics = loss(out, batch)
        return torch.where(_left(batch), each, 0.0), statistics

    def live(batch: Batch) -> Tensor:
        alive, left = loss.live(batch), _left(batch)
        return left if alive is None else alive & left

    again = loss.weighed and (lambda given: skipping(loss.weighed(given)))
    return dataclasses.replace(loss, function=function, live=live, weighed=again)


def _left(batch: Batch) -> Tensor:
    return batch.to_tokens(batch.facts["solved"] == 0)


def matrix(towards: Tensor, steps: Tensor) -> Tensor:
    """I (I, J) of gradients of log p of J correct answers (J, P) and the steps that I problems take (I, P)."""
    return steps @ towards.T


def negative_mass(found: Tensor) -> float:
    """The sum of what is below 0 off the diagonal of I (G, G)."""
    return float(found.masked_fill(torch.eye(len(found), dtype=torch.bool), 0.0).clamp(max=0).sum())


def measured(policy, batches: Sequence[Batch], loss: Loss, solutions: Batch) -> Tensor:
    """I by trial, (I, J): what one update on each batch does to the mean log-prob of each stored solution.

    The policy, its optimizer and what follows it are afterwards as before.

    Args:
        batches: with advantages, one per problem.
        solutions: a rollout per problem, its tokens a correct answer.
    """
    learnt = policy.parameters()
    kept = {name: x.detach().clone() for name, x in learnt.items()}
    count, moments = policy.optimizer.count, {n: x.clone() for n, x in policy.optimizer.state_dict().items()}
    followed = {name: copy.deepcopy(second.state_dict()) for name, second in policy.seconds.items()}
    before, rows = _logprobs(policy, solutions), []
    for batch in batches:
        policy.update(batch, loss)
        rows.append(_logprobs(policy, solutions) - before)
        with torch.no_grad():
            for name, value in kept.items():
                learnt[name].copy_(value)
        policy.optimizer.load_state_dict(moments)
        policy.optimizer.count = count
        for name, state in followed.items():
            policy.seconds[name].load_state_dict(state)
    return torch.stack(rows)


def winners(base: Tensor, change: Tensor, edges: Sequence[float] = EDGES) -> dict[str, float]:
    """The mean change of log p(correct) (G,) of the problems in each bin of their success before training (G,)."""
    found = {}
    for low, high in itertools.pairwise(edges):
        inside = (base >= low) & ((base < high) | (high == edges[-1]))
        if inside.any():
            found[f"change_from_{low:g}_to_{high:g}"] = float(change[inside].mean())
    return found


def crossing(base: Sequence[float], trained: Sequence[float]) -> int | None:
    """The first k from 1 at which a base's pass@k is no smaller than the trained one's; None where it never is."""
    return next((k for k, pair in enumerate(zip(base, trained, strict=True), 1) if pair[0] >= pair[1]), None)


class Trial:
    """An evaluation slot: what an update on each of some held-out problems does to the answers of all, by trial.

    Each is answered as in training, and the policy is afterwards as before. An update is the run's own, with its
    momentum; where a problem's answers are rewarded alike it is none, and the row 0, but for what else the loss has.

    Args:
        count: the first of the problems that have an answer.
        group_size: completions of each.
        reward, advantage, loss: as of a recipe; the loss of any rollouts.
    """

    def __init__(self, count: int, group_size: int, reward: Callable, advantage: Callable, loss: Loss):
        require("Trial", "count", count, count >= 2, "an integer >= 2")
        self.count, self.group_size = count, group_size
        self.reward, self.advantage, self.loss = reward, advantage, loss

    def __call__(self, policy, prompts: list[Prompt]) -> dict:
        """{"interference": a row for each problem, "negative_interference": the mass off its diagonal}."""
        known = [prompt for prompt in prompts if prompt.answer is not None][: self.count]
        if len(known) < 2:
            return {}
        drawn = policy.generate(known, group_size=self.group_size, stream=EVALUATION)
        batch = batch_of(drawn, self.reward(drawn)[0])
        batch = batch.with_advantages(self.advantage(batch))
        parts = [batch.rollouts_at((batch.group == at).nonzero().squeeze(-1)).counted() for at in range(len(known))]
        given = slots.demonstrations(policy, known)
        found = measured(policy, parts, self.loss, batch_of(given, given.scores[0]))
        return {"interference": found.tolist(), "negative_interference": negative_mass(found)}


class Winners:
    """An evaluation slot: winner-take-all, by how likely the answers were at the first evaluation of the run."""

    def __init__(self):
        self.base: Tensor | None = None

    def __call__(self, policy, prompts: list[Prompt]) -> dict[str, float]:
        """What `winners` finds of the held-out problems that have an answer."""
        known = [prompt for prompt in prompts if prompt.answer is not None]
        if not known:
            return {}
        given = slots.demonstrations(policy, known)
        batch = policy.score(batch_of(given, given.scores[0]), ["old_logprobs"])
        logprobs = batch.rollout_sum(batch.old_logprobs)
        if self.base is None or len(self.base) != len(logprobs):
            self.base = logprobs
        return winners(self.base.exp(), logprobs - self.base)

    def state_dict(self) -> dict[str, Tensor]:
        """The log-probs at the first evaluation."""
        return {} if self.base is None else {"base": self.base}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from those of a `state_dict`."""
        self.base = state.get("base")


def _logprobs(policy, solutions: Batch) -> Tensor:
    batch = policy.score(solutions.replace(old_logprobs=None), ["old_logprobs"])
    return batch.rollout_mean(batch.old_logprobs)
