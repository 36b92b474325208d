"""arena_rl: a group's advantages come from a tournament, whoever judges it, and held-out problems from the verifier."""

import dataclasses

import pytest
import tiny_runs
import torch
from batches import config, made, recipe

from fuserl.engine import checks, judges, tournaments
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import batch_of
from fuserl.engine.meter import Meter
from fuserl.engine.rollouts import beside
from fuserl.engine.toys import arena_rl as toy


class Told:
    """A policy whose completions are given: greedy ones are capitals."""

    def __init__(self, *texts):
        self.texts, self.meter = texts, Meter()

    def generate(self, asked, *, group_size, greedy=False):
        texts = ["G"] * group_size if greedy else [*self.texts[:group_size]]
        group = torch.arange(len(asked)).repeat_interleave(group_size)
        return dataclasses.replace(made(["?"] * len(asked), group, texts * len(asked)), prompts=asked)


def longer(messages):
    """A judge of texts: the longer the better."""
    said = messages[0]["content"]
    first, second = (
        said.partition(f"<{name}-")[2].partition("\n")[2].partition("\n</")[0] for name in ("first", "second")
    )
    return f'{{"first": {min(10, 1 + len(first))}, "second": {min(10, 1 + len(second))}}}'


def test_without_noise_the_advantage_is_that_of_the_true_ranks():
    """The limit: GRPO's advantage for rewards that are the true ranks, bit for bit."""
    batch = checks.example((1,) * 16, group_size=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    reward = tournaments.tournament(toy.Noisy(0.0), "single_elimination", "")
    found = toy.asyncio.run(reward("", [str(each) for each in order], None, {}))
    ranked = batch.replace(rewards=torch.tensor([each["reward"] for each in found]))
    truth = batch.replace(rewards=torch.tensor([each / 15 for each in order]))
    expected = (truth.rewards - truth.rewards.mean()) / (truth.rewards.std() + 1e-6)
    assert torch.allclose(standardized(ranked), expected, atol=1e-6)
    assert torch.equal(ranked.rewards.argsort(), truth.rewards.argsort())


@pytest.mark.parametrize("topology", tournaments.TOPOLOGIES)
def test_training_rewards_are_the_standing_and_held_out_ones_the_verifiers(topology, tmp_path):
    arena = recipe(tmp_path, "arena_rl", groups=2, group_size=4, topology=topology, judge=f"{__name__}:longer")
    rollouts = arena.rollout(Told("a", "aaaa", "aa", "aaa"), arena.prompts(1))
    rewards, facts = rollouts.scores
    assert rewards.view(2, 4).argmax(1).tolist() == [1, 1] and rewards.view(2, 4).argmin(1).tolist()[0] in (0, 2)
    assert rollouts.facts["points"][1] == 10 and rollouts.facts["matches"][0] == rollouts.facts["matches"][3]
    assert facts["judge_unread"] == facts["judge_fallbacks"] == 0
    advantage = arena.advantage(batch_of(rollouts, rewards))
    assert torch.allclose(advantage.view(2, 4).mean(1), torch.zeros(2), atol=1e-6)
    assert (
        arena.reward(dataclasses.replace(rollouts, texts=[p.answer for p in rollouts.prompts for _ in range(4)]))[
            0
        ].tolist()
        == [1.0] * 8
    )
    arena.rollout.close()


def test_without_a_judge_the_verifier_is_one(tmp_path):
    arena = recipe(tmp_path, "arena_rl", groups=1, group_size=4)
    [prompt] = arena.prompts(1)
    rewards, facts = arena.rollout(Told("x", prompt.answer, "y", "z"), [prompt]).scores
    assert rewards.argmax() == 1 and facts["judge_calls"] > 0
    assert arena.rollout(Told("x", "u", "y", "z"), [prompt]).scores[0].tolist() == [0] * 4  # nothing to tell apart
    arena.rollout.close()


def test_the_rubric_reaches_the_judge(tmp_path, monkeypatch):
    seen = []

    async def noted(self, prompt, first, second, *, rubric, **others):
        seen.append(rubric)
        return 1.0, 2.0

    monkeypatch.setattr(judges.Judge, "both_orders", noted)
    for rubric in ("Be brief.", None):
        arena = recipe(tmp_path, "arena_rl", groups=1, group_size=2, rubric=rubric, judge=f"{__name__}:longer")
        arena.rollout(Told("a", "b"), arena.prompts(1))
        arena.rollout.close()
    assert set(seen) == {"Be brief.", tournaments.RUBRIC}


def test_the_greedy_completion_may_seed_the_others(tmp_path):
    arena = recipe(tmp_path, "arena_rl", groups=2, group_size=3, anchor="greedy", judge=f"{__name__}:longer")
    rollouts = arena.rollout(Told("aa", "aaa"), arena.prompts(1))
    assert rollouts.texts == ["G", "aa", "aaa"] * 2 and rollouts.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rollouts.scores[0].tolist() == [0, 0.5, 1] * 2
    arena.rollout.close()
    alone = recipe(tmp_path, "arena_rl", groups=2, group_size=1, anchor="greedy", judge=f"{__name__}:longer")
    assert alone.rollout(Told(), alone.prompts(1)).texts == ["G", "G"]
    alone.rollout.close()


def test_beside_keeps_each_prompts_completions_together():
    one = made(["p", "q"], torch.tensor([0, 1]), ["aa", "b"])
    two = made(["p", "q"], torch.tensor([0, 0, 1, 1]), ["c", "dd", "e", "f"])
    two = dataclasses.replace(two, prompts=one.prompts)
    both = beside(one, two)
    assert both.texts == ["aa", "c", "dd", "b", "e", "f"] and both.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert [chr(token) for token in both.tokens] == list("aacddbef") and both.offsets.tolist() == [0, 2, 3, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="same prompts"):
        beside(one, made(["p", "r"], torch.tensor([0, 1]), ["a", "b"]))


@pytest.mark.parametrize(("option", "value"), [("topology", "knockout"), ("anchor", "best")])
def test_unknown_words_are_refused(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"arena_rl: {option} must be one of"):
        recipe(tmp_path, "arena_rl", **{option: value})


def test_bounds_reach_the_loss(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="arena_rl", reward="tiny_runs:shortness", steps=1, group_size=4)
    plain = tiny_runs.numbers(tiny_runs.run(tmp_path, "plain", **settings))
    assert any("matches" in row and row["matches"] == 6 for row in plain)
    again = {"epochs": 2, "lr": 0.1}
    runs = [
        tiny_runs.numbers(tiny_runs.run(tmp_path, str(number), **settings, **again, **bounds))
        for number, bounds in enumerate([{}, {"low": 0.01}, {"high": 0.01}])
    ]
    assert runs[0] != runs[1] and runs[0] != runs[2]


def test_its_settings_are_the_papers(tmp_path):
    found = config(tmp_path, "arena_rl")
    assert (found.group_size, found.groups) == (16, 16) and found.options["high"] == 0.28


@pytest.mark.slow
def test_figures_hold_over_a_thousand_groups():
    figures = toy.figures(standardized, count=1000)
    assert all(figure.holds for figure in figures), [str(figure) for figure in figures]
