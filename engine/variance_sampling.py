"""Prompts drawn by how much rewards of their completions vary, and what is true of that variance (arXiv:2509.21268).

    VPS = a P (1 - P) + b TDS        P the share of right completions of a prompt, TDS how much they differ
    w  <- momentum w + (1 - momentum) (VPS - min) / (max - min + 1e-8)
    a step's prompts: floor(lam groups) drawn with probability w / sum w (alike before there are any scores), the others
    by a shuffled walk through all

Two cautions. P (1 - P) of pooled completions is the total variance of the reward, not the part within trajectories. And
TDS is a heuristic: where rewards are Lipschitz in the completion, their distances bound the variance between
completions from above, by `between_at_most`, and nothing bounds it from below.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Rollouts
from fuserl.engine.contracts import WEIGHT, require, require_one_of
from fuserl.engine.diversity import METRICS
from fuserl.engine.problems import far_seed
from fuserl.engine.prompts import Prompt
from fuserl.engine.rollouts import sampled, scored


class VarianceSampler:
    """Which of `size` prompts a step has: a function of the step, the seed and the scores.

    Args:
        size: prompts of the data set.
        groups: prompts of a step.
        seed: of both kinds of draws; the walk is that of a file's rows.
        lam: share of the prompts that is drawn by score.
        a, b: weights of the outcomes' variance and of the diversity.
        momentum: of the old scores; 0 keeps no memory.
        min_max: bring scores to [0, 1] over the data set.
    """

    def __init__(
        self, size: int, *, groups: int, seed: int, lam: float, a: float, b: float, momentum=0.0, min_max=True
    ):
        require("VarianceSampler", "size", size, size >= 1, "at least one prompt")
        require("VarianceSampler", "lam", lam, 0 <= lam <= 1, "in [0, 1]")
        require("VarianceSampler", "momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        for name, value in (("a", a), ("b", b)):
            require("VarianceSampler", name, value, 0 <= value < float("inf"), WEIGHT)
        self.size, self.groups, self.seed = size, groups, seed
        self.weighted, self.a, self.b = int(lam * groups), a, b
        self.momentum, self.min_max = momentum, min_max
        self.scores: Tensor | None = None  # (size,) float64
        self.spent, self.step, self._places = 0, 0, []

    def places(self, step: int) -> list[int]:
        """The prompts of a step, `groups` numbers below `size`; the same ones when asked again before the next."""
        if step != self.step:
            self.step, self._places = step, self._drawn(step)
        return self._places

    def refresh(self, correct: Tensor, diversity: Tensor) -> None:
        """New scores, from which of n completions of each prompt are right (size, n), and how they differ (size,)."""
        rate = correct.double().mean(1)
        found = self.a * rate * (1 - rate) + self.b * diversity.double()
        if self.min_max:
            found = (found - found.min()) / (found.max() - found.min() + 1e-8)
        old = found if self.scores is None else self.scores
        self.scores = self.momentum * old + (1 - self.momentum) * found
        self.spent += correct.numel()

    def state_dict(self) -> dict:
        """The scores, the completions that they took, and the prompts of the step that was drawn last."""
        kept = {} if self.scores is None else {"scores": self.scores}
        return {"spent": self.spent, "step": self.step, "places": self._places, **kept}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the scores of a `state_dict`; without them where the data set has another size now."""
        scores = state.get("scores")
        fits = scores is None or len(scores) == self.size
        self.scores = scores.clone() if fits and scores is not None else None
        self.spent, self.step, self._places = state["spent"], state["step"] if fits else 0, state["places"]

    def _drawn(self, step: int) -> list[int]:
        scored = self.scores is not None and float(self.scores.sum()) > 0
        weights = self.scores.tolist() if scored else None
        drawn = random.Random(far_seed(self.seed, step, 1)).choices(range(self.size), weights, k=self.weighted)
        walked = self._walked(step)
        pairs = min(len(drawn), len(walked))
        mixed = [place for pair in zip(drawn, walked, strict=False) for place in pair]
        return [*mixed, *drawn[pairs:], *walked[pairs:]]

    def _walked(self, step: int) -> list[int]:
        count, found = self.groups - self.weighted, []
        for draw in range((step - 1) * count, step * count):
            epoch, at = divmod(draw, self.size)
            found.append(_order(self.size, far_seed(self.seed, epoch))[at])
        return found


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int) -> list[int]:
    """As `problems.Rows` shuffles an epoch."""
    return random.Random(seed).sample(range(size), size)


