"""The iterated prisoner's dilemma between two tables that remember one round: does anybody come to cooperate?"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.engine import games
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss
from fuserl.engine.opponent_shaping import credits, shaping_weights
from fuserl.engine.tabular import Table

# What a player earns for its own move (row, 0 cooperates) and the other's.
PAYOFFS = torch.tensor([[3.0, 0.0], [5.0, 1.0]], dtype=torch.float64)
GAMES, ROUNDS, STEPS = 128, 16, 600


def player(seed: int) -> Table:
    """Five states, the start and what both did last (CC, CD, DC, DD, one's own move first); the logit of D is -1."""
    return Table(torch.tensor([[0.0, -1.0]] * 5), lr=0.05, optimizer=torch.optim.Adam, seed=seed)


def defector() -> Table:
    """One that always defects."""
    return Table(torch.tensor([[-50.0, 50.0]] * 5))


def played(players: tuple[Table, Table], games: int = GAMES) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Moves, states and rewards of each player, (games, ROUNDS)."""
    states = [torch.zeros(games, dtype=torch.int64) for _ in players]
    each = [player.probabilities for player in players]
    moves, seen, earned = ([[], []] for _ in range(3))
    for _ in range(ROUNDS):
        now = [
            torch.multinomial(p[state], 1, generator=player.random).squeeze(1)
            for p, state, player in zip(each, states, players, strict=True)
        ]
        for i in (0, 1):
            moves[i].append(now[i])
            seen[i].append(states[i])
            earned[i].append(PAYOFFS[now[i], now[1 - i]])
        states = [1 + 2 * now[i] + now[1 - i] for i in (0, 1)]
    moves, seen, earned = ([torch.stack(rows, 1) for rows in both] for both in (moves, seen, earned))
    return moves, seen, earned


def trained(
    seed: int, loss: Loss, *, shaping: float, gamma: float = 0.9, scale: float = 5.0, steps: int = STEPS, **how
):
    """Two players of their own, each credited as the recipe does; returns them."""
    players = player(2 * seed), player(2 * seed + 1)
    one = torch.zeros(GAMES, dtype=torch.int64)
    for _ in range(steps):
        moves, seen, earned = played(players)
        earned = [each / scale for each in earned]
        for i, table in enumerate(players):
            found = credits(earned[i], earned[1 - i], one, gamma=gamma, shaping=shaping, **how)
            batch = table.given(moves[i], seen[i].flatten(), earned[i].sum(1), GAMES)
            table.update(batch.with_advantages(found.flatten()), loss)
    return players


def weights_apart(gamma: float = 0.9) -> float:
    """How far the shaping weights of random advantages are, at most, from sums written out."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(5, 12, generator=random, dtype=torch.float64)
    expected = torch.zeros_like(a)
    for game in range(5):
        for t in range(12):
            expected[game, t] = gamma * sum(gamma ** (t - k) * a[game, k] for k in range(t))
    return float((shaping_weights(a, gamma) - expected).abs().max())


def payoffs(players: tuple[Table, Table], games: int = 2000) -> tuple[float, float]:
    """What each earns in a round, on average."""
    first, second = played(players, games)[2]
    return float(first.mean()), float(second.mean())


def figures(loss: Loss) -> list[Figure]:
    """The figures of `fuserl check advantage_alignment`, under the recipe's loss."""
    pair, naive = trained(0, loss, shaping=1.0), trained(0, loss, shaping=0.0, steps=200)
    fooled, cooperates = payoffs((pair[0], defector())), pair[0].probabilities[:, 0]
    equal, given = games.split_points((10, 10), (10.0, 1.0)), games.split_points((10, 0), (10.0, 1.0))
    return [
        Figure("weights apart from sums written out", weights_apart(), 0, 1e-10),
        Figure("points for 10 and 10 coins, the value 10", equal[0], 50, 0),
        Figure("the value 1", equal[1], 5, 0),
        Figure("points for 10 coins of value 10, the other none", given[0], 100, 0),
        Figure("the other's", given[1], 0, 0),
        at_least("aligned: the lower payoff of a round", min(payoffs(pair)), 2.2),
        at_most("aligned: what always defecting earns from it", fooled[1], 1.5),
        at_least("aligned: P(C) after C and C", float(cooperates[1]), 0.95),
        at_most("aligned: P(C) after C and D", float(cooperates[2]), 0.03),
        at_most("naive: the higher payoff of a round", max(payoffs(naive)), 1.1),
    ]
