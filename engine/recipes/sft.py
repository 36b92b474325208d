"""SFT: supervised fine-tuning on the task's own answers.

    loss = mean over tokens of -log p(token)

Limit: the loss of one batch is the cross-entropy of its answers' tokens.
"""

from functools import partial

from fuserl.engine import checks, evaluation, prompts, rewards
from fuserl.engine.advantages import uniform
from fuserl.engine.checks import Figure
from fuserl.engine.losses import negative_logprob
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import demonstrations

FIXED = {"group_size": 1}


def recipe(config) -> Recipe:
    """Maximum likelihood of the configured task's answers."""
    loss = negative_logprob()
    return Recipe(
        name="sft",
        prompts=prompts.sampler(config),
        rollout=demonstrations,
        reward=rewards.scorer(config, required=False),
        advantage=uniform,
        loss=loss,
        learns_from=("answer",),
        evaluate=partial(evaluation.of_completions, demonstrations, loss),
    )


def show() -> list[Figure]:
    """The limit: the mean of -log p over the batch's tokens."""
    batch = checks.credited(checks.example(), uniform)
    return [Figure("loss", checks.value(batch, negative_logprob()), -float(batch.rollout_logprobs.mean()))]
