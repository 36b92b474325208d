"""Playing many games of two agents at once: whoever is to move anywhere says something in the same call.

Every turn is a rollout of its own behind what its agent has read by then; its seat says of which game, whose, and when.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fuserl.engine import evaluation
from fuserl.engine.batch import Rollouts
from fuserl.engine.games import Game
from fuserl.engine.past_selves import PastSelves, speaking
from fuserl.engine.problems import far_seed
from fuserl.engine.prompts import Prompt, templated
from fuserl.engine.rollouts import joined, selected

Speaker = Callable  # (prompts, games) -> Rollouts of one completion each, or texts


@dataclass
class Match:
    """A game with its place among those of a step, and what is set of its next move."""

    game: Game
    start: int = 0  # games of one start are a group
    number: int = 0
    told: dict[int, str] | None = None  # what agents say at the next move, as in a branch of another match


@dataclass
class Turns:
    """What was said in matches: rollouts with their seats (start, match, agent, round), one for each of trained agents.

    `before` holds, for each round of each match, the game as it began and what each agent said first.
    """

    rollouts: list[Rollouts]
    seats: list[tuple[int, int, int, int]]
    before: list[tuple[Match, Game, dict[int, str]]]


def play(matches: list[Match], speakers: tuple[Speaker, Speaker], *, kept: Callable, meet: bool = False) -> Turns:
    """Play all matches to their ends.

    Args:
        matches: games that begin, or go on.
        speakers: of agent 0 and of agent 1; where they are the same object both agents speak in one call.
        kept: (match, agent) -> whether its turns become rollouts.
        meet: keep `before` of the moves at which both agents act.
    """
    turns = Turns([], [], [])
    while going := [match for match in matches if not match.game.over]:
        said: dict[int, dict[int, str]] = {id(match): {} for match in going}
        snapshots = [(match, match.game.copied()) for match in going if meet and len(match.game.movers()) == 2]
        asked = [(match, agent) for match in going for agent in match.game.movers()]
        for match, agent in asked:
            if match.told and agent in match.told:
                said[id(match)][agent] = match.told[agent]
        asked = [(match, agent) for match, agent in asked if agent not in said[id(match)]]
        for speaker in dict.fromkeys(speakers):
            own = [(match, agent) for match, agent in asked if speakers[agent] is speaker]
            if own:
                _speak(own, speaker, said, turns, kept)
        for match in going:
            match.told = None
        turns.before += [(match, game, said[id(match)]) for match, game in snapshots]
        for match in going:
            match.game.move(said[id(match)])
    return turns


def scripted(text: str) -> Speaker:
    """A speaker that always says the same, as always-defect."""
    return lambda prompts, games: [text] * len(prompts)


def _speak(own: list, speaker: Speaker, said: dict, turns: Turns, kept: Callable) -> None:
    prompts = [Prompt(match.game.text(agent)) for match, agent in own]
    found = speaker(prompts, [match.game for match, _ in own])
    texts = found.texts if isinstance(found, Rollouts) else found
    for (match, agent), text in zip(own, texts, strict=True):
        said[id(match)][agent] = text
    chosen = [at for at, (match, agent) in enumerate(own) if isinstance(found, Rollouts) and kept(match, agent)]
    if chosen:
        turns.rollouts.append(selected(found, torch.tensor(chosen), torch.zeros(len(found))))
        for match, agent in (own[at] for at in chosen):
            turns.seats.append((match.start, match.number, agent, match.game.round))


def collected(turns: Turns, matches: list[Match], branches: dict | None = None) -> Rollouts:
    """The turns as rollouts: rewards are what the agent earned in the round.

    Facts: `seat` (B, 4); `other` (B, 1), what the other agent earned; `alternatives` (B, A), returns of the branches of
    the turn's round, where there are some.
    """
    together = joined(turns.rollouts)
    payoffs = {match.number: match.game.payoffs for match in matches}
    earned = torch.tensor([[payoffs[m][t][a], payoffs[m][t][1 - a]] for _, m, a, t in turns.seats])
    facts = {"seat": torch.tensor(turns.seats), "other": earned[:, 1:]}
    if branches:
        facts["alternatives"] = torch.tensor([branches[m, a, t] for _, m, a, t in turns.seats])
    unread = sum(match.game.unread for match in matches) / sum(match.game.moves for match in matches)
    return dataclasses.replace(together, scores=(earned[:, 0].contiguous(), {"unread": unread}), facts=facts)


def branched(turns: Turns, speakers: tuple[Speaker, Speaker], *, count: int, gamma: float, agents=(0, 1)) -> dict:
    """Returns of `count` other moves at each round: one of `agents` alone draws anew, and the game goes on from there.

    Returns:
        (match, agent, round) -> [discounted returns, from that round on, of each alternative]. Cost: for each match,
        agent and round `count` games to play, each as long as what is left of it.
    """
    tried, places = [], []
    for match, game, said in turns.before:
        for agent in agents:
            for _ in range(count):
                tried.append(Match(game.copied(), told={1 - agent: said[1 - agent]}))
                places.append((match.number, agent, game.round))
    play(tried, speakers, kept=lambda match, agent: False)
    found: dict[tuple, list[float]] = {}
    for match, (number, agent, at) in zip(tried, places, strict=True):
        payoffs = match.game.payoffs[at:]
        total = sum(gamma**step * points[agent] for step, points in enumerate(payoffs))
        found.setdefault((number, agent, at), []).append(total)
    return found


@dataclass(frozen=True)
class Arena:
    """The slots of games: starts of games as prompts, matches as rollouts, and how the policy does against others.

    Args:
        make: (seed) -> a Game.
        size: matches of each start.
        seed: of the starts.
        past: whom the policy plays against, once there are some; until then against itself.
        alternatives: other moves tried at each round of each agent's, for the shaping weights.
        gamma: discount of their returns.
        chat: put what an agent reads through the model's chat template.
    """

    make: Callable
    size: int
    seed: int
    past: PastSelves
    alternatives: int = 0
    gamma: float = 1.0
    chat: bool = False

    @classmethod
    def of(cls, config, make: Callable, *, past: int, every: int, alternatives: int, gamma: float) -> Arena:
        """That of a resolved configuration, with up to `past` selves kept, one in `every` steps."""
        selves = PastSelves(most=past, every=every, seed=config.seed)
        return cls(make, config.group_size, config.seed, selves, alternatives, gamma, config.chat)

    def starts(self, step: int, count: int) -> list[Prompt]:
        """Prompts of a step: a seed of chance each, which all matches of a start share."""
        seeds = [far_seed(self.seed, step, at) for at in range(count)]
        return [Prompt(self.make(seed).text(0), metadata={"seed": seed, "step": step}) for seed in seeds]

    def rollout(self, policy, starts: list[Prompt]) -> Rollouts:
        """Play every start `size` times; the policy's own turns are the rollouts.

        Against its past it is agent 0 of every other start and agent 1 of the rest.
        """
        step, matches = starts[0].metadata["step"], []
        for at, start in enumerate(starts):
            games = [self.make(start.metadata["seed"]) for _ in range(self.size)]
            matches += [Match(game, at, at * self.size + number) for number, game in enumerate(games)]
        rival, own = self.past.drawn(step), self.speaker(policy)
        if rival is None:
            tables = [(matches, (own, own), (0, 1))]
        else:
            other = self.speaker(policy, rival)
            sides = [[match for match in matches if match.start % 2 == side] for side in (0, 1)]
            tables = [(sides[0], (own, other), (0,)), (sides[1], (other, own), (1,))]
        turns, branches = Turns([], [], []), {}
        for some, speakers, seats in tables:
            played = play(some, speakers, kept=lambda _, agent, seats=seats: agent in seats, meet=self.alternatives > 0)
            if self.alternatives:
                how = {"count": self.alternatives, "gamma": self.gamma}
                branches |= branched(played, speakers, agents=seats, **how)
            turns.rollouts.extend(played.rollouts)
            turns.seats.extend(played.seats)
        self.past.keep(policy, step)
        return collected(turns, matches, branches)

    def evaluate(self, policy, _held_out: list[Prompt], count: int = 8) -> dict[str, float]:
        """What a round earns in `count` games with itself and with one who is always greedy, and what that one gets."""
        own = self.speaker(policy, stream=evaluation.EVALUATION)
        found = {}
        for name in ("self", "greedy"):
            games = [self.make(far_seed(self.seed, 0, at)) for at in range(count)]
            other = own if name == "self" else scripted(games[0].greedy)
            play([Match(game) for game in games], (own, other), kept=lambda match, agent: False)
            earned = torch.tensor([game.payoffs for game in games]).mean((0, 1))
            found |= {f"payoff_{name}": float(earned[0]), f"payoff_of_{name}": float(earned[1])}
        return found

    def speaker(self, policy, which: int | None = None, stream: int | None = None) -> Speaker:
        """The policy as it is, or as it was at a step that is kept."""

        def speak(prompts: list[Prompt], games: list[Game]) -> Rollouts:
            if self.chat:
                turns = [[{"role": "user", "content": each.text}] for each in prompts]
                prompts = [Prompt(templated(policy.tokenizer, each)) for each in turns]
            with contextlib.nullcontext() if which is None else speaking(policy, self.past.weights[which]):
                return policy.generate(prompts, stream=stream)

        return speak
