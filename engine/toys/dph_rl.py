"""One question with 32 answers: the initial policy gives the eight right ones, and rewards are for two of them.

That it solves the question is what the rehearsal is made for: where it is right a quarter of the time, an arm's ratio
grows beyond what the forward divergence is held to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least
from fuserl.engine.losses import Loss
from fuserl.engine.mixtures import emptied, joined
from fuserl.engine.rehearsal import beside
from fuserl.engine.tabular import Table

ARMS, RIGHT, REWARDED = 32, 8, 2
STEPS, GROUP, MARGIN = 600, 8, 4.0


def mean_apart(loss: Loss, kind: str, alpha: float) -> float:
    """How far the mean of f over samples of q, each of 40 tokens by its probability, is from the divergence."""
    random = torch.Generator().manual_seed(0)
    p, q = ((torch.randn(40, generator=random, dtype=torch.float64) / 2).softmax(-1) for _ in range(2))
    m = (p + q) / 2
    expected = {
        "forward": (q * (q / p).log()).sum(),
        "jensen_shannon": (q * (q / m).log()).sum() + (p * (p / m).log()).sum(),
        "alpha": (1 - (p ** (1 - alpha) * q**alpha).sum()) / (alpha * (1 - alpha)),
    }[kind]
    table = Table(p.log()[None])
    found = _values(table, _rehearsed(table, torch.arange(40), q.log()), loss).detach()
    return abs(float((q * found).sum() - expected))


def at_one(loss: Loss) -> tuple[float, float, float]:
    """f(1), f'(1) and f''(1): value and gradient where policy and reference agree, and the gradient's slope there."""
    width, even = 1e-5, torch.zeros(1, dtype=torch.float64)
    value, slope = (float(each) for each in _at(loss, even))
    above, below = (float(_at(loss, even + move)[1]) for move in (width, -width))
    return value, slope, (above - below) / (2 * width)


def forgotten(loss: Loss, distance: float) -> tuple[float, float]:
    """The value and the gradient at a token whose log-prob has fallen by `distance`."""
    value, slope = _at(loss, torch.tensor([-distance], dtype=torch.float64))
    return float(value), float(slope)


def arms(advantage: Callable, loss: Loss, *, seeds: Sequence[int], steps: int = STEPS) -> dict[str, float]:
    """Training with `GROUP` answers and as many of the initial policy's right ones a step; means over the seeds.

    Returns:
        "number", exp of the entropy over the right arms; "least", the smallest of their probabilities; "rewarded",
        the probability of those that reward is for.
    """
    found = []
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        start = torch.zeros(1, ARMS, dtype=torch.float64)
        start[:, :RIGHT] = MARGIN
        table, reference = Table(start, lr=0.5, seed=seed), start.log_softmax(-1)[0]
        likely = reference[:RIGHT].softmax(-1)
        for _ in range(steps):
            explored = table.drawn([0], GROUP, lambda _, said: int(said) < REWARDED)
            drawn = torch.multinomial(likely, GROUP, replacement=True, generator=random)
            rehearsed = _rehearsed(table, drawn, reference[drawn])
            table.update(beside(checks.credited(explored, advantage), rehearsed), loss)
        p = table.probabilities[0]
        among = p[:RIGHT] / p[:RIGHT].sum()
        number = float((-among * among.log()).sum().exp())
        found.append({"number": number, "least": float(p[:RIGHT].min()), "rewarded": float(p[:REWARDED].sum())})
    return {name: statistics.mean(each[name] for each in found) for name in found[0]}


def figures(advantage: Callable, both: Callable) -> list[Figure]:
    """The figures of `fuserl check dph_rl`.

    Args:
        advantage: of explored rollouts.
        both: makes the recipe's loss, of a divergence, eta and alpha.
    """
    found, a = [], 0.2
    for kind, name, curved in (("forward", "KL", 1.0), ("jensen_shannon", "2 JS", 0.5), ("alpha", "alpha", 1.0)):
        loss = both(kind, eta=1.0, alpha=a)
        value, slope, curvature = at_one(loss)
        found += [
            Figure(f"{kind}: mean of f apart from {name}", mean_apart(loss, kind, a), 0, 1e-12),
            Figure(f"{kind}: f(1) and f'(1)", max(abs(value), abs(slope)), 0, 1e-12),
            Figure(f"{kind}: f''(1)", curvature, curved, 1e-6),
        ]
    stops, pulls = (forgotten(both(k, eta=1.0), d) for k, d in (("jensen_shannon", 30.0), ("forward", 10.0)))
    kept, lost = (arms(advantage, both(kind, eta=0.2), seeds=(0, 1)) for kind in ("forward", "none"))
    return [
        *found,
        Figure("jensen_shannon where u = e^-30: f", stops[0], math.log(2), 1e-9),
        Figure("its gradient there", stops[1], 0, 1e-9),
        Figure("forward's gradient where u = e^-10", pulls[1], math.expm1(-10)),
        at_least("effective number of right arms, forward over none", kept["number"] / lost["number"], 2.0),
        at_least("least probability of a right arm, forward over none", kept["least"] / lost["least"], 20.0),
        at_least("probability of what is rewarded, forward", kept["rewarded"], 0.9),
    ]


def _rehearsed(table: Table, tokens: Tensor, logprobs: Tensor) -> Batch:
    """A batch of the one question's answers, with the log-probs that they had."""
    batch = table.given(tokens[:, None], torch.zeros_like(tokens), torch.ones(len(tokens)), 1)
    return batch.with_advantages(torch.zeros(len(tokens))).replace(ref_logprobs=logprobs)


def _values(table: Table, batch: Batch, loss: Loss) -> Tensor:
    """The loss of each rehearsed token, not averaged."""
    seen = joined(emptied(batch), batch)
    return loss(table.outputs(seen), seen)[0] * len(batch.tokens)


def _at(loss: Loss, d: Tensor) -> tuple[Tensor, Tensor]:
    """The value and the gradient at one token of log-ratio d, (1,)."""
    batch = _rehearsed(Table(torch.zeros(1, 2)), torch.zeros(1, dtype=torch.int64), torch.full_like(d, -30.0))
    seen = joined(emptied(batch), batch).replace(rollout_logprobs=d - 30.0)
    return torch.tensor(checks.value(seen, loss), dtype=torch.float64), checks.gradient(seen, loss)
