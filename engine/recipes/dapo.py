"""DAPO: decoupled clip and dynamic sampling policy optimisation (Yu et al., arXiv:2503.14476).

    loss = mean over all tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A),  A as GRPO's
    prompts whose rewards all agree are replaced by others, up to `attempts` times as many as the step needs
    reward + min(0, (max_new_tokens - overlong_buffer - length) / overlong_buffer) overlong_penalty   while training

Limit: where all rollouts have one length, with low = high and neither resampling nor overlong penalty it is GRPO.

Ours: a step for which the attempts bring too few mixed groups is smaller; held-out problems are judged without the
overlong penalty.
"""

import math

from fuserl.engine import checks, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import WEIGHT, require
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import mixed


def recipe(
    config,
    *,
    low: float = 0.2,
    high: float = 0.28,
    attempts: int = 3,
    overlong_buffer: int = 0,
    overlong_penalty: float = 1.0,
) -> Recipe:
    """DAPO on the configured task.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].
        attempts: batches of prompts that a step may look at for groups whose rewards differ; 1 resamples none.
        overlong_buffer: tokens before max_new_tokens over which the overlong penalty grows; 0 is no penalty.
        overlong_penalty: taken off the reward of a completion of max_new_tokens.
    """
    most = config.max_new_tokens
    require("dapo", "attempts", attempts, attempts >= 1, "an integer >= 1")
    require("dapo", "overlong_buffer", overlong_buffer, 0 <= overlong_buffer <= most, f"an integer in [0, {most}]")
    require("dapo", "overlong_penalty", overlong_penalty, 0 <= overlong_penalty < math.inf, WEIGHT)
    scorer = rewards.scorer(config)

    def shaped(rollouts):
        scores, facts = scorer(rollouts)
        if overlong_buffer:
            over = rollouts.offsets.diff() - (most - overlong_buffer)
            scores = scores - overlong_penalty * (over / overlong_buffer).clamp(0, 1)
        return scores, facts

    return Recipe(
        name="dapo",
        prompts=prompts.sampler(config.replace(groups=config.groups * attempts)),
        rollout=mixed(config.group_size, config.groups, shaped),
        reward=scorer,
        advantage=standardized,
        loss=clipped(low=low, high=high, reduce=token_mean),
    )


def show() -> list[Figure]:
    """The limits: with rollouts of one length GRPO's gradient; a ratio of 1.25 is within the wider clip only."""
    batch = checks.credited(checks.example((4, 4, 4, 4)), standardized)
    ours, grpo = clipped(high=0.28, reduce=token_mean), clipped()
    further = batch.replace(old_logprobs=batch.rollout_logprobs - math.log(1.25))
    kept = [checks.gradient(further, loss)[batch.advantages > 0].abs().min() for loss in (ours, grpo)]
    return [
        Figure(
            "gradient apart from GRPO's", checks.apart(checks.gradient(batch, ours), checks.gradient(batch, grpo)), 0
        ),
        Figure("gradients kept at ratio 1.25, A > 0 (1 is yes)", float(kept[0] > 0), 1),
        Figure("the same under GRPO's clip", float(kept[1] > 0), 0),
    ]
