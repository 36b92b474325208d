"""An answer is a length of 1 to 16, right with a probability that its length gives: what is learnt about length."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.recomposition import Buffer, recomposed
from fuserl.engine.tabular import Table

LENGTHS, GROUPS, GROUP = 16, 16, 8
STEPS, LR, ALPHA = 200, 0.05, 0.5


def harder(length: Tensor) -> Tensor:
    """Long answers are right more often: .9 sigmoid(2 (length - 5.5))."""
    return 0.9 * torch.sigmoid(2 * (length - 5.5))


def even(length: Tensor) -> Tensor:
    """Every answer is right with probability .6."""
    return torch.full_like(length, 0.6)


def lengths(
    slots: dict, kind: str, *, seeds: Sequence[int], right: Callable = harder, steps: int = STEPS
) -> list[tuple[float, float]]:
    """The mean length and accuracy that training comes to, by seed.

    Args:
        slots: of the recipe: advantage, loss, measure, credit.
        kind: "grpo" (every step's batch as it is), "priority" (no update from the buffer) or "compensation".
        right: (lengths) -> the probability that they are right.
    """
    found, said = [], torch.arange(1.0, LENGTHS + 1).double()
    for seed in seeds:
        table, buffer = Table(torch.zeros(1, LENGTHS), lr=LR, optimizer=torch.optim.Adam, seed=seed), Buffer()
        split = _split(slots, buffer, chance=kind == "compensation")
        for step in range(1, steps + 1):
            batch = _drawn(table, right, step)
            batch = checks.credited(batch, slots["advantage"])
            for each in [batch] if kind == "grpo" else split(batch):
                table.update(_placed(each), slots["loss"])
        p = table.probabilities[0]
        found.append((float(p @ said), float(p @ right(said))))
    return found


def mean(runs: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean length and accuracy over the seeds."""
    return tuple(statistics.mean(each) for each in zip(*runs, strict=True))


def lost(slots: dict, steps: int = 5) -> float:
    """How many responses of some steps are not in exactly one of the updates or in the buffer."""
    table, buffer = Table(torch.zeros(1, LENGTHS), seed=0), Buffer()
    split, seen, drawn = _split(slots, buffer, chance=True), [], 0
    for step in range(1, steps + 1):
        batch = checks.credited(_drawn(table, harder, step), slots["advantage"])
        # The log-prob that it was drawn with serves as its number.
        names = torch.arange(len(batch.group), dtype=torch.float64) + drawn
        drawn += len(names)
        seen += [each.rollout_logprobs for each in split(batch.replace(rollout_logprobs=names))]
    seen += [] if buffer.held is None else [buffer.held.rollout_logprobs]
    number, times = torch.cat(seen).unique(return_counts=True)
    return float(drawn - len(number) + int((times > 1).sum()))


def figures(slots: dict) -> list[Figure]:
    """The figures of `fuserl check rorecomp`; the slots as of `lengths`."""
    runs = {kind: lengths(slots, kind, seeds=range(4)) for kind in ("grpo", "priority", "compensation")}
    (long, best), (short, kept) = (mean(runs[kind]) for kind in ("grpo", "compensation"))
    ahead = [each[1] - other[1] for each, other in zip(runs["compensation"], runs["priority"], strict=True)]
    return [
        Figure("responses that are not in exactly one update or the buffer", lost(slots), 0, 0.0),
        at_most("length with compensation over GRPO's", short / long, 0.65),
        at_most("accuracy that it costs", best - kept, 0.06),
        at_least("seeds of 4 where it is .10 more right than priority alone", sum(each >= 0.1 for each in ahead), 3),
    ]


def _split(slots: dict, buffer: Buffer, *, chance: bool) -> Callable:
    more = {"measure": slots["measure"], "credit": slots["credit"], "chance": lambda step: chance}
    return recomposed(buffer, alpha=ALPHA, capacity=4.0 if chance else 1e9, **more)


def _drawn(table: Table, right: Callable, step: int) -> Batch:
    """A step's rollouts: one token, which stands for as many as its number."""
    count = GROUPS * GROUP
    tokens = torch.multinomial(table.probabilities[0], count, replacement=True, generator=table.random)
    spoken = (tokens + 1).double()
    rewards = torch.rand(count, generator=table.random, dtype=torch.float64) < right(spoken)
    batch = table.given(tokens[:, None], torch.zeros_like(tokens), rewards, GROUP)
    return batch.replace(old_logprobs=batch.rollout_logprobs, facts={"spoken": spoken}, extra={}, step=step)


def _placed(batch: Batch) -> Batch:
    """The batch in the one row of the table."""
    return batch.replace(extra={"state": torch.zeros_like(batch.tokens)})
