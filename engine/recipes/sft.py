"""SFT: supervised fine-tuning on the task's own answers.

    loss = mean over tokens of -log p(token)

Limit: the loss of one batch is the cross-entropy of its answers' tokens.
"""

from functools import partial

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import uniform
from fuserl.engine.losses import negative_logprob
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import demonstrations


def recipe(config) -> Recipe:
    """Maximum likelihood of the configured task's answers."""
    return Recipe(
        name="sft",
        prompts=prompts.sampler(config),
        rollout=demonstrations,
        reward=partial(rewards.score, rewards.configured(config)),
        advantage=uniform,
        loss=negative_logprob(),
    )
