"""2. ArenaRL: group advantages from an intra-group tournament (Zhang et al., arXiv:2601.06487).

    S[a] = J(a, b)[first] + J(b, a)[second],   S[b] = J(a, b)[second] + J(b, a)[first]
    seeds: mean score against completion 0; a bracket in which S[a] >= S[b] lets a go on; who loses in one round is
    ranked by mean score
    r = 1 - rank / (N - 1),   A = (r - mean) / (std + 1e-6)
    loss = mean over rollouts of the mean over tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A)

Limit: a judge without noise ranks a group of 16 exactly, so A is that of GRPO for rewards that are the true ranks.

Ours: where a group is no power of two, the best seeds have the byes, so that the two best still meet in the final only;
the judge's words; a rule as judge (the task's verifier) where no --judge is named; lr as for our baselines. Problems
that are held out are judged by the task's verifier where it has one.

Check: qualities N(0, 1), judge's noise s on each of the four readings of a match, mean over groups of Spearman's
correlation with equal values sharing their mean rank. (Breaking ties by place instead takes 0.005 off a round robin and
0.04 off pointwise marks: 0.953 and 0.79 at s = 0.5.) At s = 1 the bracket is no longer near a round robin.
"""

from fuserl.engine import judges, prompts, rewards
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure
from fuserl.engine.contracts import require_one_of
from fuserl.engine.losses import clipped
from fuserl.engine.recipe import Recipe
from fuserl.engine.rollouts import sampled, sampled_from_greedy, scored
from fuserl.engine.tournaments import RUBRIC, TOPOLOGIES, tournament

DEFAULTS = {"group_size": 16, "groups": 16}


def recipe(
    config,
    *,
    topology: str = "single_elimination",
    anchor: str = "first",
    rubric: str | None = None,
    low: float = 0.2,
    high: float = 0.28,
) -> Recipe:
    """ArenaRL on the configured task.

    Args:
        topology: single_elimination, anchor, round_robin, swiss or double_elimination.
        anchor: completion 0, which seeds the others: the first sampled one, or the greedy one.
        rubric: what the judge looks at; default reasoning, tools, answer.
        low, high: the ratio is clipped to [1 - low, 1 + high].
    """
    require_one_of("arena_rl", "topology", topology, TOPOLOGIES)
    require_one_of("arena_rl", "anchor", anchor, ("first", "greedy"))
    judge = judges.configured(config)
    reward = judges.JudgedScorer(tournament(judge, topology, RUBRIC if rubric is None else rubric), judge)
    drawn = sampled_from_greedy if anchor == "greedy" else sampled
    return Recipe(
        name="arena_rl",
        prompts=prompts.sampler(config),
        rollout=scored(drawn(config.group_size), reward),
        reward=rewards.scorer(config, required=False),
        advantage=standardized,
        loss=clipped(low=low, high=high),
    )


def show() -> list[Figure]:
    """Matches of a group, the largest advantage, and how right the rankings are, without noise and with it."""
    from fuserl.engine.toys import arena_rl

    return arena_rl.figures(standardized)
