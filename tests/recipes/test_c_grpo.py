"""c_grpo: right answers earn more with their chain of evidence cited; the agent is answered in training and outside."""

import dataclasses

import pytest
import tiny_runs
import torch
from batches import config, made, recipe

from fuserl.engine import prompts, webs
from fuserl.engine.advantages import standardized
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.meter import Meter
from fuserl.engine.toys import c_grpo as toy


class Told:
    """A policy whose completions are those of the toy's agent that opens these pages."""

    def __init__(self, *pages):
        self.pages, self.meter, self.replies = pages, Meter(), []

    def generate(self, asked, *, group_size, reply, greedy=False, stream=None):
        self.replies.append(reply)
        pages = [each for _ in asked for each in self.pages[:group_size]]
        group = torch.arange(len(asked)).repeat_interleave(group_size)
        texts = [toy.text(asked[at], each) for at, each in zip(group.tolist(), pages, strict=True)]
        rollouts = made(["?"] * len(asked), group, texts)
        return dataclasses.replace(rollouts, prompts=asked, finish=["stop"] * len(texts))


ALL, SHORT, HALF, LOST = [0, 1, 2], [3, 4, 4], [3, 0, 0], [1, 2, 4]
WEB = dict(data=None, task="web:hops=3,others=1", reward=None, reward_workers=0, groups=2, group_size=4)


@pytest.fixture
def made_recipe(tmp_path):
    built = []

    def make(**options):
        built.append(recipe(tmp_path, "c_grpo", **WEB, **options))
        return built[-1]

    yield make
    for each in built:
        each.rollout.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 0.7, 0.8, 0.0]),
        ({"alpha": 0.5}, [1.0, 0.5, 0.5 + 0.5 / 3, 0.0]),
        ({"alpha": 0.0}, [1.0, 1.0, 1.0, 0.0]),
        ({"bonus": "negative"}, [1.0, 1.0, 1.0, 0.0]),
        ({"bonus": "negative", "bfs": False}, [1.0, 1.0, 1.0, 0.3 * 2 / 3]),
        ({"bonus": "both", "bfs": False}, [1.0, 0.7, 0.8, 0.3 * 2 / 3]),
    ],
)
def test_options_reach_the_reward(options, expected, made_recipe):
    ours = made_recipe(**options)
    policy = Told(ALL, SHORT, HALF, LOST)
    rollouts = ours.rollout(policy, ours.prompts(1))
    assert rollouts.scores[0].tolist() == pytest.approx(expected * 2, abs=1e-6)
    assert rollouts.facts["outcome"].tolist() == [1, 1, 1, 0] * 2 and policy.replies == [webs.reply]


def test_the_release_takes_the_share_as_it_is(made_recipe):
    paper, release = (made_recipe(normalize=name) for name in ("paper", "release"))
    got = [
        each.rollout(Told(HALF, SHORT, LOST, LOST), each.prompts(1)).scores[0][:2].tolist() for each in (paper, release)
    ]
    assert got[0] == pytest.approx([1.0, 0.7]) and got[1] == pytest.approx([0.8, 0.7])


def test_with_alpha_0_it_is_grpo(made_recipe):
    """The limit, exactly: the rewards are the outcomes, and the advantage slot is GRPO's."""
    ours = made_recipe(alpha=0.0)
    rollouts = ours.rollout(Told(ALL, SHORT, HALF, LOST), ours.prompts(1))
    assert torch.equal(rollouts.scores[0], rollouts.facts["outcome"]) and ours.advantage is standardized


def test_held_out_problems_are_answered_too_and_judged_by_the_outcome(made_recipe):
    ours = made_recipe()
    policy = Told(SHORT)
    row = ours.evaluate(policy, ours.prompts(1))
    assert row["accuracy"] == 1.0 and policy.replies == [webs.reply]
    assert ours.evaluate(Told(LOST), ours.prompts(1))["accuracy"] == 0.0


@pytest.mark.parametrize(("option", "value"), [("bonus", "all"), ("normalize", "code"), ("alpha", 1.5)])
def test_what_is_out_of_range_is_refused(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"citation_aware: {option} must be"):
        recipe(tmp_path, "c_grpo", **WEB, **{option: value})


def test_tokens_that_another_engine_would_not_have_drawn_are_masked(tmp_path, made_recipe):
    found = config(tmp_path, "c_grpo", **WEB)
    assert (found.importance, found.importance_bound) == ("mask", 2.0) and found.options["high"] == 0.28
    ours, batch = made_recipe(), toy_batch()
    old = batch.rollout_logprobs + torch.tensor([0.0, 0.69, 0.70, -0.69, -0.70, 0.1]).double()
    leaf = old.clone().requires_grad_()
    loss = ours.loss(_out(leaf), batch.replace(old_logprobs=old))[0].sum()
    weights = torch.autograd.grad(loss, leaf)[0] * -6
    expected = torch.tensor([1.0, 0.69, 0, -0.69, 0, 0.1]).double().exp() * torch.tensor([0, 1, 0, 1, 0, 1.0])
    expected[0] = 1.0
    assert torch.allclose(weights, expected, rtol=1e-6)


def toy_batch():
    """One rollout of six tokens with advantage 1."""
    table = toy.Table(torch.zeros(1, 4), length=6)
    batch = table.given(torch.tensor([[0, 1, 2, 3, 0, 1]]), torch.zeros(6, dtype=torch.int64), torch.ones(1), 1)
    return batch.with_advantages(torch.ones(1).double())


def _out(logprob):
    return type("Out", (), {"logprob": logprob})


def test_a_run_without_rubrics(tmp_path, monkeypatch):
    """On sums it is GRPO of outcomes, scaled."""
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="c_grpo", reward="tiny_runs:shortness", steps=2, group_size=8, **tiny_runs.ENDING)
    plain = tiny_runs.numbers(tiny_runs.run(tmp_path, "plain", **settings))
    assert sum("accuracy" in row for row in plain) == 2 and {row["rubric"] for row in plain if "rubric" in row} == {0.0}


def test_the_default_task_is_a_web(tmp_path):
    from fuserl.engine.config import Config

    found = Config(recipe="c_grpo", device="cpu").resolved()
    assert found.task == "web" and found.max_new_tokens == 192 and found.few_shot == 0
    assert "rubrics" in prompts.configured(found).held_out(1)[0].metadata


@pytest.mark.slow
def test_figures_hold_over_five_seeds():
    figures = toy.figures(standardized, clipped(high=0.28, reduce=token_mean), seeds=5)
    assert all(figure.holds for figure in figures), [str(figure) for figure in figures]
