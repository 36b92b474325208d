"""MaxRL: maximum likelihood reinforcement learning (Tajwar, Zeng et al., arXiv:2602.02710).

    A[b] = (r[b] - mean of its group) / mean of its group, 0 where that mean is 0

For rewards of 0 and 1 the expected gradient is that of log p(success), cut off after group_size - 1 terms of its
expansion -sum (1 - p)^k / k in the failure probability: hard questions weigh more than under GRPO.

Limit: times the group's mean reward the advantage is Dr. GRPO's; a group of one has REINFORCE's, r.
"""

import torch

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import centred, over_mean
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(config, *, low: float = 0.2, high: float = 0.28) -> Recipe:
    """MaxRL on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    return Recipe(
        name="max_rl",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=over_mean,
        loss=clipped(low=low, high=high, reduce=token_mean),
    )


def show() -> list[Figure]:
    """The limits: times the mean reward Dr. GRPO's advantage; the control variate of the mean over successes."""
    batch = checks.example((1,) * 8, group_size=4).replace(rewards=torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]))
    ours, mean = over_mean(batch), batch.group_mean(batch.rewards)
    successes = batch.rewards / batch.group_sum(batch.rewards) - 1 / 4
    alone = checks.example((1, 1), group_size=1)
    return [
        Figure("A times the mean apart from Dr. GRPO's", checks.apart(ours * mean, centred(batch)), 0),
        Figure("A / 4 apart from 1 / successes - 1 / 4", checks.apart(ours / 4, successes), 0),
        Figure("A of a group of one apart from r", checks.apart(over_mean(alone), alone.rewards), 0),
    ]
