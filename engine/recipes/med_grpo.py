"""59. MedGRPO: rewards of several tasks brought to one scale by a baseline's medians (Su et al., arXiv:2512.06581).

    rnorm(x) = 1 / (1 + exp(-k (x - p50) / max(p75 - p25, floor)))      quartiles of the model as it starts, for each
                                                                        data set and task, as the problems name them
    grounding: rnorm(metric, 0 where the format is not kept);   captions: rnorm(similarity) / 2 + rnorm(judge) / 2
    loss = mean over rollouts of the mean over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Limit: a positive affine change of a task's metric changes no reward; and without normalisation and with adv_norm
group_std it is GRPO with this clip.

Ours: the floor; quartiles of one sampled completion of `baseline` training problems before the first step; a judge is
asked how close a caption is to the reference, by five aspects (without --judge it is the words that they share);
temporal IoU as it is, unless `threshold` is given; a problem without metadata "task" has the run's own reward for a
metric. Held-out problems are judged by the raw metric.

Check: division by the group's standard deviation cancels every affine difference between tasks, so what normalisation
does to the balance of tasks shows with adv_norm group_mean.
"""

from fuserl.engine import checks, embedders, prompts, rewards
from fuserl.engine.advantages import centred, standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, scored
from fuserl.engine.task_rewards import ADV_NORMS, Normalised, Quantiles, TaskScorer, judge_of, with_shares
from fuserl.engine.toys import med_grpo as toy

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
    require_one_of("med_grpo", "adv_norm", adv_norm, tuple(ADV_NORMS))
    require("med_grpo", "baseline", baseline, baseline >= 1, "an integer >= 1")
    require("med_grpo", "recompute", recompute, recompute >= 0, "an integer >= 0")
    raw = TaskScorer(rewards.scorer(config), judge_of(config), embedders.configured(config), threshold=threshold)
    quantiles = Quantiles(k=k, floor=floor)
    reward, draw, steps = Normalised(raw, quantiles), sampled(config.group_size), prompts.sampler(config)
    asked = {}

    def step(number: int) -> list:
        asked["step"] = number
        return steps(number)

    def drawn(policy, given):
        due = recompute and asked["step"] > 1 and asked["step"] % recompute == 1
        if normalise and (due or not quantiles.known):
            reward.fit(policy.generate(prompts.pool(config, baseline)[:baseline]))
        return draw(policy, given)

    return Recipe(
        name="med_grpo",
        prompts=step,
        rollout=scored(drawn, reward if normalise else raw),
        reward=raw,
        advantage=with_shares(ADV_NORMS[adv_norm], raw.pairs),
        loss=clipped(low=low, high=high),
        state={"quantiles": quantiles, "pairs": raw},
    )


def show(seeds: int = 5) -> list[Figure]:
    """The logistic, what it does not depend on, what each advantage sees of a scale, and two tasks of unlike scales."""
    plain, scaled = toy.logistic(), toy.logistic(slope=7.0, shift=-3.0)
    runs = [toy.balance(seed, ADV_NORMS["group_mean"], clipped(low=0.2, high=0.3)) for seed in range(seeds)]
    ratios = {name: sum(run[name]["ratio"] for run in runs) / seeds for name in ("raw", "normalised")}
    better = sum(run["normalised"]["least"] > run["raw"]["least"] for run in runs)
    std, mean = (toy.rescaled(advantage) for advantage in (standardized, centred))
    return [
        Figure("rnorm at the median", plain[1], 0.5, 1e-12),
        Figure("rnorm half an interquartile range above", plain[2], 0.817574476193644, 1e-12),
        Figure("rnorm half an interquartile range below", plain[0], 0.182425523806356, 1e-12),
        Figure("rnorm of 7 x - 3, apart", max(abs(a - b) for a, b in zip(plain, scaled, strict=True)), 0, 1e-12),
        checks.at_most("change of group_std advantages under rewards x 100", std[0], 1e-5),
        Figure("group_mean advantages under rewards x 100, over before", mean[1], 100, 1e-9),
        checks.at_least("raw: gradient of the task of median 0.5 over that of 0.12", ratios["raw"], 3),
        checks.at_least("normalised: the same", ratios["normalised"], 0.67),
        checks.at_most("normalised: the same, from above", ratios["normalised"], 1.5),
        checks.at_least("seeds of five whose least improved task improves more", better * 5 / seeds, 4),
    ]
