"""Random trees of tokens, in which the optimal policy is known: what r_to_q claims, where it can be enumerated.

A tree has ACTIONS tokens at each of its nodes, `depth` levels, a reward and a reference log-prob for each token. Node
number n of level d is the text whose tokens are n's digits to the base ACTIONS; `first(d) + n` is its row in a table.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.advantages import implicit
from fuserl.engine.batch import Batch
from fuserl.engine.beams import Beams, Inside, best
from fuserl.engine.branches import followed
from fuserl.engine.checks import Figure
from fuserl.engine.scheduling import Rollout
from fuserl.engine.tabular import Table

ACTIONS, DEPTH, BETA, TREES = 4, 5, 0.5, 50
SHARES = {1: 0.82, 2: 0.94, 5: 1.0}  # of trees in which beams of a width find the best text


class Tree(NamedTuple):
    """Rewards and log-probs of tokens (S, ACTIONS) at every node, the root first, in float64."""

    depth: int
    rewards: Tensor
    reference: Tensor
    optimal: Tensor
    value: float  # V* at the root


def first(level: int) -> int:
    """The row of the first node of a level."""
    return (ACTIONS**level - 1) // (ACTIONS - 1)


def tree(seed: int, depth: int = DEPTH) -> Tree:
    """A tree of normal rewards and a reference of normal logits, and the policy that is optimal under them."""
    random = torch.Generator().manual_seed(seed)
    rewards, logits = torch.randn(2, first(depth), ACTIONS, generator=random, dtype=torch.float64)
    reference, optimal = logits.log_softmax(-1), torch.zeros_like(logits)
    values = torch.zeros(ACTIONS**depth, dtype=torch.float64)  # of the states below
    for level in reversed(range(depth)):
        rows = slice(first(level), first(level + 1))
        q = rewards[rows] + BETA * reference[rows] + values.view(-1, ACTIONS)
        values = BETA * (q / BETA).logsumexp(-1)
        optimal[rows] = (q - values[:, None]) / BETA
    return Tree(depth, rewards, reference, optimal, float(values))


def leaves(given: Tree, logprobs: Tensor) -> Batch:
    """Every text of a tree as a rollout with its reward, under the log-probs (S, ACTIONS) of a policy."""
    count = ACTIONS**given.depth
    powers = ACTIONS ** torch.arange(given.depth).flip(0)
    tokens = torch.arange(count)[:, None] // powers % ACTIONS
    states = torch.arange(count)[:, None] // (powers * ACTIONS) + torch.tensor([*map(first, range(given.depth))])
    rewards = given.rewards[states, tokens].sum(1)
    batch = Table(logprobs).given(tokens, states.flatten(), rewards, count)
    return batch.replace(
        old_logprobs=batch.rollout_logprobs, ref_logprobs=given.reference[states.flatten(), batch.tokens]
    )


def implied(given: Tree, logprobs: Tensor) -> Tensor:
    """What a policy implies of each text, (leaves,)."""
    batch = leaves(given, logprobs)
    return batch.rollout_sum(implicit(batch, BETA))


def best_reward(given: Tree) -> int:
    """The text with the largest sum of r + beta log reference."""
    batch = leaves(given, given.reference)
    return int((batch.rewards + BETA * batch.rollout_sum(batch.ref_logprobs)).argmax())


class Reader:
    """Reads the optimal policies of trees, the prompts being their numbers, as `beams.best` wants it."""

    prompts = slots = 2**20

    def __init__(self, trees: list[Tree]):
        self.trees = trees

    def read(self, rollouts: list[Rollout]) -> Tensor:
        """Log-probs (n, ACTIONS) behind each rollout."""
        return torch.stack(
            [self.trees[each.number].optimal[first(len(each.tokens)) + _text(each)] for each in rollouts]
        )

    def fork(self, rollout: Rollout, token: int, logprob: float) -> Rollout:
        """The rollout with one more token, beside it."""
        return followed(rollout, token, logprob)

    def drop(self, text) -> None:
        """Nothing is kept."""


def found_by(trees: list[Tree], width: int) -> list[int]:
    """The text that beams find in each tree."""
    reader = Inside(Reader(trees), contextlib.nullcontext)
    ending = lambda rollout: "length" if len(rollout.tokens) == trees[rollout.number].depth else None  # noqa: E731
    return [_text(kept[0]) for kept in best([reader], [[0]] * len(trees), Beams(width), ending)]


def every_pair(given: Tree) -> tuple[Batch, Tensor]:
    """Every ordered pair of texts, the first one chosen, and how often Bradley and Terry's judge prefers it, (pairs,).

    A text is one token with the log-prob of all its tokens, as losses of pairs read sums; its state is its number.
    """
    texts = leaves(given, given.reference)
    count = len(texts.rewards)
    chosen, rejected = (~torch.eye(count, dtype=torch.bool)).nonzero().unbind(1)
    index = torch.stack([chosen, rejected], 1).flatten()
    table, labels = Table(torch.zeros(count, 1)), torch.tensor([1.0, 0.0]).repeat(len(chosen))
    batch = table.given(torch.zeros_like(index)[:, None], index, labels, 2)
    sums = texts.rollout_sum(texts.ref_logprobs)
    return batch.replace(ref_logprobs=sums[index]), (texts.rewards[chosen] - texts.rewards[rejected]).sigmoid()


def preferred(given: Tree, loss: Callable, steps: int) -> list[Tensor]:
    """Policies (S, ACTIONS) that a loss of pairs trains on infinitely many exact preferences, from the reference on."""
    batch, weights = every_pair(given)
    table, texts = Table(given.reference), leaves(given, given.reference)
    # A node counts for as many texts as go on from it: in these units all move alike.
    below = torch.cat([torch.full((ACTIONS**level,), ACTIONS ** (level - given.depth)) for level in range(given.depth)])
    units, moved = below.double().sqrt()[:, None], torch.zeros_like(given.reference, requires_grad=True)
    settings = dict(max_iter=1, max_eval=50, history_size=50, tolerance_grad=0, tolerance_change=0)
    optimizer = torch.optim.LBFGS([moved], line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        sums = texts.rollout_sum(table.outputs(texts, given.reference + units * moved).logprob)
        each = loss(SimpleNamespace(logprob=sums[batch.extra["state"]]), batch)[0]
        total = len(weights) * (each * weights.repeat_interleave(2)).sum()  # torch's L-BFGS forgets tiny steps
        total.backward()
        return total

    found = [given.reference]
    for _ in range(steps):
        optimizer.step(closure)
        found.append((given.reference + units * moved.detach()).log_softmax(-1))
    return found


def divergence(given: Tree, first_one: Tensor, second: Tensor) -> float:
    """KL(first_one || second) of texts, node by node: what a policy's tokens say, weighed by how often it is there."""
    total, reached = 0.0, torch.ones(1, dtype=torch.float64)
    for level in range(given.depth):
        rows = slice(first(level), first(level + 1))
        here = first_one[rows].exp()
        total += float((reached * (here * (first_one[rows] - second[rows])).sum(-1)).sum())
        reached = (reached[:, None] * here).flatten()
    return total


