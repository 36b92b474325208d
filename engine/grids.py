"""A grid in words on which an arm carries a cup to a mark: a task that is played, a line a turn.

    Carry the cup to the mark on a grid of 5 x 5, ...      you write    right
    cup 3,1 mark 1,4 you 0,0                               and read     you 1,0

Words are right, left, up, down and grip. With bins an action is seven numbers below `bins`, as those of a robot's arm:
the first two say which way, from -1 to 1, and the last one closes the hand. Now and then the arm slips: another move
happens. Where the arm is follows from its moves alone, so an episode is found again by going through its text.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fuserl.engine import problems
from fuserl.engine.contracts import require
from fuserl.engine.problems import Problem
from fuserl.engine.prompts import Prompt

MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, 1), "down": (0, -1), "grip": (0, 0)}
DIMENSIONS, MIDDLE = 7, 1 / 3  # of an action in bins; what is nearer to 0 moves nothing
_HOW = """Carry the cup to the mark on a grid of {size} x {size}: go there, grip, and go on. Write {what} a line and \
read where you are.
cup {cup[0]},{cup[1]} mark {mark[0]},{mark[1]} you {start[0]},{start[1]}
"""


@dataclass(frozen=True)
class Grid:
    """What there is on a grid, and how its arm is moved."""

    size: int
    cup: tuple[int, int]
    mark: tuple[int, int]
    start: tuple[int, int]
    seed: int  # of the slips
    slips: float  # the chance of one, at each move
    chunk: int  # moves of a line at most
    bins: int  # 0 where moves are words
    most: int  # moves of an episode

    def read(self, line: str) -> list[str]:
        """The moves that a line asks for."""
        if not self.bins:
            return [word for word in re.findall("[a-z]+", line) if word in MOVES][: self.chunk]
        numbers = [min(int(digits), self.bins - 1) for digits in re.findall("[0-9]+", line)]
        whole = range(0, len(numbers) - DIMENSIONS + 1, DIMENSIONS)
        return [self._decoded(numbers[at : at + DIMENSIONS]) for at in whole][: self.chunk]

    def written(self, move: str) -> str:
        """A move as a line asks for it."""
        if not self.bins:
            return move
        x, y = MOVES[move]
        values = [x, y, 0, 0, 0, 0, 1 if move == "grip" else -1]
        return " ".join(str(min(int((value + 1) / 2 * self.bins), self.bins - 1)) for value in values)

    def _decoded(self, numbers: list[int]) -> str:
        x, y, *_, hand = ((2 * number + 1) / self.bins - 1 for number in numbers)
        if hand > MIDDLE:
            return "grip"
        if max(abs(x), abs(y)) < MIDDLE:
            return "stay"
        along, ways = (x, ("right", "left")) if abs(x) >= abs(y) else (y, ("up", "down"))
        return ways[along < 0]


class Episode:
    """An arm on its way: where it is, whether it holds the cup, and how many moves it has made."""

    def __init__(self, grid: Grid):
        self.grid, self.holds, self.moves = grid, False, 0
        # Places that have been through JSON are lists.
        self.at, self.cup, self.mark = tuple(grid.start), tuple(grid.cup), tuple(grid.mark)

    @property
    def carried(self) -> bool:
        """Whether the cup is at the mark."""
        return self.holds and self.at == self.mark

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do, or no move left to do it."""
        return self.carried or self.moves >= self.grid.most

    def turn(self, line: str) -> None:
        """Make the moves that a line asks for; one that asks for none is a move of nothing."""
        for move in self.grid.read(line) or ["stay"]:
            if self.over:
                return
            chance = random.Random(problems.far_seed(self.grid.seed, self.moves))
            move = chance.choice(list(MOVES)) if chance.random() < self.grid.slips else move
            right, up = MOVES.get(move, (0, 0))
            self.at = tuple(min(max(a + b, 0), self.grid.size - 1) for a, b in zip(self.at, (right, up), strict=True))
            self.holds |= move == "grip" and self.at == self.cup
            self.moves += 1

    def shown(self) -> str:
        """What the arm is told."""
        return f"you {self.at[0]},{self.at[1]}{' holding' if self.holds else ''}"

    def best(self) -> str:
        """The move of one who knows the way, first along the row."""
        (x, y), (to_x, to_y) = self.at, self.mark if self.holds else self.cup
        gaps = {"right": to_x - x, "left": x - to_x, "up": to_y - y, "down": y - to_y}
        return next((move for move, gap in gaps.items() if gap > 0), "grip")


