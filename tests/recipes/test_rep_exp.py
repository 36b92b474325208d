"""rep_exp: without the bonus it is GRPO; the bonus is that of the features, gated and normalised as asked."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import config, gradient, ragged, recipe
from tiny_runs import numbers, run

from fuserl.engine import elliptical, loop
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Rollouts
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.problems import far_seed

HALF = "tiny_runs:shortness"


def batch(seed=0, step=1):
    """Nine rollouts of three prompts: all wrong, some right, all right; features of 12 dimensions."""
    found = ragged((3, 1, 2, 2, 3, 1, 4, 1, 2), (0, 0, 0, 1, 1, 1, 2, 2, 2), seed=seed)
    features = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed))
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 1, 1, 1, 1])
    prompts = [torch.tensor([group]) for group in range(3)]
    return found.replace(rewards=rewards, facts={"features": features}, step=step, prompt_tokens=prompts)


def bonuses(tmp_path, given=None, **options):
    given = batch() if given is None else given
    return recipe(tmp_path, "rep_exp", k=2, **options).advantage(given).facts["bonus"]


def plain(given, seed, k=2, lamb=0.01):
    h = given.facts["features"].double() @ elliptical.sparse_projection(12, k, seed=seed)
    return torch.cat([elliptical.leverages(h[group : group + 3], lamb) for group in (0, 3, 6)])


ON = dict(off_if_none_correct=False)


def test_without_a_bonus_it_is_grpo_with_a_token_mean(tmp_path):
    given, ours = batch(), recipe(tmp_path, "rep_exp", bonus=0.0)
    assert torch.equal(ours.advantage(given).advantages, given.to_tokens(standardized(given)))
    logprob = given.old_logprobs + torch.linspace(-1, 1, 19)
    advantages = given.with_advantages(standardized(given))
    leaf = logprob.clone().requires_grad_()
    expected = clipped(reduce=token_mean)(SimpleNamespace(logprob=leaf), advantages)[0].sum()
    assert torch.equal(gradient(ours, given, logprob), torch.autograd.grad(expected, leaf)[0])
    assert ours.reads == ("features",) and ours.loss.reads == ()


def test_the_bonus_is_that_of_projected_features_and_in_the_reward(tmp_path):
    given = batch()
    expected = plain(given, far_seed(0, 1))
    got = bonuses(tmp_path, **ON)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    advantage = recipe(tmp_path, "rep_exp", k=2, a=0.5, bonus=0.2, **ON).advantage(given).advantages
    shaped = given.replace(rewards=0.5 * given.rewards + 0.2 * expected.float())
    torch.testing.assert_close(advantage, given.to_tokens(standardized(shaped)))


@pytest.mark.parametrize(
    ("gate", "kept"),
    [
        ({}, [0, 0, 0, 1, 1, 1, 1, 1, 1]),
        ({**ON, "off_if_some_correct": True}, [1, 1, 1, 0, 0, 0, 0, 0, 0]),
        ({**ON, "off_if_all_correct": True}, [1, 1, 1, 1, 1, 1, 0, 0, 0]),
        ({**ON, "off_if_wrong": True}, [0, 0, 0, 1, 0, 1, 1, 1, 1]),
    ],
)
def test_gates(tmp_path, gate, kept):
    assert torch.equal(bonuses(tmp_path, **gate), bonuses(tmp_path, **ON) * torch.tensor(kept))


def test_forms_of_the_bonus(tmp_path):
    b = bonuses(tmp_path, **ON)
    torch.testing.assert_close(bonuses(tmp_path, loo=True, **ON), b / (1 - b), rtol=1e-12, atol=0)
    scaled, score = (bonuses(tmp_path, normalisation=name, **ON) for name in ("std", "z_score"))
    spread = b.std(correction=0) + 1e-8
    torch.testing.assert_close(scaled, b / spread, rtol=1e-12, atol=0)
    torch.testing.assert_close(score, (b - b.mean()) / spread, rtol=1e-12, atol=1e-12)
    assert not torch.equal(bonuses(tmp_path, lamb=1.0, **ON), b)
    assert not torch.equal(bonuses(tmp_path, batch(step=2), **ON), b)
    fixed = [bonuses(tmp_path, batch(step=step), redraw=False, **ON) for step in (1, 2)]
    assert torch.equal(*fixed) and torch.equal(fixed[0], plain(batch(), 0))
    with pytest.raises(ValueError, match="normalisation must be one of none, std, z_score"):
        recipe(tmp_path, "rep_exp", normalisation="zscore")


def test_a_lasting_covariance_remembers_prompts(tmp_path):
    ours = recipe(tmp_path, "rep_exp", k=2, lasting=True, **ON)
    first = ours.advantage(batch()).facts["bonus"]
    assert torch.equal(first, plain(batch(), 0))
    again = ours.advantage(batch(step=2)).facts["bonus"]
    assert (again < first).all() and len(ours.state["covariances"].known) == 3


def test_a_bonus_that_tells_nothing_is_warned_of(tmp_path, capsys):
    wide = batch().replace(facts={"features": 100 * torch.randn(9, 12)})
    ours = recipe(tmp_path, "rep_exp", k=32)
    ours.advantage(wide)
    assert "bonuses should tell responses apart; within a prompt they differ by at most" in capsys.readouterr().err
    ours.advantage(wide)
    recipe(tmp_path, "rep_exp", k=2).advantage(batch())
    assert not capsys.readouterr().err


class Pool:
    """A policy whose responses to each prompt lie in two places, of which the rare one is right."""

    def generate(self, asked, *, group_size, stream):
        texts = ["1" if b % group_size == group_size - 1 else "x" for b in range(len(asked) * group_size)]
        count = len(texts)
        return Rollouts(
            prompts=asked,
            prompt_tokens=[torch.tensor([1])] * len(asked),
            group=torch.arange(len(asked)).repeat_interleave(group_size),
            tokens=torch.zeros(count, dtype=torch.int64),
            offsets=torch.arange(count + 1),
            rollout_logprobs=torch.zeros(count),
            texts=texts,
            finish=["stop"] * count,
        )

    def score(self, given, fields):
        assert fields == ["features"]
        places = torch.eye(12)[(given.rewards >= 1).long()]
        return given.replace(facts={"features": places + 0.01 * torch.arange(len(given.group))[:, None]})


def test_selection_sends_novel_responses_to_the_verifier_first(tmp_path):
    ours = recipe(tmp_path, "rep_exp", pool=16, select=2)
    one = [prompt for prompt in ours.prompts(1) if prompt.answer == "1"] or ours.prompts(1)[:1]
    found = ours.evaluate(Pool(), [dataclasses.replace(one[0], answer="1")])
    assert found["calls"] <= 2 and found["calls_random"] == 17 / 2 and found["selected@2"] == 1
    assert found["random@2"] == pytest.approx(2 / 16) and found["calls_ratio"] == found["calls"] / 8.5
    none = ours.evaluate(Pool(), [dataclasses.replace(one[0], answer="no")])
    assert none["calls"] == none["calls_random"] == 16 and none["selected@2"] == 0
    assert recipe(tmp_path, "rep_exp").evaluate is None
    with pytest.raises(ValueError, match=r"select must be an integer in \[1, 3\]"):
        recipe(tmp_path, "rep_exp", pool=3)
    assert config(tmp_path, "rep_exp").options["k"] == 32


def test_a_run_logs_bonuses_selects_and_resumes(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(
        recipe="rep_exp", reward=HALF, k=2, bonus=0.1, pool=4, select=2, lasting=True, off_if_none_correct=False,
        steps=3, save_every=2, eval_every=0,
    )  # fmt: skip
    whole = run(tmp_path, "whole", **settings)
    steps = [row for row in whole if "tokens" in row]
    assert all(0 < row["bonus"] < 1 for row in steps) and {"calls", "selected@2"} <= whole[0].keys()
    folder = loop.train(tiny_runs.config(tmp_path, "run", **{**settings, "steps": 2}))
    loop.train(tiny_runs.config(tmp_path, "run", **settings), resume=folder)
    assert numbers(tiny_runs.rows(folder))[-2:] == numbers(whole)[-2:]
    plain = numbers(run(tmp_path, "plain", **{**settings, "bonus": 0.0}))
    assert plain != numbers(whole)
