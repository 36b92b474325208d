"""GSPO: group sequence policy optimisation (Zheng et al., arXiv:2507.18071).

    ratio[b] = (p(rollout) / p_old(rollout))^(1 / length)
    loss = mean over rollouts of -min(ratio A, clip(ratio, 1 - low, 1 + high) A),  A as GRPO's

Limit: for rollouts of one token it is GRPO with the same low and high.

Ours: 4 minibatches, as in the paper: with one the ratio is 1 and the gradient GRPO's with rollout means.
"""

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, clipped_rollouts
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled

DEFAULTS = {"minibatches": 4}


def recipe(config, *, low: float = 3e-4, high: float = 4e-4) -> Recipe:
    """GSPO on the configured task.

    Args:
        low, high: a rollout's ratio is clipped to [1 - low, 1 + high].
    """
    return Recipe(
        name="gspo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=standardized,
        loss=clipped_rollouts(low=low, high=high),
    )


def show() -> list[Figure]:
    """The limit: for rollouts of one token, off-policy and clipped, the gradient is GRPO's."""
    batch = checks.credited(checks.example((1,) * 8, off=0.3), standardized)
    ours, grpo = (checks.gradient(batch, loss(low=0.2, high=0.2)) for loss in (clipped_rollouts, clipped))
    longer = checks.credited(checks.example(off=0.01), standardized)
    spread = checks.gradient(longer, clipped_rollouts(low=0.2, high=0.2))
    within = longer.rollout_sum(spread)[longer.rollout] / longer.to_tokens(longer.lengths)
    return [
        Figure("gradient apart from GRPO's for single tokens", checks.apart(ours, grpo), 0),
        Figure("tokens of a rollout apart from one another", checks.apart(spread, within), 0),
    ]
