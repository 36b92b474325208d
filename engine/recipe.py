"""An algorithm is data: one plain callable per slot of the one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What a system puts in each slot. State lives in the callables, as visible objects with `state_dict`.

    The loop runs prompts -> rollout -> reward -> advantage -> update with the loss, and knows no recipe by name.
    """

    name: str
    prompts: Callable  # (step) -> list[Prompt]: samplers, curricula; a function of the step, so that runs resume
    rollout: Callable  # (policy, prompts) -> Rollouts: where tokens come from
    reward: Callable  # (Rollouts) -> (B,) float32: verifier, judge, reward model
    advantage: Callable  # (Batch) -> (B,) or (N,): credit; no gradient
    loss: Callable  # (out, Batch) -> (per-token loss, statistics); a losses.Loss: outputs, scope, live(batch)
    critic: Callable | None = None  # value function, when the system has one
