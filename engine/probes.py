"""What two losses make of a policy: their gradients beside each other, without a step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import sharding
from fuserl.engine.batch import Batch, Rollouts, batch_of
from fuserl.engine.losses import Loss


class _Kept:
    """Stands where an optimizer does: its step keeps the gradients and changes nothing."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters, self.gradients = parameters, {}

    def step(self) -> dict[str, Tensor]:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.gradients[name], parameter.grad = parameter.grad, None
        return {}


def gradient(policy, batch: Batch, loss: Loss) -> tuple[dict[str, Tensor], float]:
    """The gradient of a loss in the policy's parameters by name, those with one, and the loss's value; no update.

    Costs one forward and backward of the batch, and the gradients' memory for as long as they are held.
    """
    actor = copy.copy(policy)
    actor.optimizer, actor.seconds = _Kept(policy.optimizer.parameters), {}
    actor.updating = dataclasses.replace(policy.updating, epochs=1, minibatches=1)
    value = actor.update(batch, loss).get("loss", 0.0)
    return actor.optimizer.gradients, value


def alignment(policy, first: tuple[Batch, Loss], second: tuple[Batch, Loss]) -> dict[str, float]:
    """How two losses pull on a policy, each on its own batch: the cosine of their gradients, the ratio of their values.

    Returns:
        "gradient_cosine" and "loss_ratio", first over second; without what is 0 / 0 where one has no gradient.
    """
    (one, value), (two, other) = gradient(policy, *first), gradient(policy, *second)
    product, *squares = (_dot(*pair) for pair in ((one, two), (one, one), (two, two)))
    found = {"gradient_cosine": product / (squares[0] * squares[1]) ** 0.5} if all(squares) else {}
    return found | ({"loss_ratio": value / other} if other else {})


def aligned(draw: Callable, parts: Callable, loss: Loss) -> Callable:
    """The rollout slot `draw`, with the `alignment` of a loss on two parts of what it draws among its statistics.

    Args:
        draw: (policy, prompts) -> Rollouts with scores.
        parts: (Batch) -> two batches with advantages; "loss_ratio" is the second's over the first's.
    """

    def rollout(policy, prompts: list) -> Rollouts:
        rollouts = draw(policy, prompts)
        rewards, facts = rollouts.scores
        first, second = parts(batch_of(rollouts, rewards))
        found = alignment(policy, (second, loss), (first, loss))
        return dataclasses.replace(rollouts, scores=(rewards, facts | found))

    return rollout


def _dot(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    shared = [sharding.whole((one[name].double() * two[name].double()).sum()) for name in one.keys() & two.keys()]
    return float(torch.stack(shared).sum()) if shared else 0.0
