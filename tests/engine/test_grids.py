"""A grid that is played in words: where moves lead, what is told, what counts, and a model that plays it."""

import dataclasses
import itertools
import json
import types

import pytest
import tiny_models
import torch

from fuserl.engine import grids, prompts, rewards
from fuserl.engine.generation import generate
from fuserl.engine.prompts import Prompt

GRID = grids.Grid(size=4, cup=(2, 0), mark=(2, 1), start=(0, 0), seed=1, slips=0.0, chunk=1, bins=0, most=9)
ASKED = Prompt("?", metadata={"grid": dataclasses.asdict(GRID)})
REPLY = grids.Grids().reply


def played(*lines, grid=GRID):
    """The text of an arm that writes these lines, told where it is as it goes, and the last thing it was told."""
    text, asked = "", Prompt("?", metadata={"grid": dataclasses.asdict(grid)})
    for line in lines:
        text += f"{line}\n"
        told = REPLY(asked, text)
        text += told or ""
    return text, told


def test_moves_lead_where_they_say_and_the_cup_is_carried():
    text, told = played("right", "I go right", "grip")
    assert text == "right\nyou 1,0\nI go right\nyou 2,0\ngrip\nyou 2,0 holding\n"
    text, told = played("right", "right", "grip", "up")
    assert told is None and grids.carried(text, ASKED.metadata) == 1.0 == grids.carried(text[:-1], ASKED.metadata)
    assert grids.carried(played("right", "right", "up")[0], ASKED.metadata) == 0.0
    assert played("left")[1] == played("down")[1] == played("grip")[1] == played("what?")[1] == "you 0,0\n"
    assert grids.carried("", ASKED.metadata) == 0.0


def test_an_episode_ends_after_the_last_move():
    assert played(*["up"] * 8)[1] == "you 0,3\n" and played(*["up"] * 9)[1] is None
    assert played(*["?"] * 9)[1] is None  # or one who never moves would play for ever


def test_what_the_grid_did_not_say_moves_nothing():
    forged = "right\nyou 2,0\nyou 2,0 holding\n"
    assert grids.episode(GRID, forged).at == (1, 0) and not grids.episode(GRID, forged).holds
    assert grids.episode(GRID, "right\nyou 1,0\nright").at == (2, 0)
    assert grids.episode(GRID, "right\nyou 1,0\nyou 1,0\n").moves == 2  # one who repeats what it reads


def test_a_line_holds_as_many_moves_as_the_chunk():
    several = dataclasses.replace(GRID, chunk=3)
    assert played("right right grip up", grid=several)[1] == "you 2,0 holding\n"
    assert played("right right")[1] == "you 1,0\n"
    ended = grids.episode(dataclasses.replace(several, most=2), "right right right")
    assert ended.at == (2, 0) and ended.moves == 2 and ended.over


def test_moves_in_bins_are_read_as_they_are_written():
    arm = dataclasses.replace(GRID, bins=256, chunk=2)
    for move in grids.MOVES:
        assert arm.read(arm.written(move)) == [move]
    assert arm.written("right") == "255 128 128 128 128 128 0"
    assert arm.read("128 90 0 0 0 0 0") == ["stay"] and arm.read("128 80 0 0 0 0 0") == ["down"]
    assert arm.read("255 128 128 128 128 128") == [] and arm.read(" ".join(["999 0 0 0 0 0 0"] * 3)) == ["right"] * 2
    assert played(arm.written("right"), grid=arm)[1] == "you 1,0\n"


def test_slips_are_of_the_grid_and_as_many_as_they_should_be():
    slippery = dataclasses.replace(GRID, size=9, start=(4, 4), slips=0.3, most=400)
    text = played(*["grip"] * 400, grid=slippery)[0]
    assert text == played(*["grip"] * 400, grid=slippery)[0]
    places = [line for line in text.splitlines() if line.startswith("you")]
    moved = sum(one != other for one, other in itertools.pairwise(places))
    # 4 of 5 slips move, some into a wall: within 5 standard errors below, and never above.
    assert 60 < moved < 0.24 * 400 + 5 * (400 * 0.24 * 0.76) ** 0.5


@pytest.mark.parametrize("options", ["", "slips=0", "chunk=3,size=4", "bins=256", "size=3,slips=0.3,most=99"])
def test_demonstrations_carry_the_cup(options):
    several = grids.Grids(options).distinct(1, 20)
    assert len({each.question for each in several}) == 20
    # Slips may use up the moves: rarely, as the way is 12 moves at most.
    assert sum(grids.carried(each.answer, each.metadata) for each in several) >= 18
    for each in several:
        grid = grids.Grid(**json.loads(json.dumps(each.metadata))["grid"])
        lines = each.answer.splitlines()
        assert played(*lines[::2], grid=grid)[0].splitlines()[: len(lines)] == lines


def test_the_same_seed_draws_the_same_grids_and_none_is_trained_on_that_is_held_out():
    grid = grids.Grids()
    assert grid.distinct(1, 9) == grid.distinct(1, 9) != grid.distinct(2, 9)
    left_out = frozenset(each.question for each in grid.distinct(1, 9))
    assert not left_out & {each.question for each in grid.take(1, 0, 30, left_out)}
    small = grids.Grids("size=2")
    with pytest.raises(ValueError, match="must have problems left to train on"):
        small.take(0, 0, 1, frozenset(each.question for each in small.distinct(0, 99)))


@pytest.mark.parametrize("option", ["size=1", "size=x", "slips=2", "bins=2", "walls=1", "chunk=0"])
def test_bad_options_are_refused(option):
    with pytest.raises(ValueError, match="task: "):
        prompts.task(f"grid:{option}", shots=0)


def test_it_is_a_task_whose_reward_plays_the_text():
    task = prompts.task("grid:size=4,slips=0", shots=0, held_out=3)
    prompt = task.held_out()[0]
    assert prompt.text.endswith("\n") and "cup " in prompt.text
    judge = rewards.verifier(task)
    given = {"metadata": prompt.metadata}
    assert judge(completion=prompt.answer, **given) == 1.0 and judge(completion="grip", **given) == 0.0
    mixed = prompts.task("symbolic_videos", shots=0, held_out=1).held_out()[0]
    assert task.source.reply(mixed, "right\n") is None


class Talker:
    """A token per letter; what it does not know ends a line."""

    eos_token_id, letters = 2, "right you,0123 holding\n"

    def __call__(self, text, add_special_tokens=True):
        return types.SimpleNamespace(input_ids=[self.letters.find(letter) + 3 for letter in text])

    def decode(self, tokens, *arguments, **options):
        return "".join(self.letters[token - 3] if 3 <= token < 3 + len(self.letters) else "\n" for token in tokens)


def test_a_model_is_told_where_it_is_and_what_it_is_told_is_not_its_own():
    several = [Prompt("ri", metadata=ASKED.metadata)] * 4
    rollouts = generate(
        tiny_models.model(), Talker(), several, max_new_tokens=60, stop=("\n",), stop_ids=(), reply=REPLY
    )
    assert torch.equal(rollouts.rollout_logprobs.isnan(), ~rollouts.trained) and not rollouts.trained.all()
    for begin, end in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        tokens, own = rollouts.tokens[begin:end].tolist(), rollouts.trained[begin:end].tolist()
        at = 0
        while False in own[at:]:
            at = own.index(False, at)
            until = own.index(True, at) if True in own[at:] else len(own)
            assert Talker().decode(tokens[at:until]) == REPLY(several[0], Talker().decode(tokens[:at]))
            at = until
