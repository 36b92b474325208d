"""GRPO: group-relative policy optimisation (Shao et al., arXiv:2402.03300).

    A[b] = (r[b] - mean of its group) / std of its group
    loss = mean over rollouts of the mean over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta k3

Limit: with beta 0, one epoch and one minibatch the ratio is 1, nothing is clipped, and the gradient is REINFORCE with
the group baseline: -A grad logprob.

Ours: beta is 0 by default, as practice since has it; groups without spread get exact zeros and cost no update.
"""

from functools import partial

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(config) -> Recipe:
    """GRPO on the configured task."""
    return Recipe(
        name="grpo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=partial(rewards.score, rewards.configured(config)),
        advantage=standardized,
        loss=clipped(low=config.low, high=config.high, beta=config.beta, entropy_coef=config.entropy_coef),
    )
