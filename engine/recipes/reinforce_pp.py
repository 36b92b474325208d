"""REINFORCE++ (Hu et al., arXiv:2501.03262): no critic, and no group needed.

    G[t] = r - beta sum over tokens s >= t of (old_logprobs - ref_logprobs)[s]
    A = (G - mean over the batch's tokens) / std over the batch's tokens
    loss = mean over all tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Limit: for one group of rollouts of one length and beta 0, A is GRPO's times sqrt(group_size / (group_size - 1)).

Ours: beta 0 by default, as for the other baselines; the paper's small value is 0.01.
"""

import math

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import normalised, standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(config, *, low: float = 0.2, high: float = 0.2, beta: float = 0.0, group_baseline: bool = False) -> Recipe:
    """REINFORCE++ on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        beta: weight of the KL divergence to the initial model, in the reward.
        group_baseline: take the group's mean reward off first (REINFORCE++-baseline).
    """
    return Recipe(
        name="reinforce_pp",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=normalised(beta=beta, over_group=group_baseline),
        loss=clipped(low=low, high=high, reduce=token_mean),
        reads=("old_logprobs", "ref_logprobs") if beta else (),
    )


def show() -> list[Figure]:
    """The limit: for one group of one length, GRPO's advantage up to the deviation's correction."""
    batch = checks.example((3,) * 4, group_size=4)
    ours, grpo = normalised(beta=0.0)(batch), batch.to_tokens(standardized(batch))
    # GRPO adds 1e-6 to its deviation of 0.5.
    return [Figure("A apart from GRPO's times sqrt(4 / 3)", checks.apart(ours, grpo * math.sqrt(4 / 3)), 0, 4e-6)]
