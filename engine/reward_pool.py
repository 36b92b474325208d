"""Worker processes that score completions side by side, each call within its time limit.

A worker is a fresh interpreter in a process group of its own. Unlike a process of `multiprocessing` it does not run the
parent's main module again: a training script needs no `if __name__ == "__main__"`, and its imports are not paid twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import pickletools
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from fuserl.engine import reward_worker
from fuserl.engine.reward_worker import CONCURRENT, Failure, Outcome

_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from fuserl.engine.reward_worker import serve; "
    "serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_BATCH = 0.005  # seconds of cheap calls handed to a worker at once, so that messages do not outweigh them
_GRACE = 1.0  # seconds that an async worker has to report a time-out by itself


class Pool:
    """Workers that call `function`; they start at the first use, stay, and end with this process at the latest.

    Args:
        function: a reward that another process can import.
        workers: how many processes.
        timeout: seconds that each call may take; the start of a worker counts against none.
        asynchronous: `function` is a coroutine function, of which a worker runs up to CONCURRENT calls at once.

    Raises:
        ValueError: `function` cannot be sent to another process.
        RuntimeError: this is a worker already.
    """

    def __init__(self, function: Callable, *, workers: int, timeout: float, asynchronous: bool = False):
        if reward_worker.serving:
            raise RuntimeError(
                "reward: importing its module must not score anything; it does, in a worker process. Put what runs "
                'when the file is started under if __name__ == "__main__".'
            )
        self._setup = (_portable(function), asynchronous, timeout)
        self._count, self._asynchronous = workers, asynchronous
        self._limit = timeout + (_GRACE if asynchronous else 0.0)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _close, self._workers, self._selector)

    def start(self) -> None:
        """Start the workers that are not there, without waiting for them to be ready.

        Raises:
            RuntimeError: the pool is closed.
        """
        if not self.close.alive:
            raise RuntimeError("reward: a scorer must be open to be used; it was closed. Make another.")
        while len(self._workers) < self._count:
            worker = _Worker(self._setup)
            self._workers.append(worker)
            self._selector.register(worker.connection, selectors.EVENT_READ, worker)

    def outcomes(self, calls: Sequence[dict]) -> Iterator[tuple[int | None, Outcome]]:
        """Call the function with each of `calls`, its named arguments; yield (number, outcome) as they end.

        A call past its time limit has the outcome None, and its worker is replaced. Where no call can be blamed for a
        failure (a worker does not start) the number is None. Closing the iterator early stops the calls that run.
        """
        left, todo = len(calls), deque(range(len(calls)))
        try:
            while left:
                self.start()
                self._hand_out(calls, todo)
                for number, outcome in self._events(todo):
                    left -= 1
                    yield number, outcome
        finally:
            for worker in [each for each in self._workers if each.running]:
                self._drop(worker)

    def _hand_out(self, calls: Sequence[dict], todo: deque[int]) -> None:
        for worker in sorted(self._workers, key=lambda each: len(each.running)):
            if not todo or not worker.ready:
                continue
            share = -(-len(todo) // self._count)
            if self._asynchronous:
                room = min(CONCURRENT - len(worker.running), share)
            else:  # half of an even share leaves something to even out with
                room = 0 if worker.running else max(1, min(int(_BATCH / worker.pace), share // 2))
            numbers = [todo.popleft() for _ in range(min(room, len(todo)))]
            if numbers and not worker.give(calls, numbers):
                todo.extendleft(reversed(numbers))

    def _events(self, todo: deque[int]) -> Iterator[tuple[int | None, Outcome]]:
        """Wait for what happens next: answers, the ends of workers, and calls whose time is over."""
        clocks = [worker.clock for worker in self._workers if worker.running]
        patience = max(0.0, min(clocks) + self._limit - time.monotonic()) if clocks else None
        for key, _ in self._selector.select(patience):
            worker = key.data
            try:
                message = worker.connection.recv()
            except (EOFError, ConnectionError):
                yield from self._ended(worker)
                continue
            if worker.ready:
                worker.answered(message[0], one_by_one=not self._asynchronous)
                yield message
            elif message is None:
                worker.ready = True
            else:
                self._drop(worker)
                yield None, message
        now = time.monotonic()
        for worker in [each for each in self._workers if each.running and each.clock + self._limit <= now]:
            if worker.connection.poll():
                continue  # it has answered in the meantime
            late = [number for number, clock in worker.running.items() if clock + self._limit <= now]
            late = late if self._asynchronous else late[:1]  # the others wait behind the first
            todo.extendleft(reversed([number for number in worker.running if number not in late]))
            self._drop(worker)
            self.start()
            yield from ((number, None) for number in late)

    def _ended(self, worker: _Worker) -> Iterator[tuple[int | None, Failure]]:
        how, running = worker.ending(), list(worker.running)
        self._drop(worker)
        if not worker.ready:
            yield None, Failure(f"its worker process must start; it ended at once ({how})")
        elif running:
            others = f", with {len(running) - 1} more in flight," if self._asynchronous and len(running) > 1 else ""
            yield running[0], Failure(f"its worker process ended ({how}){others}")

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.kill()


class _Worker:
    """One process, the connection to it, and the calls that it has not answered."""

    def __init__(self, setup: tuple):
        self.connection, theirs = multiprocessing.Pipe()
        life, self._life = os.pipe()
        path = [each for each in sys.path if isinstance(each, str)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), str(life), *path],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), life),
            process_group=0,  # a Ctrl-C is for the parent, and a kill for whatever the function started too
        )
        theirs.close()
        os.close(life)
        self.ready = False
        self.running: dict[int, float] = {}  # number of the call -> when its time began, the oldest first
        self.pace = _BATCH  # seconds a call, of the last batch
        self._given = (0.0, 1)
        with contextlib.suppress(ConnectionError):  # its end is an event of its own
            self.connection.send(setup)

    @property
    def clock(self) -> float:
        """When the time of its oldest call began."""
        return next(iter(self.running.values()))

    def give(self, calls: Sequence[dict], numbers: list[int]) -> bool:
        """Send it the calls of these numbers; False where it is gone."""
        try:
            message = pickle.dumps([(number, calls[number]) for number in numbers])
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"reward: its arguments must be picklable to reach a worker process; {reward_worker.one_line(error)}. "
                "Keep plain data in metadata, or use --reward-workers 0."
            ) from error
        now = time.monotonic()
        self.running.update(dict.fromkeys(numbers, now))  # before they are sent: an interrupt may come in between
        self._given = now, len(numbers)
        try:
            self.connection.send_bytes(message)
        except ConnectionError:
            for number in numbers:
                del self.running[number]
            return False
        return True

    def answered(self, number: int, *, one_by_one: bool) -> None:
        """Note that call `number` has ended, and that the time of the next one begins where they go one by one."""
        del self.running[number]
        now = time.monotonic()
        if one_by_one and self.running:
            self.running[next(iter(self.running))] = now
        elif one_by_one:
            given, count = self._given
            self.pace = max(1e-6, (now - given) / count)

    def ending(self) -> str:
        """How it ended: its exit status, or the signal that killed it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(timeout=1.0)
            if status >= 0:
                return f"exit status {status}"
            name = signal.Signals(-status).name
            return f"{name}, out of memory perhaps" if name == "SIGKILL" else name
        return "it closed its connection"

    def kill(self) -> None:
        """End it now, with whatever it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()
        os.close(self._life)


def _close(workers: Iterable[_Worker], selector: selectors.BaseSelector) -> None:
    selector.close()
    for worker in workers:
        worker.kill()


def _portable(function: Callable) -> bytes:
    """The function as another process can load it: by the name it has in its module."""
    try:
        payload = pickle.dumps(function)
        main = any(argument == "__main__" for _, argument, _ in pickletools.genops(payload))
        reason = "it is part of the script or notebook that runs" if main else ""
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = reward_worker.one_line(error)
    if reason:
        name = getattr(function, "__qualname__", repr(function))
        raise ValueError(
            f"reward: {name} must be importable to run in worker processes; {reason}. "
            "Move it to a module of its own, or use --reward-workers 0."
        )
    return payload