def figures(preference: Callable, *, depth: int = 3, steps: int = 40) -> list[Figure]:
    """The figures of `fuserl check r_to_q`.

    Args:
        preference: makes the recipe's loss, given beta.
        depth, steps: of the tree and the training for `preferred`.
    """
    trees = [tree(seed) for seed in range(TREES)]
    gaps, agree = [], 0
    for each in trees:
        batch = leaves(each, each.optimal)
        gaps.append((implied(each, each.optimal) - (batch.rewards - each.value)).abs().max())
        agree += int(batch.rollout_sum(batch.old_logprobs).argmax()) == best_reward(each)
    found = [
        Figure("sum of implied rewards apart from reward - V*", float(max(gaps)), 0, 1e-12),
        Figure("trees whose likeliest text has the most reward", agree / TREES, 1, 0.0),
    ]
    for width, share in SHARES.items():
        got = sum(text == best_reward(each) for text, each in zip(found_by(trees, width), trees, strict=True)) / TREES
        # Three standard deviations of the difference of two counts of so many trees, or one tree where there is none.
        spread = max(3 * math.sqrt(2 * share * (1 - share) / TREES), 1 / TREES)
        found.append(Figure(f"trees whose best text beams of {width} find", got, share, spread))
    small = tree(TREES, depth)
    policies = preferred(small, preference(beta=BETA), steps)
    found.append(checks.at_most("KL(optimal || trained)", divergence(small, small.optimal, policies[-1]), 1e-4))
    weights = leaves(small, small.reference)
    weights = weights.rollout_sum(weights.ref_logprobs).exp()
    rewards = [float((weights * implied(small, each)).sum()) for each in policies]
    apart = [got + BETA * divergence(small, small.reference, each) for got, each in zip(rewards, policies, strict=True)]
    return [
        *found,
        Figure("E_ref of implied rewards apart from -beta KL", max(map(abs, apart)), 0, 1e-10),
        Figure("E_ref of implied rewards at the start", rewards[0], 0, 1e-12),
        checks.at_most("largest E_ref of implied rewards afterwards", max(rewards[1:]), -1e-12),
    ]


def _text(rollout: Rollout) -> int:
    """The number of a text among those of its length."""
    number = 0
    for token in rollout.tokens:
        number = ACTIONS * number + token
    return number
