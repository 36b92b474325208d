"""DPO: direct preference optimisation (Rafailov et al., arXiv:2305.18290), offline, on pairs of completions.

    margin = beta [log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)]
    loss = mean over pairs of -log sigmoid(margin)

Limit: at the start the margin is 0 and the loss log 2; its gradient is beta times that of RLOO for a group of the two
with rewards 1 and 0.

Ours: without data of chosen and rejected completions, a task's answer is chosen over another problem's.
"""

import math
from functools import partial

from fuserl.engine import checks, evaluation, prompts, rewards
from fuserl.engine.advantages import leave_one_out, uniform
from fuserl.engine.checks import Figure
from fuserl.engine.losses import clipped, rollout_sum
from fuserl.engine.preferences import preference
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import pairs

FIXED = {"group_size": 2}


def recipe(config, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Recipe:
    """DPO on the configured pairs.

    Args:
        beta: how strongly the policy is held to the initial model.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.
    """
    loss = preference(beta=beta, label_smoothing=label_smoothing)
    return Recipe(
        name="dpo",
        prompts=prompts.sampler(config),
        rollout=pairs,
        reward=rewards.scorer(config, required=False),
        advantage=uniform,
        loss=loss,
        learns_from=("chosen", "rejected"),
        evaluate=partial(evaluation.of_completions, pairs, loss),
    )


def show() -> list[Figure]:
    """The limits at the start: a loss of log 2, and beta times RLOO's gradient."""
    start = checks.example()
    start = start.replace(ref_logprobs=start.rollout_logprobs)
    rloo = checks.gradient(checks.credited(start, leave_one_out), clipped(reduce=rollout_sum))
    ours = checks.gradient(start, preference(beta=0.1))
    return [
        Figure("loss at the start", checks.value(start, preference(beta=0.1)), math.log(2)),
        Figure("gradient apart from beta RLOO's", checks.apart(ours, 0.1 * rloo), 0),
    ]
