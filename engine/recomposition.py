"""Which of a step's rollouts are learnt from at once, and which wait in a buffer for an update of their own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch, Counts, offsets_of
from fuserl.engine.contracts import require
from fuserl.engine.mixtures import only, together

_TOKENS = ("tokens", "rollout_logprobs", "old_logprobs", "advantages", "values", "returns", "place")


def priority(batch: Batch, alpha: float, measure: Tensor) -> Tensor:
    """The shortest share alpha of right rollouts and the longest of wrong ones, (B,) bool; none where a side is empty.

    Args:
        alpha: rounded down to whole rollouts on each side.
        measure: (B,), what counts as length; of equal ones the first.
    """
    chosen, right = torch.zeros(len(batch.group), dtype=torch.bool), batch.rewards >= 1.0
    if right.all() or not right.any():
        return chosen
    for side, sign in ((right, 1), (~right, -1)):
        index = side.nonzero().squeeze(-1)
        order = (sign * measure[index]).argsort(stable=True)
        share = int(round(alpha * len(index), 9))  # 0.29 of 100 is 28.999999999999996
        chosen[index[order[:share]]] = True
    return chosen


class Buffer:
    """Rollouts that wait, the oldest first, with all that a loss needs of them: a recipe's state.

    Memory: their tokens and log-probs on the host, at most those of `capacity` rollouts and of one step.
    """

    def __init__(self):
        self.held: Batch | None = None

    def __len__(self) -> int:
        return 0 if self.held is None else len(self.held.group)

    def add(self, batch: Batch) -> None:
        """Put the rollouts of a batch behind those that wait."""
        batch = batch.replace(extra={}, facts={}, ref_logprobs=None, teacher_prompts=None)
        if len(batch.group):
            self.held = together(*([] if self.held is None else [self.held]), batch)

    def pop(self, count: int, *, step: int) -> Batch:
        """The `count` oldest rollouts, or all where there are fewer, as a batch of this step."""
        taken = torch.arange(len(self)) < count
        found, rest = (together(only(self.held, side)) for side in (taken, ~taken))
        self.held = rest if len(rest.group) else None
        return found.replace(step=step)

    def state_dict(self) -> dict:
        """The tensors of the rollouts, ragged ones end to end with their lengths."""
        held = self.held
        if held is None:
            return {}
        found = {name: getattr(held, name) for name in _TOKENS if getattr(held, name) is not None}
        found |= {"group": held.group, "rewards": held.rewards, "sizes": held.offsets.diff()}
        found |= {"prompts": torch.cat(held.prompt_tokens), "prompt_sizes": _sizes(held.prompt_tokens)}
        if held.completions is not None:
            chunks = [chunk for each in held.completions for chunk in each]
            found |= {"chunks": torch.cat(chunks), "chunk_sizes": _sizes(chunks)}
            found["chunk_counts"] = torch.tensor([len(each) for each in held.completions])
        return found

    def load_state_dict(self, state: dict) -> None:
        """Go on with the rollouts of a `state_dict`."""
        if not state:
            self.held = None
            return
        completions, sizes = None, state["sizes"]
        if "chunks" in state:
            chunks = iter(state["chunks"].split(state["chunk_sizes"].tolist()))
            completions = [[next(chunks) for _ in range(count)] for count in state["chunk_counts"].tolist()]
        prompts = list(state["prompts"].split(state["prompt_sizes"].tolist()))
        self.held = Batch(
            **{name: state[name] for name in _TOKENS if name in state},
            rollout=torch.arange(len(sizes)).repeat_interleave(sizes),
            offsets=offsets_of(sizes),
            group=state["group"],
            rewards=state["rewards"],
            prompt_tokens=prompts,
            completions=completions,
            counts=Counts(len(state["tokens"]), len(sizes), len(prompts)),
        )


def recomposed(
    buffer: Buffer, *, alpha: float, capacity: float, measure: Callable, chance: Callable, credit: Callable | None
) -> Callable:
    """A slot for batches: of a step's rollouts those that have priority, then, when it is time, some that waited.

    Args:
        buffer: takes the rest.
        alpha: as of `priority`.
        capacity: steps' leftovers (1 - alpha of a step's rollouts) that the buffer holds; when full, it must give.
        measure: (Batch) -> (B,), what counts as length.
        chance: (step) -> whether a buffer that has as many rollouts as a step gives them now.
        credit: (Batch) -> advantages of either batch over itself; None leaves those that rollouts have.

    Returns:
        (Batch) -> list of batches, neither of them empty: at most two.
    """
    require("recomposed", "alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
    require("recomposed", "buffer", capacity, 0 <= capacity < math.inf, "a finite number >= 0")

    def batches(batch: Batch) -> list[Batch]:
        chosen, several = priority(batch, alpha, measure(batch)), len(batch.group)
        buffer.add(only(batch, ~chosen))
        found = [only(batch, chosen)] if chosen.any() else []
        full = len(buffer) >= max(1.0, capacity * (1 - alpha) * several)
        if full or (len(buffer) >= several and chance(batch.step)):
            found.append(buffer.pop(several, step=batch.step))
        return found if credit is None else [each.with_advantages(credit(each)) for each in found]

    return batches


def measured(name: str) -> Callable:
    """(Batch) -> (B,): with the name "length" tokens, else the fact of that name."""

    def found(batch: Batch) -> Tensor:
        if name != "length" and name not in batch.facts:
            known = ", ".join(["length", *batch.facts])
            raise ValueError(f"measured: measure must be one of {known}; got {name!r}. Choose what the rollouts have.")
        return batch.lengths if name == "length" else batch.facts[name]

    return found


def by_chance(p_comp: float, p_comp_end: float, *, steps: int, seed: int) -> Callable:
    """(step) -> whether, drawn by the seed with a probability that goes in a line from `p_comp` to `p_comp_end`."""
    for name, value in (("p_comp", p_comp), ("p_comp_end", p_comp_end)):
        require("by_chance", name, value, 0 <= value <= 1, "in [0, 1]")

    def chance(step: int) -> bool:
        now = p_comp + (p_comp_end - p_comp) * (step - 1) / max(1, steps - 1)
        return random.Random(f"{seed} {step}").random() < now

    return chance


def _sizes(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([len(each) for each in tensors], dtype=torch.int64)
