"""MDPO (44): mirror descent policy optimisation (Tomar et al., arXiv:2005.09814), on-policy, for language models.

    loss = mean over all tokens of -ratio A + KL(policy || policy at the update's start) / t_k,  A as GRPO's
    t_k = 1 - (k - 1) / K for turn k of K: the proximity weighs more as the run ends; no clip, m = --epochs steps a turn

The divergence is over the whole vocabulary. For actions of other kinds, on- and off-policy, with Tsallis logarithms:
engine/mirror.py.

Limit: the first of the m steps has the plain policy gradient, for the divergence's is 0 where nothing has moved.

Ours: the last turn has t = 1 / K, not 0; with t given it is constant. A teacher that a user names stands for pi_k.

Check: engine/toys/mirrored.py: 30 turns of m = 10 steps on random decision processes, 5 seeds; and the off-policy form
in engine/toys/point_mass.py, lam .2, 300 updates of seed 0, whose start is a good one: others take up to 1600. With lam
1 it wanders, and with q 1.5 it may end in NaN after 2000.
"""

from fuserl.engine import prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.mirror import annealed, constant, proximal
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled
from fuserl.engine.second_models import Teacher

DEFAULTS = {"epochs": 10}


def recipe(config, *, t: float | None = None) -> Recipe:
    """MDPO on the configured task.

    Args:
        t: step size of every turn; default falls from 1 to 1 / steps.
    """
    return Recipe(
        name="mdpo",
        prompts=prompts.sampler(config),
        rollout=sampled(config.group_size),
        reward=rewards.scorer(config),
        advantage=standardized,
        loss=proximal(t=annealed(config.steps) if t is None else constant(t)),
        teacher=Teacher("old"),
    )


def show() -> list[Figure]:
    """The inner problem's solution, the first step, SAC's loss, closed forms against loops, and what is learnt."""
    from fuserl.engine.toys import mirrored, point_mass

    return [*mirrored.solution(proximal), *point_mass.limits(), *point_mass.figures(), *mirrored.returns(proximal)]
