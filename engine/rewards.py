"""How good a completion is: the task's verifier or a user's own function, and the scoring of rollouts with either.

A reward is a plain function that declares by name what it wants to see, and returns one finite number; or, where it
declares the plural `completions`, looks at all completions of a prompt at once and returns a list of numbers:

    def exact(completion, answer): return completion.strip() == answer
    def shortest(completions): return [len(text) == min(map(len, completions)) for text in completions]

In the place of a number may stand a dict of numbers, "reward" among them; the others become facts of the rollout, which
advantages and losses find in `batch.facts` and the metrics as means:

    def told(completion, answer): return {"reward": completion == answer, "words": len(completion.split())}

Either may be `async def`: calls then wait for each other's network instead of in line.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine import blends, lookup, problems, prompts, ranks, reward_worker, wording
from fuserl.engine.batch import Rollouts
from fuserl.engine.reward_pool import Pool
from fuserl.engine.reward_worker import Failure, Outcome, Scores
from fuserl.engine.verifiers import ByTask, Verifier, exact, math_equal

# What a reward function may ask for, in the words of its own parameters.
SINGLE = ("prompt", "completion", "answer", "metadata", "finish")
GROUP = ("prompt", "completions", "answer", "metadata", "finishes")

BUILT_IN = {"exact": exact, "math_equal": math_equal}


class RewardError(RuntimeError):
    """A reward that failed, with the `rollouts` and what is known of their `rewards`, (B,) float32, NaN elsewhere."""

    def __init__(self, message: str, rollouts: Rollouts, rewards: Tensor):
        super().__init__(message)
        self.rollouts, self.rewards = rollouts, rewards


class WorkerTraceback(RuntimeError):
    """The traceback of an error in a worker process, as text: the cause of a RewardError."""


class Scorer:
    """Scores rollouts with a reward function, in this process or in a pool of workers: `scorer(rollouts)`.

    The workers start at the first call, stay for the next, and end with `close()`, a `with` block, or this process.

    Args:
        function: called with those of SINGLE or GROUP that it declares, once a rollout or once a group.
        workers: processes to call it in; 0 calls it here, in order and without a time limit.
        timeout: seconds that a call in a worker may take before it is stopped and its reward is 0.

    Raises:
        ValueError: the function requires other arguments, or cannot be sent to a worker; a bad number.
    """

    def __init__(self, function: Callable, *, workers: int = 0, timeout: float = 10.0):
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"reward: workers must be an integer >= 0; got {workers!r}. 0 scores in this process.")
        if not 0 < timeout < math.inf:
            raise ValueError(
                f"reward: timeout must be a number of seconds > 0; got {timeout!r}. Without limit is workers=0."
            )
        self.function, self.names, self.timeout = function, wanted(function), timeout
        self.asynchronous = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        self._pool = self._runner = None
        if workers:
            self._pool = Pool(function, workers=workers, timeout=timeout, asynchronous=self.asynchronous)
        elif self.asynchronous:
            self._runner = asyncio.Runner()  # one loop for all calls: a session that the function keeps belongs to it
        _prepare(function)

    def __call__(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, int | Tensor]]:
        """Reward every rollout.

        Args:
            rollouts: B completions and their prompts.

        Returns:
            (B,) float32, in the order of the rollouts whatever ended first, and {"timeouts": rollouts stopped}, the
            first of which is named on standard error, with the function's facts by name, (B,) float32 each, NaN where
            it said none.

        Raises:
            RewardError: the function raised, returned something else than finite numbers, or took its worker down; the
                message names the rollout, and the cause is the function's own error.
        """
        calls, known = list(_calls(rollouts, self.names)), {"reward": [math.nan] * len(rollouts)}
        timeouts, failure, at = self._score(rollouts, calls, known)
        told = ranks.everyones([known, timeouts, failure and [failure.says, failure.member, failure.trace, at]])
        rewards, facts = _together_of([each[0] for each in told])
        teller = next((number for number, each in enumerate(told) if each[2]), None)
        if teller is not None:
            *said, at = told[teller][2]
            failure = failure if teller == ranks.rank() else Failure(*said)
            raise _error(failure, None if at is None else calls[at], rollouts, rewards)
        return rewards, {"timeouts": sum(each[1] for each in told), **facts}

    def _score(
        self, rollouts: Rollouts, calls: list[_Call], known: dict[str, list[float]]
    ) -> tuple[int, Failure | None, int | None]:
        """Fill in the rewards, and facts, of this rank's share of the calls.

        Returns:
            Rollouts stopped, the failure that ended it if one did, and the number of the call that failed if one did.
        """
        timeouts, own = 0, ranks.share(len(calls))
        with contextlib.closing(self._outcomes([calls[number].arguments for number in own])) as outcomes:
            for number, outcome in outcomes:
                at = None if number is None else own[number]
                if isinstance(outcome, Failure):
                    return timeouts, outcome, at
                members = calls[at].members
                if outcome is None:
                    if not timeouts:  # one of them is enough to look at; how many there are is counted
                        said = f"it was stopped after {self.timeout:g} s for {_shown(rollouts, calls[at], None)}"
                        print(f"fuserl: reward: {said}; its reward is 0", file=sys.stderr, flush=True)
                    timeouts += len(members)
                outcome = Scores([0.0] * len(members)) if outcome is None else outcome
                for name, each in {"reward": outcome, **outcome.facts}.items():
                    column = known.setdefault(name, [math.nan] * len(rollouts))
                    for member, number in zip(members, each, strict=True):
                        column[member] = number
        return timeouts, None, None

    def start(self) -> None:
        """Start the workers now, to be ready at the first call; without waiting."""
        if self._pool:
            self._pool.start()

    def close(self) -> None:
        """End the workers; the scorer cannot be called again."""
        for each in (self._pool, self._runner):
            if each:
                each.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _outcomes(self, calls: list[dict]) -> Iterator[tuple[int | None, Outcome]]:
        if self._pool:
            yield from self._pool.outcomes(calls)
        elif self.asynchronous:
            outcomes = enumerate(self._run(calls))
            yield from sorted(outcomes, key=lambda each: isinstance(each[1], Failure))  # what is known comes first
        else:
            for number, arguments in enumerate(calls):
                yield number, reward_worker.attempted(self.function, arguments)

    def _run(self, calls: list[dict]) -> list[Outcome]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._runner.run(_together(self.function, calls))
        raise RuntimeError(
            "reward: an async function must have a worker inside an event loop (a notebook). Use workers=1."
        )


def scorer(config, *, required: bool = True) -> Scorer | None:
    """The scorer of a resolved configuration: the reward that it names, else its task's verifier.

    None where the task has no verifier and a reward is not `required`: completions that are given need none.
    """
    if not (required or config.reward) and prompts.configured(config).source.unverifiable:
        return None
    return Scorer(configured(config), workers=-(-config.reward_workers // ranks.world()), timeout=config.reward_timeout)


def feedback(scorer: Callable, rollouts: Rollouts) -> list[str | None]:
    """What a scorer's function says of each completion in words: its `feedback`, a function with the same arguments.

    None where it says nothing, or has none to say it with: `def reward(completion): ...; reward.feedback = explain`.
    """
    function = getattr(getattr(scorer, "function", None), "feedback", None)
    if function is None:
        return [None] * len(rollouts)
    names = wanted(function)
    if "completions" in names:
        raise ValueError("reward: feedback must be about one completion; it asks for completions. Declare completion.")
    return [function(**call.arguments) or None for call in _calls(rollouts, names)]


def score(function: Callable, rollouts: Rollouts) -> Tensor:
    """Reward every rollout in this process, (B,) float32."""
    with Scorer(function) as scored:
        return scored(rollouts)[0]


def rehearse(reward: Callable | None, task: prompts.Task) -> None:
    """Call a reward on two made-up completions of a problem, its answer and nothing, before a model costs any time.

    Raises:
        ValueError: it fails, as it would on what the model writes.
    """
    problem = next(iter([*task.held[:1], *task.source.sample()]), None)
    if reward is None or problem is None:
        return
    prompt, none = task.prompt(problem), torch.zeros(0, dtype=torch.int64)
    try:
        reward(
            Rollouts(
                prompts=[prompt],
                prompt_tokens=[none],
                group=torch.zeros(2, dtype=torch.int64),
                tokens=none,
                offsets=torch.zeros(3, dtype=torch.int64),
                rollout_logprobs=torch.zeros(0),
                texts=[prompt.answer or "", ""],
                finish=["stop", "length"],
            )
        )
    except RewardError as error:
        raise ValueError(f"{error} It was called on trial, before the model is loaded.") from error


def configured(config) -> Callable:
    """The reward function of a resolved configuration."""
    if config.reward:
        return load(config.reward)
    return verifier(prompts.configured(config), partial_credit=config.partial_credit)


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


def verifier(task: prompts.Task, *, partial_credit: bool = False) -> Callable:
    """The task's own verifier as a reward: 1.0 for a right answer, else 0.0; `exact` for a user's rows.

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
    if isinstance(task.source, blends.Blend):
        each = {name: verifier(part, partial_credit=partial_credit) for name, part in task.source.by_name.items()}
        return ByTask({name: (function, wanted(function)) for name, function in each.items()})
    if isinstance(task.source, problems.Generated):
        return Verifier(task.name.partition(":")[2], partial_credit, task.source)
    return getattr(task.source, "judge", exact)


