"""5. CGPO: constrained RLHF with a mixture of judges (Xu et al., arXiv:2409.20370).

    c = 1 where all judges of the task pass a completion;   R_cal = sigmoid(r - r(baseline stored with the prompt))
    k = sum of old_logprobs - ref_logprobs of a completion
    crpg    -mean of (R - mean R) times the sum of logprobs,   R = c R_cal max(1 - k / kl_max, 0)
    codpo   DPO of (best r with c = 1, worst r with c = 0) and lam times -mean logprob of the first
    crraft  -mean of R times the sum of logprobs of each prompt's best,   R = c R_cal [k <= kl_max]
    direction = sum over tasks of weight times the gradient of the task's own loss

Limit: codpo with lam = 0 and two completions of which one passes is DPO.

Ours: `--task 'A + B'` or `'2 A + B'` has several tasks, with settings for each in the order of their names, or one for
all. Without --reward-model r is the run's own reward, which judges held-out problems too. Where the worst that codpo
may reject is the best, only its second term is left. The baseline is the metadata's, else the chosen completion, else
the answer. `dpo_steps` is 0: many data have no pairs.

Check: a bandit of four arms, good 1, ok 0.5, hack 3, bad 0, of which only hack is forbidden, by exact gradients. What
is expected of good is its share after 20,000 steps, as a slow test has it; 3,000 steps come within 0.0025 of that.
"""

import itertools
import math

from fuserl.engine import blends, prompts, rewards
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.constrained import OPTIMIZERS, Strategy, each_of, numbers_of, several
from fuserl.engine.contracts import WEIGHT, require, require_one_of
from fuserl.engine.judge_mixtures import JUDGES, Constrained, warmed_up, with_baselines
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import scored
from fuserl.engine.toys import cgpo as toy

DEFAULTS = {"group_size": 4}


def recipe(
    config,
    *,
    optimizer: str = "crpg",
    judges: str = "answer",
    reward_models: str | None = None,
    k: str | None = None,
    kl_max: str = "5",
    weights: str = "1",
    beta: float = 0.1,
    lam: float = 1.0,
    dpo_steps: int = 0,
) -> Recipe:
    """CGPO on the configured task, or tasks; settings of each are separated by commas.

    Args:
        optimizer: crpg, codpo or crraft.
        judges: joined by +, among answer, number, tests, format, pattern, refusal, factuality and safety.
        reward_models: as --reward-model, nothing between commas for the run's own reward; default --reward-model.
        k: completions of each prompt; default group_size.
        kl_max: bound of a completion's summed log-ratio to the initial model.
        weights: of the tasks' gradients, or data for their share of the prompts.
        beta: how strongly DPO holds the policy to the initial model.
        lam: weight of the chosen completion's likelihood in codpo.
        dpo_steps: first steps on chosen and rejected completions of all tasks, by DPO.
    """
    task = prompts.configured(config)
    blend = task.source if isinstance(task.source, blends.Blend) else blends.Blend([task], [1])
    tasks, shares = list(blend.by_name), blend.shares
    for name, value in (("lam", lam), ("dpo_steps", dpo_steps)):
        require("cgpo", name, value, 0 <= value < math.inf, WEIGHT)
    named = [each.split("+") for each in each_of("judges", judges, tasks)]
    optimizers = each_of("optimizer", optimizer, tasks)
    for name, words, known in (
        ("judges", [word for each in named for word in each], JUDGES),
        ("optimizer", optimizers, tuple(OPTIMIZERS)),
    ):
        for word in words:
            require_one_of("cgpo", name, word, known)
    scorers = [config.reward_model] * len(tasks)
    if reward_models is not None:
        scorers = [each or None for each in each_of("reward_models", reward_models, tasks)]
    sizes = [config.group_size] * len(tasks) if k is None else numbers_of("k", k, tasks, int)
    each = [n / sum(shares) for n in shares] if weights == "data" else numbers_of("weights", weights, tasks, float)
    strategies = list(map(Strategy, optimizers, numbers_of("kl_max", kl_max, tasks, float), each))
    advantage, loss = several(strategies, beta=beta, lam=lam)
    constraints = Constrained(config, tasks, named, scorers)
    return Recipe(
        name="cgpo",
        prompts=warmed_up(prompts.sampler(config), dpo_steps),
        rollout=scored(with_baselines(dict(zip(tasks, sizes, strict=True))), constraints),
        reward=rewards.scorer(config, required=False),
        advantage=advantage,
        loss=loss,
        reads=("old_logprobs", "ref_logprobs"),
    )


def show(steps: int = 3000) -> list[Figure]:
    """The arms after training, what gets no gradient, CODPO beside DPO, and the baseline's own reward."""
    ends = toy.trained(steps)
    good, hack = ends[:4, 0].tolist(), ends[:, 2].tolist()
    expected = (0.238, 0.306, 0.535, 0.983)
    return [
        Figure("forbidden arm, plain policy gradient", hack[4], 0.9998, 1e-4),
        Figure("forbidden arm, with 0.1 KL", hack[5], 0.9997, 1e-4),
        *(at_most(f"forbidden arm, CRPG at kl_max {m:g}", p, 0.01) for m, p in zip(toy.BOUNDS, hack, strict=False)),
        *(
            Figure(f"good arm at kl_max {m:g}", p, e, 2.5e-3)
            for m, p, e in zip(toy.BOUNDS, good, expected, strict=True)
        ),
        at_least("the smallest step up of these", min(b - a for a, b in itertools.pairwise(good)), 0.0),
        Figure("largest gradient where nothing passes", toy.nothing_passes(), 0, 0),
        Figure("reward at k = kl_max", toy.beyond(), 0, 0),
        Figure("CODPO's loss apart from DPO's", toy.apart_from_dpo(), 0, 1e-12),
        Figure("calibrated reward of a baseline", toy.of_baseline(), 0.5, 0),
    ]
