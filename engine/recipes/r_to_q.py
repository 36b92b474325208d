"""R2Q (11), from r to Q*: a policy of DPO is a Q-function of tokens (Rafailov et al., arXiv:2404.12358).

    Q*(s, a) = r(s, a) + beta log p_ref(a | s) + V*(s'),  V*(s) = beta log sum over a of exp(Q*(s, a) / beta)
    beta log p*(a | s) / p_ref(a | s) = r(s, a) + V*(s') - V*(s),  whose sum is the reward's, less V* at the prompt
    loss = DPO's; completions by beam search: the likeliest one has the largest sum of r + beta log p_ref

Held-out problems are judged with several widths of beams, and with the rewards that the policy implies of chosen and
rejected completions and of some that the reference draws: those have the mean -beta KL(p_ref || p).

Limit: in a tree of tokens all of that holds exactly; trained, it is DPO loss and gradient.

Ours: beams at the temperature of the run, without a norm for length; a text that has ended keeps its place until a
better one comes. `guided` beams score texts by sums of beta log p / p_ref among the 2 max(width, 4) likeliest tokens.

Check: engine/toys/r_to_q.py, random trees of 4^5 leaves; infinitely many preferences on 4^3, in a slow test on 4^5.
"""

from fuserl.engine import evaluation, prompts, rewards
from fuserl.engine.advantages import uniform
from fuserl.engine.beams import widths
from fuserl.engine.checks import Figure
from fuserl.engine.credit import of_reference
from fuserl.engine.preferences import preference
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import pairs

FIXED = {"group_size": 2}


def recipe(
    config, *, beta: float = 0.1, beams: str = "1,2,5,8", guided: bool = False, reference_samples: int = 1
) -> Recipe:
    """DPO on the configured pairs, judged by search.

    Args:
        beta: how strongly the policy is held to the initial model.
        beams: widths of the beams that held-out problems are completed with; empty searches none.
        guided: search by implicit rewards as well.
        reference_samples: completions that the reference draws of each held-out problem; 0 draws none.
    """
    loss, wide = preference(beta=beta), widths(beams)
    reward = rewards.scorer(config, required=False)

    def evaluate(policy, held_out: list) -> dict[str, float]:
        row = evaluation.of_completions(pairs, loss, policy, held_out)
        row |= of_reference(policy, held_out, beta=beta, samples=reference_samples)
        row |= evaluation.searched(policy, held_out, reward, wide)
        return row | (evaluation.searched(policy, held_out, reward, wide, beta=beta) if guided else {})

    return Recipe(
        name="r_to_q",
        prompts=prompts.sampler(config),
        rollout=pairs,
        reward=reward,
        advantage=uniform,
        loss=loss,
        learns_from=("chosen", "rejected"),
        evaluate=evaluate,
    )


def show() -> list[Figure]:
    """The tree's identities, what beams find in it, and what preferences make of it."""
    from fuserl.engine.toys import r_to_q

    return r_to_q.figures(preference)
