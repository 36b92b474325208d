"""Rewards with a bonus for novel responses, and the selection of novel ones from a pool (arXiv:2510.11686)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine import elliptical, evaluation
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch, batch_of
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.elliptical import Covariances
from fuserl.engine.problems import far_seed

NORMALISATIONS = ("none", "std", "z_score")
ALIKE = 1e-3  # bonuses of a group that are all this near tell no response from another


@dataclass
class Bonus:
    """The elliptical bonus of each rollout of a batch among those of its prompt, from `facts["features"]` (B, D).

    Args:
        lamb: ridge of the covariance.
        k: dimensions that features are projected to.
        seed: of the projections.
        loo: leave a response out of the covariance that it is judged by.
        normalisation: over the batch: none, std (divided by the standard deviation) or z_score.
        redraw: a new projection at every step.
        lasting: covariances of prompts that last over the steps, under one projection; None begins anew each step.
    """

    lamb: float = 0.01
    k: int = 32
    seed: int = 0
    loo: bool = False
    normalisation: str = "none"
    redraw: bool = True
    lasting: Covariances | None = None
    warned: bool = False

    def __post_init__(self):
        require_one_of("Bonus", "normalisation", self.normalisation, NORMALISATIONS)

    def __call__(self, batch: Batch) -> Tensor:
        """(B,) float64; warns, once, where the bonuses of no group differ by more than `ALIKE`."""
        features = batch.facts["features"].double()
        again = self.redraw and self.lasting is None
        seed = far_seed(self.seed, batch.step) if again else self.seed
        h = features @ elliptical.sparse_projection(features.shape[1], self.k, seed=seed)
        bonus, spread = torch.zeros_like(h[:, 0]), 0.0
        for group in batch.group.unique().tolist():
            mine = (batch.group == group).nonzero().squeeze(-1)
            found = self._of_group(h[mine], batch.prompt_tokens[group])
            spread = max(spread, float(found.max() - found.min()))
            bonus[mine] = elliptical.left_out(found) if self.loo else found
        if spread < ALIKE and not self.warned:
            self.warned = True
            says = f"bonuses should tell responses apart; within a prompt they differ by at most {spread:.2g}"
            print(f"fuserl: {says}. Raise lamb, lower k, or draw more responses.", file=sys.stderr, flush=True)
        return self._normalised(bonus)

    def _of_group(self, h: Tensor, prompt: Tensor) -> Tensor:
        if self.lasting is None:
            return elliptical.leverages(h, self.lamb)
        name = hashlib.sha256(repr(prompt.tolist()).encode()).hexdigest()[:16]
        return self.lasting.of(name).joined(h)

    def _normalised(self, bonus: Tensor) -> Tensor:
        if self.normalisation == "none":
            return bonus
        centred = bonus - bonus.mean() if self.normalisation == "z_score" else bonus
        return centred / (bonus.std(correction=0) + 1e-8)


def gated(
    bonus: Tensor, batch: Batch, *, none_correct: bool, some_correct: bool, all_correct: bool, wrong: bool
) -> Tensor:
    """Bonuses (B,) set to 0 as asked; a rollout is correct where its reward is at least 1.

    Args:
        none_correct, some_correct, all_correct: in groups of which no, at least one, every response is correct.
        wrong: of responses that are not correct.
    """
    correct = (batch.rewards >= 1).double()
    share = batch.group_mean(correct)
    off = torch.zeros_like(correct, dtype=torch.bool)
    for asked, where in (
        (none_correct, share == 0),
        (some_correct, share > 0),
        (all_correct, share == 1),
        (wrong, correct == 0),
    ):
        off |= where & asked
    return torch.where(off, 0.0, bonus)


def explored(bonus: Bonus, gates: dict[str, bool], *, a: float, weight: float) -> Callable:
    """An advantage slot: GRPO's of a reward + weight bonus, gated; the bonuses (B,) stay in the batch's facts."""

    def advantage(batch: Batch) -> Batch:
        found = gated(bonus(batch), batch, **gates)
        shaped = batch.replace(rewards=a * batch.rewards + weight * found.to(batch.dtype))
        return batch.replace(facts=batch.facts | {"bonus": found}).with_advantages(standardized(shaped))

    return advantage


def selection(reward: Callable, *, pool: int, size: int, lamb: float, k: int, seed: int) -> Callable:
    """An evaluate slot: of `pool` responses to each held-out problem, novel ones go to the verifier first.

    Args:
        reward: (Rollouts) -> (rewards, facts); the verifier.
        pool: responses of each problem.
        size: of the selected sets.
        lamb, k, seed: as of `Bonus`.

    Returns:
        (policy, prompts) -> {"calls": verifier calls until the first correct response, all of them where there is
        none, averaged over problems; "calls_random": that of a random order, on average; "calls_ratio"; and
        "selected@size": share of problems with a correct response among the first `size` picks; "random@size"}.
    """
    require("selection", "select", size, 1 <= size <= pool, f"an integer in [1, {pool}]")

    def evaluate(policy, prompts) -> dict[str, float]:
        rollouts = policy.generate(list(prompts), group_size=pool, stream=evaluation.EVALUATION)
        correct = reward(rollouts)[0] >= 1
        features = policy.score(batch_of(rollouts, correct.float()), ["features"]).facts["features"].double()
        h = features @ elliptical.sparse_projection(features.shape[1], k, seed=seed)
        calls, found = [], []
        for group in range(len(prompts)):
            mine = (rollouts.group == group).nonzero().squeeze(-1)
            order = torch.tensor(elliptical.coreset(h[mine], pool, lamb))
            hits = correct[mine][order].nonzero().squeeze(-1)
            calls.append(int(hits[0]) + 1 if len(hits) else pool)
            found.append(len(hits) > 0 and int(hits[0]) < size)
        right = correct.view(-1, pool).sum(1)
        # The first of c correct ones in a random order of n stands at (n + 1) / (c + 1).
        blind = torch.where(right > 0, (pool + 1) / (right + 1), pool).double().mean()
        mean = sum(calls) / len(calls)
        return {
            "calls": mean,
            "calls_random": float(blind),
            "calls_ratio": mean / float(blind),
            f"selected@{size}": sum(found) / len(found),
            f"random@{size}": float(evaluation.pass_at_k(right, pool, size).mean()),
        }

    return evaluate
