"""Repeated games of two agents in words: who is to move, what each one sees, what a move earns.

ipd      both say 1 (cooperate) or 2 (defect) at once: 3 each, 1 each, or 5 and 0
split    10 coins, worth 10 each to one agent and 1 to the other, told to both; both say at once how many they keep
trust    the same, but each sees only its own hand of rock, paper, scissors, and who has the upper hand values coins
         at 10; before they split they send each other messages, which may or may not be true

coins kept = 10 c / max(10, c_1 + c_2)        for claims c_1 and c_2; points are coins times their value
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fuserl.engine.contracts import require, require_one_of

COINS, HIGH, LOW = 10, 10.0, 1.0
BEATS = {"rock": "scissors", "scissors": "paper", "paper": "rock"}
NAMES = ("Ann", "Bob")
DILEMMA = {"11": (3.0, 3.0), "12": (0.0, 5.0), "21": (5.0, 0.0), "22": (1.0, 1.0)}


def split_points(claims: tuple[int, int], values: tuple[float, float]) -> tuple[float, float]:
    """What two claims of coins earn: beyond 10 in all each is cut in proportion."""
    whole = max(COINS, sum(claims))
    first, second = (value * COINS * claim / whole for claim, value in zip(claims, values, strict=True))
    return first, second


@dataclass
class Game:
    """A repeated game. A subclass says how a round begins, what is asked, and what the moves earn.

    Args:
        rounds: of the game.
        seed: of everything that chance decides, the same for all games of a group.
    """

    rounds: int
    seed: int
    payoffs: list[tuple[float, float]] = field(default_factory=list)  # of the rounds that are over
    history: list[list[str]] = field(default_factory=lambda: [[], []])  # lines that each agent has seen
    moves: int = 0  # that were to be read
    unread: int = 0  # of these
    scale = 1.0  # rewards are divided by it in training

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.begin()

    @property
    def round(self) -> int:
        """The round that is played, from 0."""
        return len(self.payoffs)

    @property
    def over(self) -> bool:
        """Whether all rounds are played."""
        return self.round == self.rounds

    def begin(self) -> None:
        """What chance decides of a round."""

    def movers(self) -> tuple[int, ...]:
        """Who is to say something now; both at once unless there is a talk."""
        return (0, 1)

    def text(self, agent: int) -> str:
        """What an agent reads: the rules, all that it has seen, and what is asked now."""
        rules = self.rules.format(me=NAMES[agent], other=NAMES[1 - agent])
        return "\n".join([rules, *self.history[agent], self.asked(agent)])

    def asked(self, agent: int) -> str:
        """The line that a move continues."""
        raise NotImplementedError

    def move(self, said: dict[int, str]) -> None:
        """Go on with what each of `movers` said."""
        raise NotImplementedError

    def earned(self, points: tuple[float, float], shown: tuple[str, str]) -> None:
        """End a round in which the agents have seen `shown`."""
        for agent in (0, 1):
            self.history[agent].append(f"{self.round + 1}: {shown[agent]}")
        self.payoffs.append(points)
        if not self.over:
            self.begin()

    def copied(self) -> Game:
        """The game as it stands, to be played on apart."""
        return copy.deepcopy(self)

    def read(self, pattern: str, text: str, otherwise: str) -> str:
        """The first match in a text, else what does its speaker no good."""
        found = re.search(pattern, text)
        self.moves, self.unread = self.moves + 1, self.unread + (found is None)
        return found[0] if found else otherwise


class Dilemma(Game):
    """The iterated prisoner's dilemma with payoffs 3, 0, 5, 1."""

    scale = 5.0
    rules = "You are {me}. Each round you and {other} say 1 or 2. 1,1: 3 each. 2,2: 1 each. Else 2 gets 5, 1 gets 0."
    greedy = "2"

    def asked(self, agent: int) -> str:
        """Moves are asked for by the number of the round."""
        return f"{self.round + 1}: you"

    def move(self, said: dict[int, str]) -> None:
        """Both choose at once; what cannot be read is 1, which never earns more than 2."""
        a, b = (self.read("[12]", said[agent], "1") for agent in (0, 1))
        self.earned(DILEMMA[a + b], (f"you {a}, {NAMES[1]} {b}", f"you {b}, {NAMES[0]} {a}"))


