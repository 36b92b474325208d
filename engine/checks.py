"""What a recipe's `show` compares: gradients of losses on a small batch, without a model. `fuserl check RECIPE`.

The gradient is taken with respect to the log-probs themselves, so two objectives agree exactly when these do,
whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine.batch import Batch, Counts
from fuserl.engine.losses import Loss

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Figure:
    """One checked number."""

    what: str
    got: float
    expected: float
    tolerance: float = 16 * EPS  # relative to the expected one where that is above 1
    bound: str = "="  # or ">=", "<=": what came may be on that side of the expected one as far as it likes

    @property
    def holds(self) -> bool:
        """Whether what came is what was expected."""
        beyond = self.got - self.expected
        apart = {"=": abs(beyond), ">=": -beyond, "<=": beyond}[self.bound]
        return apart <= self.tolerance * max(abs(self.expected), 1.0)

    def __str__(self) -> str:
        side = "" if self.bound == "=" else f"{self.bound} "
        return f"{self.what}: {self.got:.6g} (expected {side}{self.expected:.6g})"


def at_least(what: str, got: float, least: float) -> Figure:
    """A figure that must not fall below one."""
    return Figure(what, got, least, 0.0, ">=")


def at_most(what: str, got: float, most: float) -> Figure:
    """A figure that must not rise above one."""
    return Figure(what, got, most, 0.0, "<=")


def example(lengths: Sequence[int] = (3, 5, 2, 4), group_size: int = 2, *, seed: int = 0, off: float = 0.0) -> Batch:
    """A batch of rollouts of these lengths with rewards of 0 and 1, mixed in every group.

    Args:
        lengths: tokens of each rollout.
        group_size: consecutive rollouts of one prompt.
        seed: of every random number.
        off: standard deviation of the log-ratio to the old log-probs; 0 leaves them out: the update is on-policy.
    """
    random = torch.Generator().manual_seed(seed)
    count, rollouts = sum(lengths), len(lengths)
    logprobs = -torch.rand(count, generator=random) - 0.1
    sizes = torch.tensor(lengths)
    group = torch.arange(rollouts) // group_size
    return Batch(
        tokens=torch.zeros(count, dtype=torch.int64),
        rollout=torch.arange(rollouts).repeat_interleave(sizes),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        group=group,
        rewards=(torch.arange(rollouts) % group_size == 0).float(),
        rollout_logprobs=logprobs,
        counts=Counts(count, rollouts, int(group[-1]) + 1),
        prompt_tokens=[torch.zeros(1, dtype=torch.int64)] * (int(group[-1]) + 1),
        old_logprobs=logprobs - off * torch.randn(count, generator=random) if off else None,
        ref_logprobs=-torch.rand(count, generator=random) - 0.1,
    )


def credited(batch: Batch, advantage: Callable) -> Batch:
    """The batch with the advantages that a recipe's slot gives it."""
    given = advantage(batch)
    return batch.with_advantages(given) if isinstance(given, Tensor) else given


def gradient(batch: Batch, loss: Loss) -> Tensor:
    """d loss / d logprob, (N,), at the batch's own log-probs and values 0."""
    logprob = batch.rollout_logprobs.clone().requires_grad_()
    return torch.autograd.grad(_loss(batch, loss, logprob), logprob)[0]


def value(batch: Batch, loss: Loss) -> float:
    """The loss of a batch at its own log-probs and values 0."""
    return float(_loss(batch, loss, batch.rollout_logprobs))


def apart(first: Tensor, second: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest number of the second."""
    return float((first - second).abs().max() / second.abs().max())


def _loss(batch: Batch, loss: Loss, logprob: Tensor) -> Tensor:
    zeros = torch.zeros_like(batch.rollout_logprobs)
    return loss(SimpleNamespace(logprob=logprob, value=zeros, score=zeros, entropy=zeros), batch)[0].sum()
