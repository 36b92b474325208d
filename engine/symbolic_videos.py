"""Questions about made-up videos, written as their frames: a source of several tasks on data sets of unlike difficulty.

    TAG  when something is done: `begin-end`                  STG  where something is: `frame:x1,y1,x2,y2 ...`
    VS   what is done, in order: a sentence                   RC   what is in a region: a sentence

The first data set has short videos, the second one long ones with many tools; a problem's metadata names both.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from fuserl.engine.problems import Endless, Problem, matching

NAME = "symbolic_videos"
DATASETS = {"ward": (4, ("wipe", "cut", "tie")), "theatre": (12, ("wipe", "cut", "tie", "clip", "burn", "pull"))}
TOOLS = ("hook", "clamp", "needle")
TASKS = ("TAG", "STG", "VS", "RC")


class Videos(Endless):
    """A source of problems without end, each pair of data set and task in turn."""

    place = NAME

    def drawn(self, seed: int) -> Iterator[Problem]:
        """A question of each pair of data set and task in turn."""
        draw = random.Random(seed)
        for dataset, task in itertools.cycle(itertools.product(DATASETS, TASKS)):
            question, answer = _QUESTIONS[task](draw, *DATASETS[dataset])
            yield Problem(question, answer, {"dataset": dataset, "task": task, "answer": answer}, place=self.place)

    def opening(self, question: str) -> str:
        """The question, and a line that asks for the answer."""
        return f"{question}\nAnswer:"

    def score(self, answer: str, problem: dict) -> float:
        """Whether it is the answer, letter for letter."""
        return matching(answer, problem)


def _acted(draw: random.Random, frames: int, actions: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """What is done from which frame to before which, each action at most once."""
    cuts = sorted(draw.sample(range(1, frames), min(len(actions), frames // 2) - 1))
    return list(zip(draw.sample(actions, len(cuts) + 1), [0, *cuts], [*cuts, frames], strict=True))


def _shown(acted: list[tuple[str, int, int]]) -> str:
    return "Frames: " + " ".join(f"{frame}:{action}" for action, begin, end in acted for frame in range(begin, end))


def _when(draw, frames, actions):
    acted = _acted(draw, frames, actions)
    action, begin, end = draw.choice(acted)
    return f"{_shown(acted)}\nFrom which to before which frame do they {action}?", f"{begin}-{end}"


def _where(draw, frames, actions):
    places = {tool: (draw.randrange(6), draw.randrange(6)) for tool in TOOLS[: len(actions) // 2]}
    tool, first = draw.choice([*places]), draw.randrange(frames - 1)

    def box(name: str, t: int) -> str:
        x, y = places[name]
        return f"{x + t % 3},{y},{x + t % 3 + 2},{y + 2}"

    shown = " ".join(f"{t}:{name} {box(name, t)}" for t in range(frames) for name in places)
    answer = " ".join(f"{t}:{box(tool, t)}" for t in (first, first + 1))
    return f"Frames: {shown}\nWhere is the {tool} in frames {first} and {first + 1}?", answer


def _summary(draw, frames, actions):
    acted = _acted(draw, frames, actions)
    return f"{_shown(acted)}\nWhat do they do?", "They " + ", then ".join(action for action, _, _ in acted) + "."


def _region(draw, frames, actions):
    tools = draw.sample(TOOLS, 2)
    doing = {tool: draw.choice(actions) for tool in tools}
    left = f"Left: {tools[0]}, {doing[tools[0]]}. Right: {tools[1]}, {doing[tools[1]]}. Frame {draw.randrange(frames)}."
    side = draw.randrange(2)
    return f"{left}\nWhat is {('left', 'right')[side]}?", f"A {tools[side]} used to {doing[tools[side]]}."


_QUESTIONS = dict(zip(TASKS, (_when, _where, _summary, _region), strict=True))
