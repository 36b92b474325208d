"""RLOO: REINFORCE leave-one-out (Ahmadian et al., arXiv:2402.14740).

    R[b] = r[b] - beta sum over tokens of (old_logprobs - ref_logprobs)
    A[b] = R[b] - mean of R over the other members of its group
    loss = mean over rollouts of the sum over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Limit: with one epoch nothing is clipped and the gradient is that of -A log p(rollout), unbiased.

Ours: the ratio is per token and clipped, which matters only when rollouts are used more than once.
"""

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import leave_one_out, penalised
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, rollout_sum
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(config, *, low: float = 0.2, high: float = 0.2, beta: float = 0.0) -> Recipe:
    """RLOO on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model, in the reward.
    """
    shaped = penalised(beta)
    return Recipe(
        name="rloo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=lambda batch: leave_one_out(shaped(batch)),
        loss=clipped(low=low, high=high, reduce=rollout_sum),
        reads=("old_logprobs", "ref_logprobs") if beta else (),
    )


def show() -> list[Figure]:
    """The limit: on-policy the gradient is -A / B, and A sums to 0 over a group."""
    batch = checks.credited(checks.example((3, 5, 2, 4, 1, 6), group_size=3), leave_one_out)
    ours = checks.gradient(batch, clipped(reduce=rollout_sum))
    return [
        Figure("gradient apart from -A / B", checks.apart(ours, -batch.advantages / batch.counts.rollouts), 0),
        Figure("largest sum of A over a group", float(batch.group_sum(leave_one_out(batch)).abs().max()), 0),
        Figure("A of the one success of three", float(leave_one_out(batch)[0]), 1),
    ]
