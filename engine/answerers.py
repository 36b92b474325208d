"""Who answers a judge's questions on this machine: a language model, a verifier, a user's function.

What async functions ask in one turn of their event loop is answered together, so that a model decodes a whole batch
and workers share it out although each function asks on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from fuserl.engine import generation, models, prompts, reward_worker, rewards
from fuserl.engine.problems import Problem
from fuserl.engine.prompts import Prompt
from fuserl.engine.reward_pool import Pool
from fuserl.engine.reward_worker import Attempt, Failure, Outcome


class Together:
    """Calls of one turn of an event loop, run as one: `await together(item)`.

    Args:
        run: (items) -> their results, in order.
    """

    def __init__(self, run: Callable[[list], Sequence]):
        self.run = run
        self._waiting: list[tuple[object, asyncio.Future]] = []

    async def __call__(self, item: object) -> object:
        """The result for one item; what `run` raises is raised to everyone whose item it had."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._answer)  # behind all that can ask now
        future = loop.create_future()
        self._waiting.append((item, future))
        return await future

    def _answer(self) -> None:
        asked, self._waiting = [each for each in self._waiting if not each[1].done()], []
        with Attempt({}) as attempt:  # whatever it raises, nobody may wait for ever
            attempt.returned = list(self.run([item for item, _ in asked])) if asked else []
        for number, (_, future) in enumerate(asked):
            if attempt.error is None:
                future.set_result(attempt.returned[number])
            else:
                future.set_exception(attempt.error)


class LocalModel:
    """A language model of this process that answers conversations greedily: `await model(messages)`.

    The weights come at the first question, apart from those that are trained, and stay as they are. An answer does not
    depend on what else is asked.

    Args:
        name: a folder or hub name that transformers understands; None is the built-in SmolLM2-135M-Instruct.
        max_tokens: after which an answer is cut.
        device, dtype: as for `models.load`.

    Raises:
        ValueError: there is no tokenizer at `name`.
    """

    def __init__(self, name: str | None, *, max_tokens: int = 1024, device="cpu", dtype: torch.dtype | None = None):
        self.max_tokens, self.counts = max_tokens, {"calls": 0}
        self._load = functools.cache(functools.partial(models.load, name, device, dtype))
        self._text = _rendering(models.tokenizer(name))
        self._together = Together(self._run)

    async def __call__(self, messages: Sequence[dict]) -> str:
        """What the model answers to a conversation; raises as `generation.generate`."""
        self.counts["calls"] += 1
        return await self._together(self._text(messages))

    def _run(self, texts: list[str]) -> list[str]:
        asked = list(dict.fromkeys(texts))
        model, tokenizer = self._load()
        answers = generation.generate(
            model, tokenizer, [Prompt(text) for text in asked], max_new_tokens=self.max_tokens, temperature=0.0
        ).texts
        found = dict(zip(asked, answers, strict=True))
        return [found[text] for text in texts]


class Rule:
    """A reward of single completions as a judge of them, in workers with a time limit: `await rule(arguments)`.

    Args:
        function: declares what it wants to see, as rewards do, and returns a number; what it is not between 0 and 1 is
            cut off.
        workers, timeout: as for `rewards.Scorer`; a call that takes longer is worth 0.

    Raises:
        ValueError: it wants to see a whole group, or what no reward is given, or cannot be sent to a worker.
    """

    def __init__(self, function: Callable, *, workers: int = 0, timeout: float = 30.0):
        self.function, self.names, self.timeout = function, rewards.wanted(function), timeout
        self.counts = {"calls": 0, "timeouts": 0}
        if "completions" in self.names:
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(f"judge: {name} must judge one completion; it asks for completions. Ask for completion.")
        self._asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        self._pool = None
        if workers:
            self._pool = Pool(function, workers=workers, timeout=timeout, asynchronous=self._asynchronous)
        self._together = Together(self._run)
        reward_worker.prepare(function)

    async def __call__(self, arguments: dict) -> float:
        """The function's number for one completion, between 0 and 1.

        Args:
            arguments: those of `rewards.SINGLE`, by name.

        Raises:
            RuntimeError: the function raised, returned something else than a finite number, or ended its worker.
        """
        self.counts["calls"] += 1
        asked = {name: arguments[name] for name in self.names}
        if self._pool is None and self._asynchronous:
            outcome = await reward_worker.awaited(self.function, asked, self.timeout)
        else:
            outcome = await self._together(asked)
        if isinstance(outcome, Failure):
            raise RuntimeError(f"judge: {outcome.says}.") from outcome.cause
        self.counts["timeouts"] += outcome is None
        return 0.0 if outcome is None else min(max(outcome[0], 0.0), 1.0)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()

    def _run(self, calls: list[dict]) -> list[Outcome]:
        if self._pool is None:
            return [reward_worker.attempted(self.function, arguments) for arguments in calls]
        found: dict[int | None, Outcome] = {}
        with contextlib.closing(self._pool.outcomes(calls)) as outcomes:
            for number, outcome in outcomes:
                if number is None:  # no worker starts
                    return [outcome] * len(calls)
                found[number] = outcome
        return [found[number] for number in range(len(calls))]


async def written(function: Callable, messages: Sequence[dict]) -> str:
    """What a user's function of `messages`, which may be async, answers to a conversation.

    Raises:
        ValueError: it is no text.
    """
    said = function(messages=list(messages))
    said = await said if inspect.isawaitable(said) else said
    if not isinstance(said, str):
        raise ValueError(f"judge: a function of messages must return a text; got {said!r}. Correct it there.")
    return said


def waited(coroutine: Coroutine) -> object:
    """What a coroutine returns, for a caller that cannot await it; within a running loop a thread has its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _rendering(tokenizer) -> Callable[[Sequence[dict]], str]:
    """How a conversation is written for a model: by its chat template, or without one as its turns' texts."""
    if not getattr(tokenizer, "chat_template", None):
        return lambda messages: "\n\n".join(each["content"] for each in messages) + "\n"
    render = prompts.chat(tokenizer)
    return lambda messages: render(None, (), Problem("", turns=tuple(messages), place="judge"))
