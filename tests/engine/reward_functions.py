"""Rewards that worker processes import by name: slow, hanging, crashing and wrong ones; and when they have ended."""

import asyncio
import ctypes
import os
import re
import select
import subprocess
import sys
import threading
import time

_in_flight = _readied = 0
_everybody = asyncio.Event()


def length(completion):
    return len(completion)


def process(completion):
    return os.getpid()


def torch_is_there(completion):
    return "torch" in sys.modules or "transformers" in sys.modules


def out_of_order(completion):
    """Early rollouts end last."""
    time.sleep(0.05 if completion == "0" else 0.0)
    return float(completion)


def shares(prompt, completions, answer, metadata, finishes):
    """Each completion's length as a share of its group's."""
    total = sum(map(len, completions))
    return [len(text) / total + metadata.get("bonus", 0) for text in completions]


def prepared(completion):
    return _readied


def _ready():
    global _readied
    time.sleep(0.1)
    _readied += 1


prepared.prepare = _ready


async def length_later(completion):
    await asyncio.sleep(0)
    return len(completion)


async def together(completion):
    """Never ends unless as many calls as the completion says are in flight at once."""
    global _in_flight
    _in_flight += 1
    if _in_flight == int(completion):
        _everybody.set()
    await _everybody.wait()
    return 1.0


async def crowd(completion):
    """How many calls are in flight."""
    global _in_flight
    _in_flight += 1
    seen = _in_flight
    await asyncio.sleep(0.001)
    _in_flight -= 1
    return seen


def told(completion):
    """Does what the completion says."""
    word, _, rest = completion.partition(" ")
    return _DEEDS[word](rest)


async def told_later(completion):
    if completion == "wait":
        await asyncio.Event().wait()
    if completion == "timeout":
        raise TimeoutError("of its own")
    return told(completion)


def told_group(completions):
    return told(completions[0])


class Counting:
    """A reward with state: worker processes get a copy of it."""

    def __init__(self, step):
        self.step = step

    def __call__(self, completion):
        return len(completion) * self.step


def _raise(what):
    raise KeyError(f"first line {what}\nsecond line")


def _raise_odd(_):
    class Odd(Exception):
        pass

    raise Odd("of a class that no other process knows")


def _backtrack(path):
    _write(path)
    return re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for ages


def _write(path):
    if path:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")


def _spawn(path):
    """Starts a program that holds the write end of the fifo at `path`, and waits for it."""
    with open(path, "w") as file:
        subprocess.run(["sleep", "600"], stdout=file)


def _die_later(_):
    threading.Timer(0.02, os._exit, [0]).start()
    return 1.0


_DEEDS = {
    "return": float,
    "list": lambda numbers: list(map(float, numbers.split())),
    "hang": _backtrack,
    "spawn": _spawn,
    "raise": _raise,
    "odd": _raise_odd,
    "exit": sys.exit,
    "end": lambda status: os._exit(int(status)),
    "segfault": lambda _: ctypes.string_at(0),
    "kill": lambda _: os.kill(os.getpid(), 9),
    "later": _die_later,
    "say": lambda words: print(words) or 1.0,
    "block": lambda seconds: time.sleep(float(seconds)) or 1.0,
}


def ended(descriptor, seconds=60.0):
    """Whether every writer of a pipe is gone within the time; reads what they still had to say."""
    while select.select([descriptor], [], [], seconds)[0]:
        if not os.read(descriptor, 4096):
            return True
    return False


def told_more(completion):
    """Half for anything, with the number of words, and of commas where there is more than one word."""
    words = len(completion.split())
    return {"reward": 0.5, "words": words, **({"commas": completion.count(",")} if words > 1 else {})}