class Split(Game):
    """Splitting coins of values that both agents know."""

    scale = 100.0
    rules = (
        "You are {me}. Each round you and {other} split 10 coins. Both say at once how many to keep; if that is more "
        "than 10, all are cut in proportion. Coins are worth 10 points to one of you and 1 to the other."
    )
    greedy = "10"

    def begin(self) -> None:
        """Who values coins at 10."""
        self.values = self.random.choice([(HIGH, LOW), (LOW, HIGH)])

    def asked(self, agent: int) -> str:
        """The agent's value, and how many coins it keeps."""
        return f"{self.round + 1}: a coin is worth {self.values[agent]:.0f} to you. You keep"

    def move(self, said: dict[int, str]) -> None:
        """Both claim at once; what cannot be read is 0."""
        self.divide(*(int(self.read(r"\b(10|\d)\b", said[agent], "0")) for agent in (0, 1)))

    def divide(self, a: int, b: int) -> None:
        """End the round with two claims."""
        points = split_points((a, b), self.values)
        shown = [f"you kept {(a, b)[i]} and got {points[i]:.0f}, {NAMES[1 - i]} kept {(a, b)[1 - i]}" for i in (0, 1)]
        self.earned(points, tuple(shown))


@dataclass
class TrustAndSplit(Split):
    """Splitting coins after talking about hands that only their holders see.

    Args:
        quota: messages of each agent in a round.
        alternate: who had the upper hand has the lower one in the next round.
    """

    quota: int = 1
    alternate: bool = False
    rules = (
        "You are {me}. Each round you and {other} split 10 coins. Each has a hand that the other does not see: rock "
        "beats scissors, scissors paper, paper rock. Coins are worth 10 to the upper hand, 1 to the lower. You talk, "
        "then both say at once how many coins to keep; if that is more than 10, all are cut in proportion."
    )

    def begin(self) -> None:
        """Two different hands, and who talks first, in turn."""
        hands = self.random.sample(sorted(BEATS), 2)
        upper = 0 if BEATS[hands[0]] == hands[1] else 1
        if self.alternate and self.payoffs and self.values[upper] == HIGH:
            hands, upper = hands[::-1], 1 - upper
        self.hands, self.values = hands, (HIGH, LOW) if upper == 0 else (LOW, HIGH)
        self.first = self.random.randrange(2) if not self.payoffs else 1 - self.first
        self.messages: list[str] = []

    def movers(self) -> tuple[int, ...]:
        """The one whose message is next, until the quota is used up; then both."""
        said = len(self.messages)
        return (0, 1) if said == 2 * self.quota else ((self.first + said) % 2,)

    def asked(self, agent: int) -> str:
        """The hand, what was said in this round, and a message or a claim."""
        talk = [
            f"{'you' if self.speaker(at) == agent else NAMES[1 - agent]}: {text}"
            for at, text in enumerate(self.messages)
        ]
        asks = "you:" if len(self.movers()) == 1 else "You keep"
        return "\n".join([f"{self.round + 1}: your hand is {self.hands[agent]}.", *talk, asks])

    def speaker(self, at: int) -> int:
        """Who sent message number `at` of a round."""
        return (self.first + at) % 2

    def move(self, said: dict[int, str]) -> None:
        """A message, one line of it, or both claims."""
        if len(said) == 1:
            self.messages.append(" ".join(next(iter(said.values())).split()))
            return
        super().move(said)


GAMES = {"ipd": Dilemma, "split": Split, "trust": TrustAndSplit}


def maker(name: str, rounds: int, *, quota: int = 1, alternate: bool = False) -> Callable[[int], Game]:
    """(seed) -> a game of that name; `quota` and `alternate` are of trust."""
    require_one_of("games", "game", name, tuple(GAMES))
    require("games", "rounds", rounds, rounds >= 1, "an integer >= 1")
    require("games", "quota", quota, quota >= 0, "an integer >= 0")
    more = {"quota": quota, "alternate": alternate} if name == "trust" else {}
    return lambda seed: GAMES[name](rounds, seed, **more)
