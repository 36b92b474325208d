"""Reward model: scores under which chosen completions beat rejected ones (Ouyang et al., arXiv:2203.02155).

    score = a linear head at the state that has read the completion's last token
    loss = mean over pairs of -log sigmoid(score of chosen - score of rejected) + centre (sum of both scores)^2

Limit: at the start every score is 0 and the loss log 2; for margins beta log(p / p_ref) it is DPO's loss.

Ours: held-out problems are judged by the share of pairs in the right order.
"""

import math
from functools import partial
from types import SimpleNamespace

from fuserl.engine import checks, evaluation, prompts
from fuserl.engine.advantages import uniform
from fuserl.engine.checks import Figure
from fuserl.engine.preferences import bradley_terry, preference
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import pairs

FIXED = {"group_size": 2}


def recipe(config, *, centre: float = 0.0) -> Recipe:
    """A reward model of the configured pairs.

    Args:
        centre: weight of the squared sum of a pair's scores, which keeps them around 0; 0.01 is usual.
    """
    loss = bradley_terry(centre=centre)
    return Recipe(
        name="reward_model",
        prompts=prompts.sampler(config),
        rollout=pairs,
        reward=None,
        advantage=uniform,
        loss=loss,
        learns_from=("chosen", "rejected"),
        evaluate=partial(evaluation.of_completions, pairs, loss),
    )


def show() -> list[Figure]:
    """The limits: log 2 at the start; DPO's loss where the scores are beta log(p / p_ref)."""
    batch = checks.example()
    scores = 0.1 * batch.rollout_sum(batch.rollout_logprobs - batch.ref_logprobs)
    out = SimpleNamespace(score=batch.at_last(scores))
    theirs = float(bradley_terry()(out, batch)[0].sum())
    return [
        Figure("loss at the start", checks.value(batch, bradley_terry()), math.log(2)),
        Figure("loss at DPO's margins", theirs, checks.value(batch, preference(beta=0.1))),
    ]
