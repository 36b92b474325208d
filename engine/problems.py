"""What a problem is, what a source of problems owes, and the source without end: reasoning-gym's generators."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from fuserl.engine import lookup

# A generator is called exhausted after this many draws in a row that brought nothing new.
_PATIENCE = 1000
_BLOCK = 64
# Drawn to look at before training; some generators need a third of a second for one.
_SAMPLE = 16


@dataclass(frozen=True)
class Problem:
    """A question, its reference answer when there is one, and what its verifier needs besides.

    Args:
        question: the text that identifies it; for a conversation, its transcript.
        answer: the expected answer.
        metadata: whatever a reward needs besides.
        chosen, rejected: a better and a worse completion.
        turns: the messages of a conversation, {"role", "content"} each, the last one the user's; empty for plain text.
        place: where it comes from, as errors name it.
    """

    question: str
    answer: str | None = None
    metadata: dict = field(default_factory=dict)
    chosen: str | None = None
    rejected: str | None = None
    turns: tuple[dict[str, str], ...] = ()
    place: str = field(default="", compare=False)


class Source(Protocol):
    """What a task needs of a place that problems come from. Every method is a function of its arguments alone."""

    unverifiable: str | None  # why `score` cannot judge some problem, if so
    conversational: bool  # some problems have turns
    size: int | None  # different questions, None where there is no end of them

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` problems with different questions, none of them in `exclude`."""

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """The training problems from draw number `start` on, exactly `count`, none of them in `exclude`."""

    def sample(self) -> list[Problem]:
        """What there is to check before training: all problems, or a few where there is no end of them."""

    def opening(self, question: str) -> str:
        """The text that a completion of `question` continues."""

    def score(self, answer: str, problem: dict) -> float:
        """How right `answer` is, 0 to 1; `problem` is a problem's metadata."""


