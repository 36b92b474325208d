"""MedGRPO (59): rewards of several tasks brought to one scale by a baseline's medians (Su et al., arXiv:2512.06581).

    rnorm(x) = 1 / (1 + exp(-k (x - p50) / max(p75 - p25, floor)))      quartiles of the model as it starts, for each
                                                                        data set and task, as the problems name them
    grounding: rnorm(metric, 0 where the format is not kept);   captions: rnorm(similarity) / 2 + rnorm(judge) / 2
    loss = mean over rollouts of the mean over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Limit: a positive affine change of a task's metric changes no reward; and without normalisation and with adv_norm
group_std it is GRPO with this clip.

Ours: the floor; quartiles of one sampled completion of `baseline` training problems before the first step; a judge is
asked how close a caption is to the reference, by five aspects (without --judge it is the words that they share);
temporal IoU as it is, unless `threshold` is given; a problem of no task of the paper's (its metadata "task") has the
run's own reward for a metric. Held-out problems are judged by the raw metric.

Check: division by the group's standard deviation cancels every affine difference between tasks, so what normalisation
does to the balance of tasks shows with adv_norm group_mean.
"""

from fuserl.engine import embedders, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require_one_of
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, scored
from fuserl.engine.task_rewards import ADV_NORMS, Baseline, Normalised, Quantiles, TaskScorer, judge_of, with_shares

DEFAULTS = {"task": "symbolic_videos", "max_new_tokens": 24, "group_size": 8}


def recipe(
    config,
    *,
    normalise: bool = True,
    k: float = 3.0,
    floor: float = 1e-3,
    baseline: int = 128,
    recompute: int = 0,
    threshold: float | None = None,
    adv_norm: str = "group_std",
    low: float = 0.2,
    high: float = 0.3,
) -> Recipe:
    """MedGRPO on the configured task.

    Args:
        normalise: bring each task's rewards to one scale.
        k: steepness of the logistic.
        floor: of the interquartile range.
        baseline: training problems that the starting model answers for the quartiles.
        recompute: steps after which the quartiles are made anew, by the policy of then; 0 keeps the first ones.
        threshold: temporal IoU that a TAG answer must reach for a metric of 1, else 0; default the IoU itself.
        adv_norm: group_std, group_mean (no division) or task_batch_std (over all groups of a task).
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    require_one_of("med_grpo", "adv_norm", adv_norm, ADV_NORMS)
    start, quantiles = Baseline(config, size=baseline, recompute=recompute), Quantiles(k=k, floor=floor)
    raw = TaskScorer(rewards.scorer(config), judge_of(config), embedders.configured(config), threshold=threshold)
    draw, reward = sampled(config.group_size), Normalised(raw, quantiles) if normalise else raw
    return Recipe(
        name="med_grpo",
        prompts=start.prompts,
        rollout=scored(start.fitting(draw, reward) if normalise else draw, reward),
        reward=raw,
        advantage=with_shares(ADV_NORMS[adv_norm], raw.pairs),
        loss=clipped(low=low, high=high),
        state={"quantiles": quantiles, "pairs": raw},
    )


def show() -> list[Figure]:
    """The logistic, what it does not depend on, what each advantage sees of a scale, and two tasks of unlike scales."""
    from fuserl.engine.toys import med_grpo

    return med_grpo.figures(ADV_NORMS, clipped(high=0.3))
