"""27 RoRecomp: rollout response recomposition for short answers (Li et al., arXiv:2509.25958).

    priority      of a step's right rollouts the shortest share alpha, and of its wrong ones the longest: one update now
    buffer        the rest, with their old log-probs, the oldest first; all of a step where none is right, or all are
    compensation  as many as a step has, when the buffer holds them, with probability p_comp: one update more

Rewards are not changed: the choice alone makes short right and long wrong answers what is learnt from. p_comp goes in a
line from its first value to p_comp_end over the run; a full buffer gives in any case.

Limit: with alpha 1 and advantages of the group it is GRPO, in steps that have right and wrong rollouts.

Ours: alpha, the buffer's size and the course of p_comp, which the paper does not give; advantages over the batch, as
those of the group may be all of one sign in a priority batch ("group" keeps them, "critic" has PPO's); right is a
reward of 1 or more; whether the buffer gives is drawn by seed and step.

Check: a softmax over 16 lengths (toys/rorecomp.py), four seeds.
"""

import math
import random

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import generalised, over_batch, standardized
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.contracts import require, require_one_of
from fuserl.engine.losses import clipped, squared_value, summed, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.recomposition import Buffer, recomposed
from fuserl.engine.rollouts import sampled
from fuserl.engine.toys import rorecomp as toys

CREDIT = {"batch": over_batch, "group": standardized, "critic": None}


def recipe(
    config,
    *,
    alpha: float = 0.5,
    buffer: float = 4.0,
    p_comp: float = 1.0,
    p_comp_end: float = 1.0,
    advantages: str = "batch",
    measure: str = "length",
    low: float = 0.2,
    high: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_coef: float = 0.5,
) -> Recipe:
    """RoRecomp on the configured task.

    Args:
        alpha: share of the right and of the wrong rollouts that are learnt from at once.
        buffer: leftovers that wait at most, in those of a step.
        p_comp: probability of an update from the buffer, where it holds as many rollouts as a step, at the start.
        p_comp_end: the same at the end.
        advantages: batch (rewards normalised over each update's batch), group (GRPO's, as drawn) or critic (PPO's).
        measure: length (tokens), or a fact of rollouts by name, as their number of tool calls.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        gamma: discount of later rewards, with a critic.
        lam: discount of later temporal differences, with a critic.
        value_coef: weight of the value loss, with a critic.
    """
    require("rorecomp", "alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    require("rorecomp", "buffer", buffer, 0 <= buffer < math.inf, "a finite number >= 0")
    for name, value in (("p_comp", p_comp), ("p_comp_end", p_comp_end)):
        require("rorecomp", name, value, 0 <= value <= 1, "in [0, 1]")
    require_one_of("rorecomp", "advantages", advantages, list(CREDIT))
    waiting, critic = Buffer(), advantages == "critic"

    def chance(step):
        now = p_comp + (p_comp_end - p_comp) * (step - 1) / max(1, config.steps - 1)
        return random.Random(f"{config.seed} {step}").random() < now

    surrogate = clipped(low=low, high=high, **({"reduce": token_mean} if critic else {}))
    return Recipe(
        name="rorecomp",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=generalised(gamma=gamma, lam=lam, beta=0.0) if critic else standardized,
        loss=summed(surrogate, squared_value(clip=0.2), value_coef) if critic else surrogate,
        reads=("old_logprobs", "values") if critic else ("old_logprobs",),
        batches=recomposed(
            waiting, alpha=alpha, capacity=buffer, measure=measured(measure), chance=chance,
            credit=over_batch if advantages == "batch" else None,
        ),
        state={"buffer": waiting},
    )  # fmt: skip


def measured(name: str):
    """(Batch) -> (B,): tokens, or the fact of that name."""

    def found(batch):
        if name != "length" and name not in batch.facts:
            known = ", ".join(["length", *batch.facts])
            raise ValueError(f"rorecomp: measure must be one of {known}; got {name!r}. Choose what the rollouts have.")
        return batch.lengths if name == "length" else batch.facts[name]

    return found


def show() -> list[Figure]:
    """A step goes on exactly once; where longer answers are right more often, what is cut and what it costs."""
    slots = {"advantage": standardized, "loss": clipped(), "measure": measured("spoken"), "credit": over_batch}
    runs = {kind: toys.lengths(slots, kind, seeds=range(4)) for kind in ("grpo", "priority", "compensation")}
    (long, best), (short, kept) = (toys.mean(runs[kind]) for kind in ("grpo", "compensation"))
    ahead = [each[1] - other[1] for each, other in zip(runs["compensation"], runs["priority"], strict=True)]
    return [
        Figure("responses that are not in exactly one update or the buffer", toys.lost(slots), 0, 0.0),
        at_most("length with compensation over GRPO's", short / long, 0.65),
        at_most("accuracy that it costs", best - kept, 0.06),
        at_least("seeds of 4 where it is .10 more right than priority alone", sum(each >= 0.1 for each in ahead), 3),
    ]