class Endless:
    """A source that draws: what it has is what `drawn(seed)` yields; `place` is what errors call it."""

    unverifiable, conversational, size = None, False, None
    place: str

    def drawn(self, seed: int) -> Iterator[Problem]:
        """Problems without end, in the source's own frequencies."""
        raise NotImplementedError

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` problems with different questions; fewer where many draws in a row bring nothing new."""
        found: dict[str, Problem] = {}
        idle, draws = 0, self.drawn(seed)
        while len(found) < count and idle < _PATIENCE:
            problem = next(draws)
            idle += 1
            if problem.question not in exclude and problem.question not in found:
                found[problem.question] = problem
                idle = 0
        return list(found.values())

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """Fresh draws for every `start`: distinct among themselves unless the source has fewer than `count`."""
        found = self.distinct(far_seed(seed, start), count, exclude)
        if not found:
            raise ValueError(
                f"task: {self.place} must have problems left to train on; all that it has are held out or examples. "
                "Take a harder task, or a smaller --eval-problems."
            )
        return list(itertools.islice(itertools.cycle(found), count))

    def sample(self) -> list[Problem]:
        """A few draws, always the same."""
        return self.distinct(far_seed(0), _SAMPLE)


class Generated(Endless):
    """Problems of a reasoning-gym dataset, `name:option=value,option=value`, judged by the dataset's own verifier.

    The answer is a problem's `chosen`, and the answer of a neighbour among the generator's draws its `rejected`.
    """

    def __init__(self, description: str):
        gym = lookup.package("reasoning_gym", "tasks")
        self._factory = lookup.package("reasoning_gym.factory", "tasks")
        self.name, *options = re.split(r":|,(?=\w+=)", description)
        if self.name not in self._factory.DATASETS:
            raise ValueError(
                f"task: reasoning_gym must know the dataset; got {self.name!r}. "
                f"{lookup.nearest(self.name, self._factory.DATASETS)}"
            )
        given = list(map(self._option, options))
        self._create, self.options = gym.create_dataset, dict(given)
        if len(self.options) < len(given):
            raise ValueError(
                f"task: each option of reasoning_gym:{self.name} must be given once; got {', '.join(options)}. Leave "
                "one out."
            )
        self._judge, self.place = self._dataset(0), f"reasoning_gym:{self.name}"

    def drawn(self, seed: int) -> Iterator[Problem]:
        """Every entry of the generator, with the answer of one behind it in its block as a wrong one."""
        return itertools.starmap(self._problem, self._entries(seed))

    def opening(self, question: str) -> str:
        """`5 - 9 =` for a question that ends in an equation, else the question and a line that asks for the answer."""
        if question.endswith("="):
            return question.rpartition(": ")[2]
        return f"Question: {question.strip()}\nAnswer:"

    def score(self, answer: str, problem: dict) -> float:
        """The dataset's own verdict on `answer`; a problem held out from a file is judged as the file's rows are."""
        if "entry" not in problem:
            return matching(answer, problem)
        try:
            return float(self._judge.score_answer(answer, problem["entry"]))
        except (ValueError, TypeError):
            # Some of these verifiers (prime_factorization, boxnet) raise on text that they cannot parse: it is wrong.
            return 0.0

    def _problem(self, entry: dict, others: Iterable[str | None]) -> Problem:
        answer, wrong = entry["answer"], None
        if answer is not None:
            wrong = next((other for other in others if other is not None and other.strip() != answer.strip()), None)
        return Problem(entry["question"], answer, {"entry": entry}, chosen=answer, rejected=wrong, place=self.place)

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
        with self._accepting():
            return self._create(self.name, seed=seed, size=_BLOCK, **self.options)

    @contextlib.contextmanager
    def _accepting(self) -> Iterator[None]:
        """What options make a generator raise, when it is made or only when it draws, is the options' fault."""
        try:
            yield
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            options = ", ".join(f"{name}={value}" for name, value in self.options.items()) or "its defaults"
            says = f"{type(error).__name__}: {error}".removesuffix(": ").rstrip(".")
            raise ValueError(
                f"task: reasoning_gym:{self.name} must accept its options; got {options}. It says: {says}."
            ) from error

    def _entry(self, dataset, index: int) -> dict:
        with self._accepting():
            return dataset[index]

    def _entries(self, seed: int) -> Iterator[tuple[dict, Iterator[str | None]]]:
        """Every entry, and the answers of those behind it in its block: a function of the entry's own number."""
        # Entry i of a dataset depends on seed + i, so neighbouring seeds would repeat each other: blocks take far ones.
        for block in itertools.count():
            entry = functools.cache(functools.partial(self._entry, self._dataset(far_seed(seed, block))))
            for index in range(_BLOCK):
                yield entry(index), (entry((index + step) % _BLOCK)["answer"] for step in range(1, _BLOCK))


class Rows:
    """Problems of a file, already read and checked (see `files.read`); a walk through them visits each once an epoch.

    Args:
        problems: at least one.
        path: of the file, as errors name it.
    """

    def __init__(self, problems: list[Problem], path: str):
        self.problems, self.path = problems, path
        unanswered = next((problem.place for problem in problems if problem.answer is None), None)
        self.unverifiable = f"{unanswered} has no answer" if unanswered else None
        self.conversational = any(problem.turns for problem in problems)
        self.size = len(questions(problems))

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` rows with different prompts, in an order that `seed` shuffles."""
        order = random.Random(seed).sample(self.problems, len(self.problems))
        found = {problem.question: problem for problem in order if problem.question not in exclude}
        return list(found.values())[:count]

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """Draws `start` to `start + count` of a walk that visits every row once an epoch, each in its own order."""
        epoch_length = len(_left(self, exclude))
        if not epoch_length:
            raise ValueError(
                f"task: data must have rows left to train on; the {len(self.problems)} of {self.path} are held out or "
                "examples. Add rows, or take a smaller --eval-problems."
            )
        places = (divmod(draw, epoch_length) for draw in range(start, start + count))
        return [_epoch(self, exclude, seed, epoch)[at] for epoch, at in places]

    def sample(self) -> list[Problem]:
        """All rows."""
        return self.problems

    def opening(self, question: str) -> str:
        """The row's prompt, untouched."""
        return question

    def score(self, answer: str, problem: dict) -> float:
        """Whether `answer` is the row's answer, letter for letter between the ends."""
        return matching(answer, problem)


# A step asks for a few rows of an epoch; shuffling all of them for it would take longer than the rest of the step.
@functools.lru_cache(maxsize=4)
def _left(rows: Rows, exclude: frozenset[str]) -> list[Problem]:
    return [problem for problem in rows.problems if problem.question not in exclude]


@functools.lru_cache(maxsize=4)
def _epoch(rows: Rows, exclude: frozenset[str], seed: int, epoch: int) -> list[Problem]:
    left = _left(rows, exclude)
    return random.Random(far_seed(seed, epoch)).sample(left, len(left))


def matching(answer: str, problem: dict) -> float:
    """1.0 when `answer` is the "answer" in a problem's metadata, letter for letter between the ends, else 0.0."""
    return float(answer.strip() == problem["answer"].strip())


def questions(*several: Iterable[Problem]) -> frozenset[str]:
    """The questions of all the problems given, what two sides of a split must not share."""
    return frozenset(problem.question for problem in itertools.chain(*several))


def far_seed(*parts: int) -> int:
    """A 31-bit seed, far from that of any other parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _literal(text: str) -> object:
    named = {"true": True, "false": False, "none": None}
    try:
        return named[text.lower()] if text.lower() in named else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
