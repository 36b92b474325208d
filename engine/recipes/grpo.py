"""GRPO: group-relative policy optimisation (Shao et al., arXiv:2402.03300).

    A[b] = (r[b] - mean of its group) / std of its group
    loss = mean over rollouts of the mean over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta k3

Limit: with beta 0, one epoch and one minibatch the ratio is 1, nothing is clipped, and the gradient is REINFORCE with
the group baseline: -A grad logprob.

Ours: beta is 0 by default, as practice since has it; groups without spread get exact zeros and cost no update.
"""

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled


def recipe(
    config,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Recipe:
    """GRPO on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        dual: bound of the loss of tokens with a negative advantage, in units of it (dual clip); default none.
        beta: weight of the KL divergence to the initial model.
        entropy_coef: weight of the entropy bonus.
    """
    return Recipe(
        name="grpo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=standardized,
        loss=clipped(low=low, high=high, dual=dual, beta=beta, entropy_coef=entropy_coef),
    )


def show() -> list[Figure]:
    """The limit: on-policy the gradient is -A / (B length); and beyond the clip there is none."""
    batch = checks.credited(checks.example(), standardized)
    expected = -batch.advantages / (batch.counts.rollouts * batch.to_tokens(batch.lengths))
    far = batch.replace(old_logprobs=batch.rollout_logprobs - batch.advantages.sign())
    return [
        Figure(
            "on-policy gradient apart from -A / (B length)",
            checks.apart(checks.gradient(batch, clipped()), expected),
            0,
        ),
        Figure("largest gradient where every ratio is clipped", float(checks.gradient(far, clipped()).abs().max()), 0),
    ]
