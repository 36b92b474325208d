"""Dr. GRPO: GRPO done right (Liu et al., arXiv:2503.20783).

    A[b] = r[b] - mean of its group
    loss = mean over rollouts of the sum over tokens, / max_new_tokens, of the clipped surrogate

GRPO's division by a rollout's length favours long wrong answers, and by the group's deviation very easy and very hard
questions; both are gone.

Limit: with one epoch, times max_new_tokens and group_size / (group_size - 1), the gradient is RLOO's.
"""

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import centred, leave_one_out
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, mean_over, rollout_sum
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(config, *, low: float = 0.2, high: float = 0.2, beta: float = 0.0) -> Recipe:
    """Dr. GRPO on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model.
    """
    return Recipe(
        name="dr_grpo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=centred,
        loss=clipped(low=low, high=high, beta=beta, reduce=mean_over(config.max_new_tokens)),
    )


def show() -> list[Figure]:
    """The limit: the gradient over RLOO's, the same for every token."""
    length, example = 16, checks.example((3, 5, 2, 4, 1, 6), group_size=3)
    ours = checks.gradient(checks.credited(example, centred), clipped(reduce=mean_over(length)))
    rloo = checks.gradient(checks.credited(example, leave_one_out), clipped(reduce=rollout_sum))
    return [Figure("gradient apart from RLOO's / length * 2 / 3", checks.apart(ours, rloo / length * 2 / 3), 0)]
