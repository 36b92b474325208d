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

from fuserl.engine import blends, prompts, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.constrained import Strategy, each_of, numbers_of, several
from fuserl.engine.judge_mixtures import Constrained, warmed_up, with_baselines
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import scored

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
    blend = blends.of(prompts.configured(config))
    tasks, shares = list(blend.by_name), [share / sum(blend.shares) for share in blend.shares]
    sizes = numbers_of("k", str(config.group_size) if k is None else k, tasks, int)
    strategies = map(
        Strategy,
        each_of("optimizer", optimizer, tasks),
        numbers_of("kl_max", kl_max, tasks),
        shares if weights == "data" else numbers_of("weights", weights, tasks),
    )
    advantage, loss = several(list(strategies), beta=beta, lam=lam)
    asked = warmed_up(prompts.sampler(config), dpo_steps)
    named = [each.split("+") for each in each_of("judges", judges, tasks)]
    models = [config.reward_model] * len(tasks)
    if reward_models is not None:
        models = each_of("reward_models", reward_models, tasks)
    draw = with_baselines(dict(zip(tasks, sizes, strict=True)))
    return Recipe(
        name="cgpo",
        prompts=asked,
        rollout=scored(draw, Constrained(config, tasks, named, models)),
        reward=rewards.scorer(config, required=False),
        advantage=advantage,
        loss=loss,
        reads=("old_logprobs", "ref_logprobs"),
    )


def show() -> list[Figure]:
    """The arms after training, what gets no gradient, CODPO beside DPO, and the baseline's own reward."""
    from fuserl.engine.toys import cgpo

    return cgpo.figures()
