"""Rollouts of each step, with overlap those of the next one drawn while this one's update runs.

    step k         update with rollouts k       |  the weights at its start draw rollouts k + 1 in a thread of its own
    step k + 1     update with rollouts k + 1   |  which are older than the weights by the optimizer steps of step k

That is one-step off-policy (arXiv:2410.18252); the loss corrects it by importance weights, as the decoupled objective
(arXiv:2110.00641) does: `importance`. Nothing depends on how long either side takes, so a seed repeats. Between steps
the next rollouts are whole, and a checkpoint holds them: the weights that drew them are gone.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from concurrent import futures
from dataclasses import dataclass

import torch

from fuserl.engine import ranks
from fuserl.engine.batch import Rollouts
from fuserl.engine.meter import Meter
from fuserl.engine.policy import Policy
from fuserl.engine.prompts import Prompt
from fuserl.engine.recipe import Recipe

RATES = ("_per_s", "_tflops", "_share")  # how metrics of a meter end that are no phase's seconds


@dataclass(frozen=True)
class Drawing:
    """Rollouts in the making."""

    step: int
    count: int  # optimizer steps behind the weights that draw them
    prompts: list[Prompt]  # that the step was given
    result: futures.Future  # of (Rollouts, the policy's calls after them, {name of a metric: number})


class Ahead:
    """Where the loop takes the rollouts of a step from; a context manager that ends the thread.

    Args:
        policy: draws them, from what its `sync` has given to its source; with `overlap` nobody else may draw from it
            between `take` and `wait`.
        recipe: has the slots `prompts` and `rollout`.
        overlap: draw those of the next step in the background.
    """

    def __init__(self, policy: Policy, recipe: Recipe, *, overlap: bool):
        self.policy, self.recipe = policy, recipe
        self._thread = futures.ThreadPoolExecutor(1, "rollouts") if overlap else None
        self._next: Drawing | None = None

    def take(self, step: int) -> tuple[Rollouts, dict[str, float]]:
        """The rollouts of a step, and their `staleness`: optimizer steps since the weights that drew them.

        With overlap those of the next step are being drawn when this returns, from the weights as they are; and what
        was drawn so has `ahead_s`, the seconds that it took, and the rates of that.

        Raises:
            RewardError: and whatever else the recipe's rollout raises, for this step's rollouts only.
        """
        drawn, self._next = self._next, None
        if drawn is None:
            self.policy.sync()
            at, prompts = self.policy.optimizer.count, self.recipe.prompts(step)
            ranks.require_same("prompts", [prompt.text for prompt in prompts])
            rollouts, facts = self.recipe.rollout(self.policy, prompts), {}
        else:
            at = drawn.count
            rollouts, self.policy.calls, facts = drawn.result.result()
        if self._thread is not None:
            self.policy.sync()
            self._next = self._begun(step + 1)
        return rollouts, {"staleness": self.policy.optimizer.count - at, **facts}

    def wait(self) -> None:
        """Wait until the next step's rollouts are drawn, or have failed: time of generation that nothing hides."""
        if self._next is not None:
            with self.policy.meter.phase("generate"):
                futures.wait([self._next.result])

    def waiting(self) -> tuple[int, Rollouts] | None:
        """The next step and its rollouts, waited for; None where there are none, or they failed."""
        self.wait()
        if self._next is None or self._next.result.exception() is not None:
            return None
        return self._next.step, self._next.result.result()[0]

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def state_dict(self) -> dict:
        """The next step's rollouts: tensors, and what JSON holds; empty where there are none."""
        if self.waiting() is None:
            return {}
        drawing = self._next
        rollouts, calls, facts = drawing.result.result()
        prompts = _places(rollouts.prompts, drawing.prompts)
        plain = {"step": drawing.step, "count": drawing.count, "calls": calls, "metrics": facts, "prompts": prompts}
        return {**plain, **_packed(rollouts)}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the rollouts of a `state_dict`; where the settings have changed their prompts, without them."""
        self._next = None
        if not state:
            return
        prompts = self.recipe.prompts(state["step"])
        rollouts = _unpacked(state, prompts)
        if rollouts is None or not all(
            torch.equal(self.policy.encode(prompt.text), tokens)
            for prompt, tokens in zip(rollouts.prompts, rollouts.prompt_tokens, strict=True)
        ):
            print("fuserl: rollouts that were drawn ahead are left out: their prompts have changed", file=sys.stderr)
            return
        result = futures.Future()
        result.set_result((rollouts, state["calls"], state["metrics"]))
        self._next = Drawing(state["step"], state["count"], prompts, result)

    def _begun(self, step: int) -> Drawing:
        # A copy, whose calls and phases are counted apart: model, source and settings are the same objects.
        actor, prompts = copy.copy(self.policy), self.recipe.prompts(step)
        actor.meter = Meter(self.policy.meter.ceiling)

        def draw():
            started = time.perf_counter()
            rollouts = self.recipe.rollout(actor, prompts)
            _places(rollouts.prompts, prompts)  # so that it is now, not at a checkpoint, that it cannot be kept
            seconds = time.perf_counter() - started
            rates = {name: rate for name, rate in actor.meter.row(seconds).items() if name.endswith(RATES)}
            return rollouts, actor.calls, {"ahead_s": seconds, **rates}

        return Drawing(step, self.policy.optimizer.count, prompts, self._thread.submit(draw))


def _places(some: list[Prompt], prompts: list[Prompt]) -> list[int]:
    """Where each of `some` is among `prompts`: what is written of them, as a metadata may be anything."""
    places = {id(prompt): at for at, prompt in enumerate(prompts)}
    if any(id(prompt) not in places for prompt in some):
        raise ValueError(
            "overlap: a recipe's rollouts must be of prompts that it was given; some are of others, which a checkpoint "
            "cannot hold. Leave --overlap out."
        )
    return [places[id(prompt)] for prompt in some]


def _packed(rollouts: Rollouts) -> dict:
    """Rollouts without their prompts, by field: tensors, and what JSON holds."""
    apart = {"prompts", "prompt_tokens", "scores", "facts"}
    found = {each.name: getattr(rollouts, each.name) for each in dataclasses.fields(Rollouts) if each.name not in apart}
    found["prompt_tokens"] = torch.cat(rollouts.prompt_tokens)
    found["prompt_lengths"] = torch.tensor([len(tokens) for tokens in rollouts.prompt_tokens])
    found |= {f"fact_{name}": value for name, value in rollouts.facts.items()}
    if rollouts.scores is not None:
        found["rewards"], found["statistics"] = rollouts.scores
    return found


def _unpacked(state: dict, prompts: list[Prompt]) -> Rollouts | None:
    """What `_packed` was given, of those of `prompts` that it was of; None where there are fewer."""
    if max(state["prompts"]) >= len(prompts):
        return None
    names = {each.name for each in dataclasses.fields(Rollouts)}
    return Rollouts(
        **{
            **{name: value for name, value in state.items() if name in names},
            "prompts": [prompts[at] for at in state["prompts"]],
            "prompt_tokens": list(state["prompt_tokens"].split(state["prompt_lengths"].tolist())),
            "facts": {name.removeprefix("fact_"): x for name, x in state.items() if name.startswith("fact_")},
            "scores": (state["rewards"], state["statistics"]) if "rewards" in state else None,
        }
    )
