"""Where problems come from: a reasoning-gym generator without end, or the rows of a user's file."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fuserl.engine import lookup

# A generator is called exhausted after this many draws in a row that brought nothing new.
_PATIENCE = 1000
_BLOCK = 64


@dataclass(frozen=True)
class Problem:
    """A question, its reference answer when there is one, and what its verifier needs besides."""

    question: str
    answer: str | None = None
    metadata: dict = field(default_factory=dict)


class Source(Protocol):
    """What a task needs of a place that problems come from. Every method is a function of its arguments alone."""

    unverifiable: str | None  # why `score` cannot judge some problem, if so

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` problems with different questions, none of them in `exclude`."""

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """The training problems from draw number `start` on, exactly `count`, none of them in `exclude`."""

    def opening(self, question: str) -> str:
        """The text that a completion of `question` continues."""

    def score(self, answer: str, problem: dict) -> float:
        """How right `answer` is, 0 to 1; `problem` is a problem's metadata."""


class Generated:
    """Problems of a reasoning-gym dataset, `name:option=value,option=value`, judged by the dataset's own verifier."""

    unverifiable = None

    def __init__(self, description: str):
        gym = lookup.package("reasoning_gym", "tasks")
        self._factory = lookup.package("reasoning_gym.factory", "tasks")
        self.name, *options = re.split(r":|,(?=\w+=)", description)
        if self.name not in self._factory.DATASETS:
            raise ValueError(
                f"task: reasoning_gym must know the dataset; got {self.name!r}. "
                f"{lookup.nearest(self.name, self._factory.DATASETS)}"
            )
        self._create, self.options = gym.create_dataset, dict(map(self._option, options))
        self._judge = self._dataset(0)

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` problems with different questions, in the generator's own frequencies."""
        found: dict[str, Problem] = {}
        idle = 0
        entries = self._entries(seed)
        while len(found) < count and idle < _PATIENCE:
            entry = next(entries)
            question = entry["question"]
            idle += 1
            if question not in exclude and question not in found:
                found[question] = Problem(question, entry["answer"], {"entry": entry})
                idle = 0
        return list(found.values())

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """Fresh draws for every `start`: distinct among themselves unless the generator has fewer than `count`."""
        found = self.distinct(_seed(seed, start), count, exclude)
        if not found:
            raise ValueError(
                f"task: reasoning_gym:{self.name} must have problems left to train on; all that it has are held out or "
                "examples. Take a harder task, or a smaller --eval-problems."
            )
        return list(itertools.islice(itertools.cycle(found), count))

    def opening(self, question: str) -> str:
        """`5 - 9 =` for a question that ends in an equation, else the question and a line that asks for the answer."""
        if question.endswith("="):
            return question.rpartition(": ")[2]
        return f"Question: {question.strip()}\nAnswer:"

    def score(self, answer: str, problem: dict) -> float:
        """The dataset's own verdict on `answer`."""
        try:
            return float(self._judge.score_answer(answer, problem["entry"]))
        except (ValueError, TypeError):
            # Some of these verifiers (prime_factorization, boxnet) raise on text that they cannot parse: it is wrong.
            return 0.0

    def _option(self, text: str) -> tuple[str, object]:
        name, equals, value = text.partition("=")
        known = {each.name for each in dataclasses.fields(self._factory.DATASETS[self.name][1])} - {"seed", "size"}
        if not equals or name not in known:
            raise ValueError(
                f"task: an option of reasoning_gym:{self.name} must read name=value with a known name; got {text!r}. "
                f"{lookup.nearest(name, sorted(known))}"
            )
        return name, _literal(value)

    def _dataset(self, seed: int):
        try:
            return self._create(self.name, seed=seed, size=_BLOCK, **self.options)
        except (AssertionError, ValueError, TypeError) as error:
            options = ", ".join(f"{name}={value}" for name, value in self.options.items()) or "its defaults"
            raise ValueError(
                f"task: reasoning_gym:{self.name} must accept its options; got {options}. It says: {error}."
            ) from error

    def _entries(self, seed: int) -> Iterator[dict]:
        # Entry i of a dataset depends on seed + i, so neighbouring seeds would repeat each other: blocks take far ones.
        for block in itertools.count():
            dataset = self._dataset(_seed(seed, block))
            yield from (dataset[index] for index in range(_BLOCK))


class Rows:
    """Problems of a JSONL file: `prompt`, an optional `answer`, and any other field as metadata."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError as error:
            raise ValueError(
                f"task: data must be a readable JSONL file; got {str(path)!r} ({error.strerror}). Check the path."
            ) from error
        self.unverifiable = None
        self.problems = [self._problem(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.problems:
            raise ValueError(f'task: data must have rows; {path} is empty. Write lines like {{"prompt": "2 + 2 ="}}.')

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` rows with different prompts, in an order that `seed` shuffles."""
        order = random.Random(seed).sample(self.problems, len(self.problems))
        found = {problem.question: problem for problem in order if problem.question not in exclude}
        return list(found.values())[:count]

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """Draws `start` to `start + count` of a walk that visits every row once an epoch, each in its own order."""
        left = [problem for problem in self.problems if problem.question not in exclude]
        if not left:
            raise ValueError(
                f"task: data must have rows left to train on; the {len(self.problems)} of {self.path} are held out or "
                "examples. Add rows, or take a smaller --eval-problems."
            )
        first, last = start // len(left), (start + count - 1) // len(left)
        walk = [
            problem
            for epoch in range(first, last + 1)
            for problem in random.Random(_seed(seed, epoch)).sample(left, len(left))
        ]
        return walk[start - first * len(left) :][:count]

    def opening(self, question: str) -> str:
        """The row's prompt, untouched."""
        return question

    def score(self, answer: str, problem: dict) -> float:
        """Whether `answer` is the row's answer, letter for letter between the ends."""
        return float(answer == problem["answer"].strip())

    def _problem(self, line: bytes, number: int) -> Problem:
        place = f"{self.path}:{number}"
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            raise ValueError(f"{place}: a row must be one JSON object in UTF-8; it is not ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f'{place}: a row must be a JSON object; got {_short(row)}. Write {{"prompt": ...}}.')
        prompt, answer = row.get("prompt"), row.get("answer")
        if not isinstance(prompt, str) or not prompt:
            fields = ", ".join(row) or "none"
            raise ValueError(
                f'{place}: a row must have text under "prompt"; got {_short(prompt)}. Its fields: {fields}.'
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise ValueError(f'{place}: "answer" must be text or a number; got {_short(answer)}. Quote it.')
        rest = {name: value for name, value in row.items() if name != "prompt"}
        if answer is None:
            self.unverifiable = self.unverifiable or f"{place} has no answer"
        answer = None if answer is None else str(answer)
        return Problem(prompt, answer, {**rest, "answer": answer})


def _seed(*parts: int) -> int:
    """A 31-bit seed, far from that of any other parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _literal(text: str) -> object:
    named = {"true": True, "false": False, "none": None}
    try:
        return named[text.lower()] if text.lower() in named else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def questions(*several: Iterable[Problem]) -> frozenset[str]:
    """The questions of all the problems given, what two sides of a split must not share."""
    return frozenset(problem.question for problem in itertools.chain(*several))