def wanted(function: Callable) -> tuple[str, ...]:
    """The names among SINGLE or GROUP that `function` declares; parameters with a default may have any name.

    Raises:
        ValueError: it requires something else.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward: {name} must be a function that declares its arguments; {error}.") from error
    offered, taken = GROUP if "completions" in parameters else SINGLE, []
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            return offered
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.name in offered:
            taken.append(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            raise ValueError(
                f"reward: {name} must ask for {', '.join(offered)} only; got {parameter.name!r}. "
                "Rename that parameter, or give it a default."
            )
    return tuple(taken)


def _prepare(function: Callable) -> None:
    with reward_worker.Attempt({}) as attempt:
        reward_worker.prepare(function)
    if isinstance(attempt.error, RuntimeError):
        raise attempt.error  # a package is missing, say
    if attempt.error is not None:
        says = f"{reward_worker.one_line(attempt.error)}{wording.place(attempt.error)}"
        raise ValueError(f"reward: its prepare must run; it raised {says}. Correct it there.") from attempt.error


@dataclass(frozen=True)
class _Call:
    members: list[int]  # the rollouts that it rewards
    arguments: dict


def _calls(rollouts: Rollouts, names: tuple[str, ...]) -> Iterator[_Call]:
    """One call of the function per rollout, or per group where it asks for `completions`."""
    if "completions" in names:
        groups: dict[int, list[int]] = {}
        for number, group in enumerate(rollouts.group.tolist()):
            groups.setdefault(group, []).append(number)
    else:
        groups = {number: [number] for number in range(len(rollouts))}
    for members in groups.values():
        prompt = rollouts.prompt_of(members[0])
        offered = {
            "prompt": prompt.text,
            "answer": prompt.answer,
            "metadata": prompt.metadata,
            "completion": rollouts.texts[members[0]],
            "finish": rollouts.finish[members[0]],
            "completions": [rollouts.texts[member] for member in members],
            "finishes": [rollouts.finish[member] for member in members],
        }
        yield _Call(members, {name: offered[name] for name in names})


async def _together(function: Callable, calls: list[dict]) -> list[Outcome]:
    room = asyncio.Semaphore(reward_worker.CONCURRENT)

    async def one(arguments: dict) -> Outcome:
        async with room:
            return await reward_worker.awaited(function, arguments, None)

    return await asyncio.gather(*map(one, calls))


def _together_of(tables: list[dict[str, list[float]]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The rewards (B,) float32, and the facts, of what each rank knows by name; NaN where none of them does."""
    found, size = {}, len(tables[0]["reward"])
    for name in dict.fromkeys(name for table in tables for name in table):
        table = torch.tensor([each.get(name, [math.nan] * size) for each in tables], dtype=torch.float64)
        found[name] = torch.where(table.isnan().all(0), torch.nan, table.nansum(0)).float()
    return found.pop("reward"), found


def _error(failure: Failure, call: _Call | None, rollouts: Rollouts, rewards: Tensor) -> RewardError:
    where = "" if call is None else f" for {_shown(rollouts, call, failure.member)}"
    error = RewardError(f"reward: {failure.says}{where}.", rollouts, rewards)
    error.__cause__ = failure.cause or (WorkerTraceback(failure.trace) if failure.trace else None)
    return error


def _shown(rollouts: Rollouts, call: _Call, member: int | None) -> str:
    number = call.members[member or 0]
    whole = f" and {len(call.members) - 1} more of its group" if member is None and len(call.members) > 1 else ""
    prompt = rollouts.prompt_of(number)
    completion, answer = _short(rollouts.texts[number]), _short(prompt.answer)
    return f"rollout {number}{whole} (prompt {_short(prompt.text, end=True)}, completion {completion}, answer {answer})"


def _short(text: str | None, *, end: bool = False, width: int = 80) -> str:
    if text is None or len(text) <= width:
        return repr(text)
    return f"...{text[-width:]!r}" if end else f"{text[:width]!r}..."
