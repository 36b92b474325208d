"""How good a completion is: verifiers, a user's own function, and the scoring of rollouts with either.

A reward is a plain function that declares by name what it wants to see, and returns one finite number:

    def exact(completion, answer): return completion.strip() == answer
"""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import lookup, prompts
from fuserl.engine.batch import Rollouts

# What a reward function may ask for, in the words of its own parameters.
ARGUMENTS = ("prompt", "completion", "answer", "metadata", "finish")


def answer_in(completion: str, answer: str | None = None) -> str:
    """The answer that a completion gives: inside its last <answer> tags, else its first line.

    Where the reference `answer` has several lines (a grid, a board), or is not known, all of the completion counts.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    text = completion.strip()
    return text if answer is None or "\n" in answer.strip() else text.partition("\n")[0].strip()


def verifier(task: prompts.Task, *, partial_credit: bool = False) -> Callable:
    """The task's own verifier as a reward: 1.0 for a right answer, else 0.0.

    With `partial_credit` it is the verifier's own score between 0 and 1. Those scores give near misses something, and
    often nonsense too (0.01 for any text, one half for `77` where `7` is right): not what accuracy means.

    Raises:
        ValueError: the task has problems without an answer, and no other way to judge them.
    """
    if task.source.unverifiable:
        raise ValueError(
            f"reward: every problem must have an answer to compare with; {task.source.unverifiable}. "
            "Add it, or name a reward with --reward module:function."
        )

    def verified(completion: str, answer: str | None, metadata: dict) -> float:
        score = task.source.score(answer_in(completion, answer), metadata)
        return score if partial_credit else float(score == 1.0)

    return verified


def exact(completion: str, answer: str) -> float:
    """1.0 when the completion's answer is the reference, letter for letter between the ends."""
    return float(answer_in(completion, answer) == answer.strip())


def math_equal(completion: str, answer: str) -> float:
    """1.0 when the completion's answer equals the reference as mathematics (`1/2` and `0.5`), judged by math-verify."""
    math_verify = lookup.package("math_verify", "tasks")
    return float(math_verify.verify(math_verify.parse(answer), math_verify.parse(answer_in(completion, answer))))


BUILT_IN = {"exact": exact, "math_equal": math_equal}


def load(name: str) -> Callable:
    """The reward function `name`: a built-in one, or a user's `module:function`.

    Raises:
        ValueError: no such function, or one that asks for what a reward is not given.
    """
    if ":" not in name and name not in BUILT_IN:
        raise ValueError(
            f"reward: name must be {' or '.join(BUILT_IN)}, or a function of yours as module:function; got {name!r}. "
            f"{lookup.nearest(name, BUILT_IN)}"
        )
    function = BUILT_IN[name] if name in BUILT_IN else lookup.function(name)
    wanted(function)
    return function


def configured(config) -> Callable:
    """The reward of a resolved configuration: the function it names, else its task's verifier."""
    if config.reward:
        return load(config.reward)
    return verifier(prompts.configured(config), partial_credit=config.partial_credit)


def wanted(function: Callable) -> tuple[str, ...]:
    """The names among ARGUMENTS that `function` declares; parameters with a default may have any name.

    Raises:
        ValueError: it requires something else.
    """
    taken = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            return ARGUMENTS
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.name in ARGUMENTS:
            taken.append(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            raise ValueError(
                f"reward: {getattr(function, '__name__', function)} must ask for {', '.join(ARGUMENTS)} only; "
                f"got {parameter.name!r}. Rename that parameter, or give it a default."
            )
    return tuple(taken)


def score(function: Callable, rollouts: Rollouts) -> Tensor:
    """Reward every rollout.

    Args:
        function: called with those of ARGUMENTS that it declares, once per rollout, in order.
        rollouts: B completions and their prompts.

    Returns:
        (B,) float32.

    Raises:
        RuntimeError: the function raised; the message shows the rollout and the cause is the function's own error.
        ValueError: it returned something else than one finite number.
    """
    names, rewards = wanted(function), []
    for number in range(len(rollouts)):
        prompt = rollouts.prompt_of(number)
        offered = {
            "prompt": prompt.text,
            "completion": rollouts.texts[number],
            "answer": prompt.answer,
            "metadata": prompt.metadata,
            "finish": rollouts.finish[number],
        }
        with _naming(rollouts, number):
            reward = function(**{name: offered[name] for name in names})
        if not _finite(reward):
            where = _shown(rollouts, number)
            raise ValueError(f"reward: it must return one finite number; got {reward!r} for {where}.")
        rewards.append(float(reward))
    return torch.tensor(rewards, dtype=torch.float32)


def _finite(reward: object) -> bool:
    # A tensor is no number here: one that is part of a graph or on a device would hide its cost from the loop.
    return isinstance(reward, numbers.Real) and abs(reward) <= torch.finfo(torch.float32).max


class _naming:
    """Turns whatever a reward raises into a RuntimeError that names the rollout."""

    def __init__(self, rollouts: Rollouts, number: int):
        self.rollouts, self.number = rollouts, number

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            raise RuntimeError(
                f"reward: it raised {type(error).__name__}: {error} for {_shown(self.rollouts, self.number)}."
            ) from error


def _shown(rollouts: Rollouts, number: int) -> str:
    prompt = rollouts.prompt_of(number)
    return (
        f"rollout {number} (prompt {_short(prompt.text, end=True)}, completion {_short(rollouts.texts[number])}, "
        f"answer {_short(prompt.answer)})"
    )


def _short(text: str | None, *, end: bool = False, width: int = 80) -> str:
    if text is None or len(text) <= width:
        return repr(text)
    return f"...{text[-width:]!r}" if end else f"{text[:width]!r}..."
