"""A grid on which an arm walks to an object, grips it and carries it to a goal: discrete actions, one token a step.

    0 east, 1 west, 2 north, 3 south, 4 grip        state = place, and as many again for holding the object

Now and then it slips: another move happens than the one that it chose. What goes wrong compounds, as an arm that has
drifted is where no demonstration has been.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss, clipped, negative_logprob
from fuserl.engine.tabular import Table, learnt

SIZE, GRIP, ACTIONS = 5, 4, 5
PLACES = SIZE * SIZE
OBJECT, GOAL, STEPS, SLIPS = (3, 1), (1, 4), 24, 0.1
_MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def _place(x: int, y: int) -> int:
    return y * SIZE + x


def _transitions() -> Tensor:
    """(states, actions) int64, where an action leads."""
    found = torch.zeros(2 * PLACES, ACTIONS, dtype=torch.int64)
    for state in range(2 * PLACES):
        holds, (y, x) = state // PLACES, divmod(state % PLACES, SIZE)
        for action, (right, up) in enumerate(_MOVES):
            x_, y_ = (min(max(at, 0), SIZE - 1) for at in (x + right, y + up))
            found[state, action] = holds * PLACES + _place(x_, y_)
        found[state, GRIP] = max(holds, (x, y) == OBJECT) * PLACES + _place(x, y)
    return found


NEXT, END = _transitions(), PLACES + _place(*GOAL)


def teacher(sharpness: float = 8.0) -> Tensor:
    """Logits (states, actions) of one who knows the way from everywhere, first along the row; at the goal it grips."""
    logits = torch.zeros(2 * PLACES, ACTIONS, dtype=torch.float64)
    for state in range(2 * PLACES):
        aim, (y, x) = GOAL if state >= PLACES else OBJECT, divmod(state % PLACES, SIZE)
        gaps = (aim[0] - x, x - aim[0], aim[1] - y, y - aim[1])
        logits[state, next((action for action, gap in enumerate(gaps) if gap > 0), GRIP)] = sharpness
    return logits


def arm(logits: Tensor, seed: int, lr: float) -> Table:
    """A policy of the arm, updated by Adam."""
    return Table(logits, length=STEPS, lr=lr, optimizer=torch.optim.Adam, seed=seed)


@torch.no_grad()
def drawn(table: Table, rollouts: int, slips: float = SLIPS) -> Batch:
    """Rollouts of one group with reward 1 for an arm that ends at the goal and holds the object."""
    state, states, tokens = torch.zeros(rollouts, dtype=torch.int64), [], []
    for _ in range(STEPS):
        states.append(state)
        tokens.append(torch.multinomial(table.probabilities[state], 1, generator=table.random).squeeze(-1))
        slipped = torch.rand(rollouts, generator=table.random) < slips
        other = torch.randint(ACTIONS, (rollouts,), generator=table.random)
        state = NEXT[state, torch.where(slipped, other, tokens[-1])]
    return table.given(torch.stack(tokens, 1), torch.stack(states, 1).flatten(), (state == END).double(), rollouts)


def success(logits: Tensor, slips: float = SLIPS) -> float:
    """The chance that the arm succeeds, exactly."""
    p = (1 - slips) * logits.detach().softmax(-1) + slips / ACTIONS
    moves = torch.zeros(2 * PLACES, 2 * PLACES, dtype=torch.float64).scatter_add(1, NEXT, p)
    return float(torch.linalg.matrix_power(moves, STEPS)[0, END])


def imitating(seed: int, demonstrations: int, *, lr: float = 0.2, steps: int = 40) -> Table:
    """An arm fitted from nothing to demonstrations of the teacher, STEPS labels each, in which nothing slips."""
    batch = drawn(arm(teacher(), seed, lr), demonstrations, 0.0)
    batch, table = batch.with_advantages(torch.ones_like(batch.rewards)), arm(torch.zeros_like(teacher()), seed, lr)
    for _ in range(steps):
        table.update(batch, negative_logprob())
    return table


def step(table: Table, rollouts: int, advantage: Callable, loss: Loss) -> None:
    """One update on rollouts of the arm's own, which the teacher has scored."""
    batch = drawn(table, rollouts)
    scored = table.outputs(batch, teacher()).logprob
    batch = batch.replace(old_logprobs=batch.rollout_logprobs, extra=batch.extra | {"teacher_logprob": scored})
    learnt(table, batch, advantage, loss)


def steps_to(table: Table, rollouts: int, advantage: Callable, loss: Loss, *, at: float, most: int) -> int:
    """Moves of the arm until its chance of success is `at`, or `most`."""
    moves = 0
    while success(table.logits) < at and moves < most:
        step(table, rollouts, advantage, loss)
        moves += rollouts * STEPS
    return moves


def figures(advantage: Callable, loss: Loss, seeds: int = 5) -> list[Figure]:
    """Distillation on the arm's own states beside imitation and sparse rewards, and where it must fail."""
    better = quicker = 0
    for seed in range(seeds):
        own = _beginner(seed)
        for _ in range(15):  # 60 rollouts, whose states the teacher is asked about
            step(own, 4, advantage, loss)
        better += success(own.logits) > success(imitating(seed, 61, steps=100).logits)
        moves = steps_to(_beginner(seed), 16, advantage, loss, at=0.9, most=9600)
        rewarded = _beginner(seed)
        quicker += steps_to(rewarded, 16, standardized, clipped(), at=0.9, most=3 * moves) >= 3 * moves
    return [
        at_least(f"of {seeds} arms, better than imitation after as many questions", better, seeds),
        at_least(f"of {seeds} arms, at 0.9 in a third of GRPO's moves", quicker, seeds - 1),
        at_most("success of an arm that never grips, after 20 updates", _walled(advantage, loss), 1e-9),
    ]


def _beginner(seed: int) -> Table:
    """An arm that has seen one demonstration, not for long."""
    return arm(imitating(seed, 1, steps=5).logits.detach(), seed, 0.6)


def _walled(advantage: Callable, loss: Loss) -> float:
    logits = imitating(0, 1).logits.detach().clone()
    logits[_place(*OBJECT), GRIP] = -60.0
    table = arm(logits, 0, 0.6)
    for _ in range(20):
        step(table, 16, advantage, loss)
    return success(table.logits, 0.0)  # a slip may grip
