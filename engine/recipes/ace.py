"""26 ACE: asymmetric confidence-aware error penalty (Xu et al., arXiv:2602.21420).

    c[b] = sum over its tokens of old_logprobs - ref_logprobs      how much more confident of it the policy has grown
    A'[b] = A[b] (1 + alpha softplus(c[b])) where the reward is 0, else A[b];   then the loss of GRPO or DAPO

On-policy this is a regulariser of overconfident errors less a residual that moderates it, with w = 1 where wrong:

    E[w softplus(c) grad log pi] = grad E[w softplus(c)] - E[w sigmoid(c) grad log pi]

Limit: with alpha 0 it is GRPO, or DAPO with `base` "dapo". At c = 0 a wrong rollout weighs 1 + alpha log 2, not 1.

Ours: alpha 1, which the abstract does not give; c once per batch of rollouts, from the old log-probs. As a sum c grows
to hundreds of nats in long rollouts: `per_token` and `cap` bound it, off by default. `base` "dapo" has DAPO's loss and
resampling, without its overlong penalty.

Check: a bandit of 64 arms (8 correct) that starts 4 nats overconfident of a wrong one, 100 steps of 16 x 8, 5 seeds.
ACE leaves less on that arm than GRPO in each. That it keeps more diversity among correct arms does not show here: their
entropy was lower with ACE.
"""

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import overconfident, standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import mixed, sampled


def recipe(
    config,
    *,
    alpha: float = 1.0,
    penalty: str = "softplus",
    per_token: bool = False,
    cap: float | None = None,
    base: str = "grpo",
    attempts: int = 3,
) -> Recipe:
    """ACE on the configured task.

    Args:
        alpha: weight of the penalty on wrong rollouts; 0 is the base.
        penalty: softplus of c, or relu: only what the policy has grown more confident of weighs more.
        per_token: c is the mean over a rollout's tokens in the place of their sum.
        cap: c counts at most this much; default no bound.
        base: whose loss takes the advantages: grpo or dapo.
        attempts: for dapo, batches of prompts that a step may look at for groups whose rewards differ.
    """
    require_one_of("ace", "base", base, ("grpo", "dapo"))
    require("ace", "attempts", attempts, attempts >= 1, "an integer >= 1")
    dapo, scorer = base == "dapo", rewards.scorer(config)
    return Recipe(
        name="ace",
        prompts=prompts.sampler(config.replace(groups=config.groups * attempts) if dapo else config),
        rollout=mixed(config.group_size, config.groups, scorer) if dapo else sampled(config.group_size),
        reward=scorer,
        advantage=overconfident(standardized, alpha=alpha, penalty=penalty, mean=per_token, cap=cap),
        loss=clipped(high=0.28, reduce=token_mean) if dapo else clipped(),
        reads=("old_logprobs", "ref_logprobs"),
    )


def show() -> list[Figure]:
    """The gradient's decomposition, the factor at its ends, pass@k without bias, and the bandit beside GRPO."""
    from fuserl.engine.toys import ace

    return ace.figures(overconfident, clipped())
