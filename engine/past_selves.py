"""A policy's own past, kept to play against: weights of earlier steps, in the place of the present ones for a while."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from fuserl.engine import sharding
from fuserl.engine.contracts import require
from fuserl.engine.problems import far_seed


class PastSelves:
    """The trained weights of up to `most` earlier steps, on the host.

    Memory: `most` times what is trained: little with adapters, whole models without.

    Args:
        most: how many are kept, the newest; 0 keeps none.
        every: steps between two of them.
        seed: of whom is drawn.
    """

    def __init__(self, *, most: int, every: int, seed: int):
        require("PastSelves", "most", most, most >= 0, "an integer >= 0")
        require("PastSelves", "every", every, every >= 1, "an integer >= 1")
        self.most, self.every, self.seed = most, every, seed
        self.weights: dict[int, dict[str, Tensor]] = {}  # by the step that they began

    def drawn(self, step: int) -> int | None:
        """Whom a step plays against: one of those kept, or None where there are none; a function of the step."""
        return random.Random(far_seed(self.seed, step)).choice(sorted(self.weights)) if self.weights else None

    def keep(self, policy, step: int) -> None:
        """Keep the policy as it is when this step begins, where one is due."""
        if self.most and (step - 1) % self.every == 0:
            self.weights[step] = weights(policy)
            for old in sorted(self.weights)[: -self.most]:
                del self.weights[old]

    def state_dict(self) -> dict[str, Tensor]:
        """All weights kept, by step and name."""
        return {f"{step}/{name}": x for step, each in self.weights.items() for name, x in each.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with those of a `state_dict`."""
        self.weights = {}
        for key, value in state.items():
            step, _, name = key.partition("/")
            self.weights.setdefault(int(step), {})[name] = value.clone()


def weights(policy) -> dict[str, Tensor]:
    """A copy of what a policy trains, by name, whole and on the host; every rank must ask for it."""
    return {name: sharding.whole(x.detach()).to("cpu", copy=True) for name, x in policy.parameters().items()}


@contextlib.contextmanager
def speaking(policy, others: dict[str, Tensor]) -> Iterator[None]:
    """The policy completes prompts with other weights; its own come back bit for bit."""
    now = weights(policy)
    try:
        _put(policy, others)
        yield
    finally:
        _put(policy, now)


@torch.no_grad()
def _put(policy, values: dict[str, Tensor]) -> None:
    for name, parameter in policy.parameters().items():
        sharding.assign(parameter, values[name].to(parameter.device))
    if policy.source.apart:
        policy.source.sync()
