"""RepExp (39): representation-based exploration (Tuyls et al., arXiv:2510.11686).

    h[i] = mean of the initial model's last hidden states over response i, projected to k dimensions, less the group's
    b[i] = h[i]^T (lamb I + sum of the group's h h^T)^-1 h[i]
    R    = a reward + bonus b, b 0 in groups without a correct response; A is R standardised in its group
    loss = mean over all tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Selection, with `pool`: of as many responses to each held-out problem novel ones go to the verifier first (`calls`).

Limit: with bonus 0 the advantages are GRPO's, exactly.

Ours: normalisation is over the batch; a lasting covariance keeps one projection, and its running mean corrects what it
has seen before. Selection takes lamb and k of training, as the paper's release does. With n <= k and lamb far below the
features' spread every bonus is near (n - 1) / n and tells nothing: a warning says so.

Check: sums of 6.997 are of features of unit variance in each dimension (of unit length they come to 6.91).
"""

from fuserl.engine import prompts, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.elliptical import Covariances
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.novelty import Bonus, explored, selection
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(
    config,
    *,
    a: float = 1.0,
    bonus: float = 0.01,
    lamb: float = 0.01,
    k: int = 32,
    loo: bool = False,
    normalisation: str = "none",
    redraw: bool = True,
    lasting: bool = False,
    off_if_none_correct: bool = True,
    off_if_some_correct: bool = False,
    off_if_all_correct: bool = False,
    off_if_wrong: bool = False,
    pool: int = 0,
    select: int = 4,
    low: float = 0.2,
    high: float = 0.2,
) -> Recipe:
    """Representation-based exploration on the configured task.

    Args:
        a: weight of the task's reward.
        bonus: weight of the novelty bonus (the paper's beta).
        lamb: ridge of the covariance of the features.
        k: dimensions that hidden states are projected to.
        loo: leave each response out of the covariance that it is judged by.
        normalisation: of the bonuses over the batch: none, std or z_score.
        redraw: draw a new projection every step.
        lasting: keep a covariance of each prompt over the steps, under one projection.
        off_if_none_correct: no bonus in groups without a correct response.
        off_if_some_correct: no bonus in groups with a correct response.
        off_if_all_correct: no bonus in groups of correct responses only.
        off_if_wrong: no bonus for wrong responses.
        pool: responses of each held-out problem to select from at evaluations; 0 is no selection.
        select: responses of the selected sets, at most `pool`.
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    kept = Covariances(k, lamb) if lasting else None
    novelty = Bonus(lamb=lamb, k=k, seed=config.seed, loo=loo, normalisation=normalisation, redraw=redraw, lasting=kept)
    gates = {"none_correct": off_if_none_correct, "some_correct": off_if_some_correct}
    gates |= {"all_correct": off_if_all_correct, "wrong": off_if_wrong}
    scorer = rewards.scorer(config)
    selected = selection(scorer, pool=pool, size=select, lamb=lamb, k=k, seed=config.seed) if pool else None
    return Recipe(
        name="rep_exp",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=scorer,
        advantage=explored(novelty, gates, a=a, weight=bonus),
        loss=clipped(low=low, high=high, reduce=token_mean),
        reads=("features",),
        evaluate=selected,
        state={"covariances": kept} if lasting else {},
    )


def show() -> list[Figure]:
    """Identities of the leverages, what they do not depend on, clusters seen by elliptical picks, and the caution."""
    from fuserl.engine.toys import rep_exp

    return rep_exp.figures()
