"""Several tasks in one run, each with its own source, examples and verifier: `A + B`, or `2 A + B` for two to one.

A problem says which task it is of, in its metadata under "task". Draws go round the tasks, so that a step of as many
prompts as there are shares has each in its share.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from fuserl.engine.problems import Problem


def parts(name: str) -> list[tuple[int, str]]:
    """The share and the name of each task in a name: `2 A + B` is 2 of A to 1 of B; a file's name is one task."""
    if " + " not in name or Path(name).is_file():
        return [(1, name)]
    found = [re.fullmatch(r"(?:(\d{1,3}) +)?(.+)", each.strip(), re.DOTALL) for each in name.split(" + ")]
    if not all(found) or any(each[1] is not None and int(each[1]) < 1 for each in found):
        raise ValueError(f"task: a mixture must read A + B, or 2 A + B with shares >= 1; got {name!r}. Correct it.")
    return [(int(each[1] or 1), each[2]) for each in found]


def blended(tasks: Sequence, shares: Sequence[int]):
    """One task of several: theirs to train on in these shares, and all that they hold out, in turn.

    Args:
        tasks: as of `prompts.task`, of different names.
        shares: draws of each in a round.

    Raises:
        ValueError: a task twice.
    """
    names = [each.name for each in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"task: a mixture must have each task once; got {' + '.join(names)}. Use shares: 2 A + B.")
    source = Blend(tasks, shares)
    several = [[_labelled(each, task.name) for each in task.held] for task in tasks]
    held = [each for turn in itertools.zip_longest(*several) for each in turn if each]

    def render(_source, _examples, problem: Problem) -> str:
        own = source.by_name[problem.metadata["task"]]
        return own.render(own.source, own.examples, problem)

    return dataclasses.replace(
        tasks[0],
        name=" + ".join(f"{share} {name}" if share > 1 else name for share, name in zip(shares, names, strict=True)),
        source=source,
        examples=(),
        held=tuple(held),
        apart=frozenset(itertools.chain(*(each.apart for each in tasks))),
        render=render,
    )


def of(task) -> Blend:
    """The mixture that a task is, or one of it alone."""
    return task.source if isinstance(task.source, Blend) else Blend([task], [1])


class Blend:
    """The source of a mixture: each draw is of the task whose turn it is.

    Args:
        tasks: each with a source and questions that are kept apart.
        shares: of each in a round.
    """

    def __init__(self, tasks: Sequence, shares: Sequence[int]):
        self.tasks, self.by_name = list(tasks), {task.name: task for task in tasks}
        self.round = [number for number, share in enumerate(shares) for _ in range(share)]
        self.shares = list(shares)
        sources = [task.source for task in tasks]
        self.unverifiable = next((each.unverifiable for each in sources if each.unverifiable), None)
        self.conversational = any(each.conversational for each in sources)
        self.reply = next((each.reply for each in sources if hasattr(each, "reply")), None)
        sizes = [each.size for each in sources]
        self.size = None if None in sizes else sum(sizes)

    def distinct(self, seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
        """Up to `count` problems of all tasks, as many of each."""
        each = -(-count // len(self.tasks))
        several = [[_labelled(p, t.name) for p in t.source.distinct(seed, each, exclude)] for t in self.tasks]
        return [found for turn in itertools.zip_longest(*several) for found in turn if found][:count]

    def take(self, seed: int, start: int, count: int, exclude: frozenset[str]) -> list[Problem]:
        """Draws `start` to `start + count`, each task's own walk going on in its turns."""
        turns = [divmod(draw, len(self.round)) for draw in range(start, start + count)]
        drawn = {}
        for number, task in enumerate(self.tasks):
            places = [at for at, (_, place) in enumerate(turns) if self.round[place] == number]
            if places:
                cycle, place = turns[places[0]]
                first = cycle * self.shares[number] + place - self.round.index(number)
                found = task.source.take(seed, first, len(places), task.apart | exclude)
                drawn |= {at: _labelled(each, task.name) for at, each in zip(places, found, strict=True)}
        return [drawn[at] for at in range(count)]

    def sample(self) -> list[Problem]:
        """What each task shows."""
        return [_labelled(each, task.name) for task in self.tasks for each in task.source.sample()]

    def opening(self, question: str) -> str:
        """The question: what stands before it is its own task's."""
        return question

    def score(self, answer: str, problem: dict) -> float:
        """What the problem's own task says of an answer."""
        return self.by_name[problem["task"]].source.score(answer, problem)


def _labelled(problem: Problem, name: str) -> Problem:
    return dataclasses.replace(problem, metadata={**problem.metadata, "task": name})
