"""57. MMR1-VAS: variance-aware sampling of prompts (Leng et al., arXiv:2509.21268).

    VPS(x) = a P (1 - P) + b TDS       P and TDS of n completions of x, made anew for all x every t_upd steps
    floor(lam groups) prompts of a step with probability VPS / sum VPS, the others by a shuffled walk; then GRPO

Limit: with lam 0 the prompts are those of the plain sampler, and a run is GRPO's, bit for bit.

Two cautions: P (1 - P) is the reward's total variance, not the part within trajectories; and the paper's lower bound of
the variance between them does not follow (a Lipschitz condition gives an upper one): TDS is a heuristic.

Ours: scores take a policy, so those of the first step are equal; a completion is right where its reward is at
least 1; TDS is 1 - self-BLEU of token ids (the release's training notes feed self-BLEU itself, which is
diversity="similarity"); a generator stands for a data set of `pool` problems. The completions that scores take are
counted in `refresh_rollouts`.
"""

import dataclasses

from fuserl.engine import checks, diversity, lookup, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.toys import vas as toy
from fuserl.engine.variance_sampling import VarianceSampler, probed


def recipe(
    config,
    *,
    lam: float = 0.5,
    a: float = 0.8,
    b: float = 0.2,
    n: int = 32,
    t_upd: int = 35,
    diversity: str = "self_bleu",
    momentum: float = 0.0,
    min_max: bool = True,
    pool: int = 128,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.01,
) -> Recipe:
    """Variance-aware sampling on the configured task.

    Args:
        lam: share of a step's prompts that is drawn by score.
        a: weight of the variance of the outcomes in a score.
        b: weight of the diversity of the completions in a score.
        n: completions of each prompt that its score is made of.
        t_upd: steps between scores.
        diversity: self_bleu (1 - self-BLEU-123), distinct (distinct-3), edit_distance or similarity (self-BLEU).
        momentum: share of its old score that a prompt keeps.
        min_max: bring scores to [0, 1] over the data set.
        pool: problems that stand for a generator's; a file has its own.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model.
    """
    differing = _metric(diversity)
    for name, value in (("n", n), ("t_upd", t_upd), ("pool", pool)):
        require("vas", name, value, value >= 1, "an integer >= 1")
    every, scorer = prompts.pool(config, pool), rewards.scorer(config)
    terms = {"lam": lam, "a": a, "b": b, "momentum": momentum, "min_max": min_max}
    sampler = VarianceSampler(len(every), groups=config.groups, seed=config.seed, **terms)

    def rollout(policy, asked):
        if sampler.weighted and (sampler.step - 1) % t_upd == 0:
            sampler.refresh(*probed(policy, every, scorer, n, differing))
        rollouts = policy.generate(asked, group_size=config.group_size)
        if not sampler.weighted:
            return rollouts
        with policy.meter.phase("reward"):
            found, facts = scorer(rollouts)
        return dataclasses.replace(rollouts, scores=(found, {**facts, "refresh_rollouts": sampler.spent}))

    return Recipe(
        name="vas",
        prompts=lambda step: [every[place] for place in sampler.places(step)],
        rollout=rollout,
        reward=scorer,
        advantage=standardized,
        loss=clipped(low=low, high=high, beta=beta),
        state={"sampler": sampler},
    )


def _metric(name: str):
    """The diversity of that name."""
    if name not in diversity.METRICS:
        known = ", ".join(diversity.METRICS)
        raise ValueError(
            f"vas: diversity must be one of {known}; got {name!r}. {lookup.nearest(name, diversity.METRICS)}"
        )
    return diversity.METRICS[name]


def show() -> list[Figure]:
    """What is true of the variance, how often a prompt is drawn, and ten banks of bandits of which few teach."""
    total, near, flat = toy.two_levels()
    runs = [[toy.trained(seed, lam, standardized, clipped()) for lam in (0.5, 0.0)] for seed in range(10)]
    share = sum(ours[0] for ours, _ in runs) / sum(plain[0] for _, plain in runs)
    better = sum(ours[1] > plain[1] for ours, plain in runs)
    return [
        Figure("P (1 - P) apart from within + between", total, 0, 1e-12),
        Figure("|grad J|^2 of two actions, p = 0.3", toy.two_actions(0.3, clipped()), 2 * (0.3 * 0.7) ** 2, 1e-12),
        checks.at_most("variance between, over its bound", near, 1),
        checks.at_most("variance between where a lower bound in d would be above 0", flat, 1e-30),
        checks.at_most("largest error of 1e5 draws, in standard errors", toy.frequencies(), 3),
        checks.at_most("groups without advantage, over those of uniform draws", share, 0.6),
        checks.at_least("banks of ten with a better frontier", better, 8),
        Figure("completions for scores, over those learnt from", runs[0][0][2] / toy.LEARNT, 3 * 800 / 3840),
    ]
