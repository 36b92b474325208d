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

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import generalised, over_batch, standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require_one_of
from fuserl.engine.losses import clipped, squared_value, summed, token_mean
from fuserl.engine.recipe import Recipe
from fuserl.engine.recomposition import Buffer, by_chance, measured, recomposed
from fuserl.engine.rollouts import sampled


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
    require_one_of("rorecomp", "advantages", advantages, ("batch", "group", "critic"))
    if advantages == "critic":
        advantage, reads = generalised(gamma=gamma, lam=lam, beta=0.0), ("old_logprobs", "values")
        loss = summed(clipped(low=low, high=high, reduce=token_mean), squared_value(clip=0.2), value_coef)
    else:
        advantage, reads = standardized, ("old_logprobs",)
        loss = clipped(low=low, high=high)
    waiting = Buffer()
    return Recipe(
        name="rorecomp",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=advantage,
        loss=loss,
        reads=reads,
        batches=recomposed(
            waiting,
            alpha=alpha,
            capacity=buffer,
            measure=measured(measure),
            chance=by_chance(p_comp, p_comp_end, steps=config.steps, seed=config.seed),
            credit=over_batch if advantages == "batch" else None,
        ),
        state={"buffer": waiting},
    )


def show() -> list[Figure]:
    """A step goes on exactly once; where longer answers are right more often, what is cut and what it costs."""
    from fuserl.engine.toys import rorecomp

    slots = {"advantage": standardized, "loss": clipped(), "measure": measured("spoken"), "credit": over_batch}
    return rorecomp.figures(slots)