def probed(policy, prompts: list[Prompt], reward: Callable, n: int, diversity: Callable) -> tuple[Tensor, Tensor]:
    """Which of n completions of each prompt are right, (size, n) bool, and how they differ, (size,) float64.

    Args:
        policy: has `generate`.
        prompts: size of them, completed 128 at a time, so that those of a large data set are never all there.
        reward: (Rollouts) -> (rewards, facts); right is at least 1.
        diversity: (n sequences of token ids) -> a number.
    """
    correct, scores = [], []
    for start in range(0, len(prompts), 128):
        probes = policy.generate(prompts[start : start + 128], group_size=n)
        with policy.meter.phase("reward"):
            correct.append(reward(probes)[0].view(-1, n) >= 1)
            tokens = [sample.tolist() for sample in probes.tokens.split(probes.offsets.diff().tolist())]
            scores += [diversity(tokens[at : at + n]) for at in range(0, len(tokens), n)]
    return torch.cat(correct), torch.tensor(scores, dtype=torch.float64)


def refreshed(
    sampler: VarianceSampler,
    prompts: list[Prompt],
    reward: Callable,
    *,
    group_size: int,
    n: int,
    t_upd: int,
    diversity: str,
) -> Callable:
    """A rollout slot: `group_size` completions of a step's prompts, which makes a sampler's scores first when due.

    The completions that scores took so far are the statistic "refresh_rollouts". Where no prompt is drawn by score,
    none are made.

    Args:
        sampler: has drawn the step's prompts.
        prompts: all that it draws from.
        reward: (Rollouts) -> (rewards, facts).
        n: completions of each prompt that its score is made of.
        t_upd: scores are made at the first step and every so many steps.
        diversity: how they differ, of `diversity.METRICS`.
    """
    for name, value in (("n", n), ("t_upd", t_upd)):
        require("refreshed", name, value, value >= 1, "an integer >= 1")
    require_one_of("refreshed", "diversity", diversity, METRICS)

    def counted(rollouts: Rollouts) -> tuple[Tensor, dict]:
        rewards, facts = reward(rollouts)
        return rewards, {**facts, "refresh_rollouts": sampler.spent}

    plain = sampled(group_size)
    draw = scored(plain, counted)

    def rollout(policy, asked: list[Prompt]) -> Rollouts:
        if (sampler.step - 1) % t_upd == 0:
            sampler.refresh(*probed(policy, prompts, reward, n, METRICS[diversity]))
        return draw(policy, asked)

    return rollout if sampler.weighted else plain


def variance_parts(weights: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of a reward of 0 or 1 within trajectories and between them; their sum is P (1 - P), P the mean rate.

        Var[R] = E_Z[p_Z (1 - p_Z)] + Var_Z[p_Z]

    Args:
        weights: (Z,) probabilities of the trajectories.
        rates: (Z,) chance of reward 1 behind each.
    """
    mean = (weights * rates).sum()
    return (weights * rates * (1 - rates)).sum(), (weights * (rates - mean).square()).sum()


def between_at_most(lipschitz: float, distances: Tensor) -> Tensor:
    """lipschitz^2 / 2 mean d^2: no less than the variance between trajectories whose rates are Lipschitz in d.

    Args:
        lipschitz: |p_i - p_j| is at most this times d[i, j].
        distances: (Z, Z) between trajectories of equal weight, 0 on the diagonal.
    """
    return lipschitz**2 / 2 * distances.square().mean()


def optimal_variance(probabilities: Tensor, rewards: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """E[(R - b)^2 |g|^2] of REINFORCE at its best baseline b, and Gamma, which is that over Var[R].

    Args:
        probabilities, rewards: (K,) of the completions.
        scores: (K, D) gradient of each one's log-probability.

    Returns:
        The second moment Var[R] Gamma, and Gamma; it is NaN where all rewards are equal.
    """
    length = scores.square().sum(-1) * probabilities
    baseline = (length * rewards).sum() / length.sum()
    moment = (length * (rewards - baseline).square()).sum()
    variance = (probabilities * (rewards - (probabilities * rewards).sum()).square()).sum()
    return moment, moment / variance


def claimed_gain(variance: float, *, eta: float, c_min: float, gamma: float, smoothness: float) -> float:
    """What the paper says that one step of size eta gains at least: eta c_min / 4 Var[R]; a claim, not a bound.

    Its c_min, |grad J|^2 >= c_min Var[R], holds for no policy near certainty: of two actions it is 2 Var[R]^2.

    Raises:
        ValueError: eta is above c_min / (4 smoothness gamma), for which nothing is claimed.
    """
    most = c_min / (4 * smoothness * gamma)
    require("claimed_gain", "eta", eta, 0 < eta <= most, f"in (0, {most}]")
    return eta * c_min / 4 * variance