def episode(grid: Grid, text: str) -> Episode:
    """Go through an arm's text: lines that ask for moves, each with what it was told then behind it."""
    found, told = Episode(grid), None
    for line in text.removesuffix("\n").split("\n") if text else ():
        if line != told:
            found.turn(line)
        told = None if line == told else found.shown()
    return found


def carried(completion: str, metadata: dict) -> float:
    """The reward: 1 where the cup is at the mark in the end."""
    return float(episode(Grid(**metadata["grid"]), completion).carried)


def demonstration(grid: Grid) -> str:
    """The text of one who knows the way, a move a line, with what it was told; the slips are those of the grid."""
    found, lines = Episode(grid), []
    while not found.over:
        lines.append(grid.written(found.best()))
        found.turn(lines[-1])
        lines.append(found.shown())
    return "\n".join(lines[:-1])


class Grids(problems.Endless):
    """Grids drawn at random: `grid`, or `grid:size=5,slips=0.1,chunk=1,bins=0,most=24`. Answers are demonstrations.

    A model needs --max-new-tokens for its moves and what it is told behind each.

    Raises:
        ValueError: an option that is unknown or no number in its range.
    """

    place, judge = "grid", staticmethod(carried)

    def __init__(self, description: str = ""):
        options = {"size": 5, "slips": 0.1, "chunk": 1, "bins": 0, "most": 24}
        for part in filter(None, description.split(",")):
            name, _, value = part.partition("=")
            if name not in options:
                raise ValueError(f"task: an option of grid must be {', '.join(options)}; got {part!r}. Correct it.")
            try:
                options[name] = type(options[name])(value)
            except ValueError:
                raise ValueError(f"task: grid's {name} must be a number; got {value!r}. Correct it.") from None
        for name, least, most in (
            ("size", 2, 9),
            ("slips", 0, 1),
            ("chunk", 1, 99),
            ("bins", 0, 4096),
            ("most", 1, 999),
        ):
            require("task", f"grid's {name}", options[name], least <= options[name] <= most, f"in [{least}, {most}]")
        require("task", "grid's bins", options["bins"], options["bins"] not in (1, 2), "0, or at least 3")
        self.options = options

    def drawn(self, seed: int) -> Iterator[Problem]:
        """Grids, each with a demonstration."""
        draws = random.Random(seed)
        while True:
            yield self._drawn(draws)

    def opening(self, question: str) -> str:
        """The question, which says what there is to do; moves begin on a line of their own."""
        return f"{question}\n"

    def score(self, answer: str, problem: dict) -> float:
        """Whether an arm that writes `answer` carries the cup."""
        return carried(answer, problem)

    def reply(self, prompt: Prompt, text: str) -> str | None:
        """What an arm is told after its line; None where the episode is over, or the prompt is of no grid."""
        if "grid" not in prompt.metadata:
            return None
        found = episode(Grid(**prompt.metadata["grid"]), text)
        return None if found.over else f"{'' if text.endswith(chr(10)) else chr(10)}{found.shown()}\n"

    def _drawn(self, draws: random.Random) -> Problem:
        places = [(x, y) for x in range(self.options["size"]) for y in range(self.options["size"])]
        cup, mark, start = draws.sample(places, 3)
        grid = Grid(cup=cup, mark=mark, start=start, seed=draws.getrandbits(32), **self.options)
        unit = f"{DIMENSIONS} numbers below {grid.bins}" if grid.bins else ", ".join(MOVES)
        what = unit if grid.chunk == 1 else f"up to {grid.chunk} times {unit}"
        question = _HOW.format(what=what, **dataclasses.asdict(grid))
        return Problem(question.rstrip("\n"), demonstration(grid), {"grid": dataclasses.asdict(grid)}, place=self.place)
