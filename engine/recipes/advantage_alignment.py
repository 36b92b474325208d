"""28. AdAlign-LLM: Advantage Alignment in repeated games of two agents (Piche et al., arXiv:2511.19405).

    A[t]      = discounted return of round t - mean of the other games of one start at the same round
    w[t]      = gamma sum over k < t of gamma^(t - k) A1[k]
    credit[t] = A1[t] + shaping w[t] A2[t], of every token of the agent's turns of round t
    loss      = mean over all tokens of -min(ratio, ratio_cap) credit logprob - entropy_coef entropy

Limit: with shaping 0 the credit is REINFORCE's with a leave-one-out baseline, bit for bit.

Ours: games of one start share their chance (hands, values, who begins); what cannot be read is the move that does its
speaker no good; against its past the policy is agent 0 of every other start, and in the first step, without a past, it
plays and trains both agents. Held-out problems are the task's: what games cost. Defaults are those of the dilemma; for
trust gamma is 0.96 and shaping 2. Other moves (`alternatives`) are tried where both agents act at once.

Check: two players with tables of five states, the start and the last round; logits of D begin at -1, 128 games of 16
rounds, 600 steps of Adam at 0.05, one seed (a naive pair for 200 steps), in a slow test three. Shaping 1 came to 2.44
to 2.62 a round, 2 to 2.39 to 2.58, 0.5 to 2.23.
"""

from fuserl.engine import games, rewards
from fuserl.engine.checks import Figure
from fuserl.engine.losses import token_mean, truncated
from fuserl.engine.matches import Arena
from fuserl.engine.opponent_shaping import aligned
from fuserl.engine.recipe import Recipe

DEFAULTS = {"groups": 8, "group_size": 8, "max_new_tokens": 8}


def recipe(
    config,
    *,
    game: str = "ipd",
    rounds: int = 10,
    quota: int = 1,
    alternate: bool = False,
    objective: str = "alignment",
    gamma: float = 0.9,
    shaping: float = 0.5,
    now: bool = False,
    sign: bool = False,
    clip: float | None = None,
    over_time: bool = False,
    alternatives: int = 0,
    anneal_every: int = 0,
    anneal_rate: float = 0.5,
    anneal_least: float = 0.1,
    past: int = 4,
    past_every: int = 10,
    ratio_cap: float = 2.0,
    entropy_coef: float = 0.01,
) -> Recipe:
    """Advantage Alignment in a game.

    Args:
        game: ipd (the iterated prisoner's dilemma), split or trust (Trust-and-Split).
        rounds: of a game.
        quota: messages of each agent in a round of trust.
        alternate: the upper hand of trust changes sides every round.
        objective: alignment, naive (shaping 0) or sum (both get what both earned).
        gamma: discount of later rounds.
        shaping: weight of the opponent-shaping term (the paper's beta).
        now: the weights count the round itself too.
        sign: only the weights' signs count.
        clip: bound of the weights; default none.
        over_time: weights are divided by the number of the round.
        alternatives: other moves tried at every round, whose mean return the weights are of; 0 tries none.
        anneal_every: steps after which shaping is multiplied by anneal_rate; 0 leaves it.
        anneal_rate: of the annealing.
        anneal_least: where it ends.
        past: earlier selves that are kept to play against; 0 is self-play.
        past_every: steps between two of them.
        ratio_cap: importance ratios are cut above it.
        entropy_coef: weight of the entropy bonus.
    """
    make = games.maker(game, rounds, quota=quota, alternate=alternate)
    arena = Arena.of(config, make, past=past, every=past_every, alternatives=alternatives, gamma=gamma)
    how = {"now": now, "sign": sign, "clip": clip, "over_time": over_time}
    how |= {"anneal": (anneal_every, anneal_rate, anneal_least), "scale": games.GAMES[game].scale}
    return Recipe(
        name="advantage_alignment",
        prompts=lambda step: arena.starts(step, config.groups),
        rollout=arena.rollout,
        reward=rewards.scorer(config, required=False),
        advantage=aligned(objective, gamma=gamma, shaping=shaping, **how),
        loss=truncated(low=1.0, high=ratio_cap - 1, entropy_coef=entropy_coef, reduce=token_mean),
        evaluate=arena.evaluate,
        state={"past": arena.past},
    )


def show() -> list[Figure]:
    """Weights and payoffs by hand; then the dilemma: who aligns comes to cooperate and is not exploited."""
    from fuserl.engine.toys import advantage_alignment

    return advantage_alignment.figures(truncated(low=1.0, high=1.0, entropy_coef=0.01, reduce=token_mean))
