"""Calling a reward and checking what it returns, here or in a worker process, where this module is all that runs.

It imports neither torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import math
import numbers
import os
import pickle
import reprlib
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from fuserl.engine import wording

CONCURRENT = 64  # calls of an async reward in flight at once, in one process
_LARGEST = 3.4028234663852886e38  # of float32
_WIDTH = 200  # letters of an error's own words, or of a value, that are shown
_TRACED = 20_000  # letters of its traceback

serving = False  # whether this process is a worker


@dataclass(frozen=True)
class Failure:
    """Why a call gave no rewards.

    Args:
        says: one line, to be followed by `for rollout 3`.
        member: which completion of a group, when it is one.
        trace: the traceback of what the function raised.
        cause: that error itself, where it was raised in this process.
    """

    says: str
    member: int | None = None
    trace: str = ""
    cause: BaseException | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "cause": None}  # an error need not survive pickling, nor its class be known over there


class Scores(list):
    """The rewards of one call, floats, and what the function says of each besides: `facts`, name -> as many floats."""

    def __init__(self, rewards: Sequence[float] = (), facts: dict[str, list[float]] | None = None):
        super().__init__(rewards)
        self.facts = facts or {}


Outcome = Scores | Failure | None  # of one call: its rewards, why there are none, or None when its time ran out


class Attempt:
    """Holds what its body raises, an interrupt excepted: a reward that calls `exit()` must not end the run in silence.

    Args:
        arguments: of the call made in the body, which puts what comes back in `returned`.
    """

    def __init__(self, arguments: dict):
        self.arguments, self.returned, self.error = arguments, None, None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self.error = error
        return not isinstance(error, KeyboardInterrupt)

    def outcome(self) -> Scores | Failure:
        """The rewards returned, checked, or the failure."""
        if self.error is None:
            return checked(self.returned, self.arguments.get("completions"))
        trace = "".join(traceback.format_exception(self.error))[-_TRACED:]
        return Failure(f"it raised {one_line(self.error)}{wording.place(self.error)}", trace=trace, cause=self.error)


def attempted(function: Callable, arguments: dict) -> Scores | Failure:
    """Call a reward and check what it returns."""
    with Attempt(arguments) as attempt:
        attempt.returned = function(**arguments)
    return attempt.outcome()


async def awaited(function: Callable, arguments: dict, limit: float | None) -> Outcome:
    """Call an async reward, for `limit` seconds at most, and check what it returns."""
    import asyncio

    with Attempt(arguments) as attempt:
        async with asyncio.timeout(limit) as scope:
            attempt.returned = await function(**arguments)
    return None if scope.expired() else attempt.outcome()


def checked(returned: object, completions: Sequence[str] | None = None) -> Scores | Failure:
    """What a reward returned, as floats: one, or one for each of a group's `completions`, with their facts.

    Booleans and numpy's scalars are numbers. A tensor is none: one that is part of a graph or on a device would hide
    its cost from the loop. In the place of a number may stand a dict of numbers: "reward", and facts under other names.
    """
    if completions is None:
        values = [returned]
    else:
        numpy = sys.modules.get("numpy")
        values = returned.tolist() if numpy is not None and isinstance(returned, numpy.ndarray) else returned
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            got = f"{len(values)} of them" if isinstance(values, list | tuple) else _shown(returned)
            return Failure(f"it must return a list of {len(completions)} numbers, one per completion; got {got}")
    rewards, facts = [], {}
    for member, value in enumerate(values):
        named = value if isinstance(value, dict) else {"reward": value}
        named_well = "reward" in named and all(isinstance(name, str) for name in named)
        if not named_well or not all(map(_finite, named.values())):
            wanted = "one finite number" if completions is None else "finite numbers"
            lacks = "" if "reward" in named else ', a dict without "reward"'
            says = f"it must return {wanted}; got {_shown(value)}{lacks}"
            return Failure(says, None if completions is None else member)
        rewards.append(float(named["reward"]))
        for name in named.keys() - {"reward"}:
            facts.setdefault(name, [math.nan] * len(values))[member] = float(named[name])
    return Scores(rewards, facts)


def one_line(error: BaseException) -> str:
    """The name and the words of an error, however many lines they have, as one."""
    words = error.msg if isinstance(error, SyntaxError) else str(error)  # whose text repeats the place
    return f"{type(error).__name__}: {_cut(words)}".removesuffix(": ")


def prepare(function: Callable) -> None:
    """Call the reward's own `prepare`, where it has one: what must be there before the first completion is scored."""
    getattr(function, "prepare", lambda: None)()


def serve(descriptor: int, life: int) -> None:
    """Run a worker: receive the function, then batches of calls, and send every outcome as soon as it is there.

    Args:
        descriptor: of the connection to the parent.
        life: of a pipe of this worker's own that the parent holds; this process is killed when the parent's end closes.
    """
    global serving
    serving = True
    del sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a traceback
    _end_with(life)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # a worker that is killed has said what it had to say
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        payload, asynchronous, limit = connection.recv()
        with Attempt({}) as attempt:
            function = pickle.loads(payload)
            prepare(function)
        if attempt.error is not None:
            failure = attempt.outcome()
            connection.send(replace(failure, says=f"a worker process must be able to import it; {failure.says}"))
            return
        connection.send(None)
        if asynchronous:
            import asyncio

            asyncio.run(_together(connection, function, limit))
        else:
            _one_by_one(connection, function)


def _one_by_one(connection: Connection, function: Callable) -> None:
    while True:
        for number, arguments in connection.recv():
            connection.send((number, attempted(function, arguments)))


async def _together(connection: Connection, function: Callable, limit: float) -> None:
    import asyncio

    loop, tasks = asyncio.get_running_loop(), set()
    closed = loop.create_future()

    async def answer(number: int, arguments: dict) -> None:
        connection.send((number, await awaited(function, arguments, limit)))

    def receive() -> None:
        try:
            calls = connection.recv()
        except (EOFError, ConnectionError):
            loop.remove_reader(connection.fileno())
            closed.set_result(None)
            return
        for number, arguments in calls:
            task = loop.create_task(answer(number, arguments))
            tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(tasks.discard)

    loop.add_reader(connection.fileno(), receive)
    await closed


def _end_with(life: int) -> None:
    # The kernel delivers this signal, so it also ends a function that never comes back to the interpreter (a regular
    # expression that backtracks for hours), and the programs that it started. PR_SET_PDEATHSIG would do so as soon as
    # the thread of the parent that started the worker ends.
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([life], [], [], 0)[0]:  # closed before anybody asked for the signal
        os.killpg(0, signal.SIGKILL)


def _finite(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    if not isinstance(value, numbers.Real) and not (numpy is not None and isinstance(value, numpy.bool_)):
        return False
    try:
        return abs(float(value)) <= _LARGEST
    except OverflowError:
        return False


def _shown(value: object) -> str:
    short = reprlib.Repr()
    short.maxother = short.maxstring = short.maxlong = _WIDTH
    return _cut(short.repr(value))


def _cut(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _WIDTH else f"{words[:_WIDTH]}..."
