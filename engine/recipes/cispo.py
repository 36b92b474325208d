"""CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585).

    loss = mean over all tokens of -stop_gradient(clip(ratio, 1 - low, 1 + high)) A logprob,  A as GRPO's

A token beyond the bounds keeps a bounded gradient instead of losing it.

Limit: with one epoch and one minibatch the weight is 1 and the gradient is DAPO's.

Ours: high = 4, the bound of 5 on the weight that later studies found good (arXiv:2510.13786); no lower bound.
"""

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, token_mean, truncated
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled

DEFAULTS = {"minibatches": 2}


def recipe(config, *, low: float = 1.0, high: float = 4.0) -> Recipe:
    """CISPO on the configured task.

    Args:
        low, high: the weight is held in [1 - low, 1 + high].
    """
    return Recipe(
        name="cispo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=standardized,
        loss=truncated(low=low, high=high),
    )


def show() -> list[Figure]:
    """The limits: on-policy DAPO's gradient; beyond the bound the weight is the bound, not 0."""
    batch = checks.credited(checks.example(), standardized)
    ours, dapo = truncated(low=1.0, high=4.0), clipped(high=0.28, reduce=token_mean)
    far = batch.replace(old_logprobs=batch.rollout_logprobs - 3)
    on_policy = checks.gradient(batch, ours)
    return [
        Figure("on-policy gradient apart from DAPO's", checks.apart(on_policy, checks.gradient(batch, dapo)), 0),
        Figure(
            "gradient at ratio e^3 apart from 5 times that", checks.apart(checks.gradient(far, ours), 5 * on_policy), 0
        ),
    ]
