"""Rollouts drawn ahead: from which weights, while what runs, and the same numbers again, after a stop too."""

import copy
import dataclasses
import threading

import pytest
import tiny_runs
import torch
from tiny_runs import numbers, rows, run

from fuserl.engine import adapters, catalogue, generation, learners, loop, sources
from fuserl.engine.ahead import Ahead
from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.losses import rollout_mean
from fuserl.engine.rewards import RewardError

SHORT = "tiny_runs:shortness"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def made(tmp_path, **changes):
    """The policy, the recipe and the resolved configuration of a run that has not begun."""
    config = tiny_runs.config(tmp_path, "run", reward=SHORT, **changes).resolved()
    recipe = catalogue.recipe(config)
    return learners.of(config, recipe)[0], recipe, config


def same(one: Rollouts, other: Rollouts) -> bool:
    """Whether all of two rollouts is the same."""
    fields = [(getattr(one, each.name), getattr(other, each.name)) for each in dataclasses.fields(Rollouts)]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b)) if at == 1 else a == b
        for at, (a, b) in enumerate(fields)
        if at < 8
    )


def disturb(policy):
    """An update, as far as those who draw can tell."""
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter.add_(0.5 * torch.randn_like(parameter))
    policy.optimizer.count += 3


@pytest.mark.parametrize("rank", [0, 2])
def test_the_weights_at_the_start_of_a_step_draw_the_next_ones(tmp_path, rank):
    policy, recipe, config = made(tmp_path, overlap=True, lora_rank=rank)
    drawn, weights = [], []
    with Ahead(policy, recipe, overlap=True) as ahead:
        for step in range(1, 5):
            weights.append(copy.deepcopy(adapters.base(policy.model)))
            drawn.append(ahead.take(step))
            disturb(policy)  # while the next ones are drawn
    settings = vars(policy.sampling)
    for number, (rollouts, facts) in enumerate(drawn):
        expected = generation.generate(
            weights[max(number - 1, 0)], policy.tokenizer, recipe.prompts(number + 1), **settings,
            group_size=config.group_size, seed=(config.seed << 32) + number + 1,
        )  # fmt: skip
        assert same(rollouts, expected), number
        assert facts["staleness"] == (3 if number else 0)


def test_the_next_ones_are_drawn_while_this_steps_are_learnt_from(tmp_path):
    policy, recipe, _ = made(tmp_path, overlap=True)
    learning, seen = threading.Event(), []

    def rollout(actor, prompts):
        if threading.current_thread() is not threading.main_thread():
            seen.append(learning.wait(60))
        return recipe.rollout(actor, prompts)

    with Ahead(policy, dataclasses.replace(recipe, rollout=rollout), overlap=True) as ahead:
        ahead.take(1)
        learning.set()
        assert ahead.waiting()[0] == 2
    assert seen == [True]


def test_rollouts_of_prompts_that_were_not_given_are_refused(tmp_path):
    policy, recipe, _ = made(tmp_path, overlap=True)
    other = dataclasses.replace(
        recipe, rollout=lambda actor, prompts: recipe.rollout(actor, [dataclasses.replace(each) for each in prompts])
    )
    with Ahead(policy, other, overlap=True) as ahead:
        ahead.take(1)
        assert ahead.waiting() is None and ahead.state_dict() == {}
        with pytest.raises(ValueError, match="of prompts that it was given"):
            ahead.take(2)


def test_a_copy_shares_what_is_frozen(tmp_path):
    policy, _, _ = made(tmp_path, overlap=True, lora_rank=2)
    theirs = dict(policy.source._copy.named_parameters())
    for name, parameter in adapters.base(policy.model).named_parameters():
        assert (theirs[name] is parameter) == (not parameter.requires_grad), name


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "ppo", "gspo"])
def test_a_seed_repeats_and_rows_say_how_old(tmp_path, recipe):
    first, again = (
        numbers(run(tmp_path, name, recipe=recipe, reward=SHORT, overlap=True, minibatches=2, steps=4)) for name in "ab"
    )
    steps = [row for row in first if "tokens" in row]
    ages = [row["staleness"] for row in steps]
    assert first == again and ages[:2] == [0, 2] and {*ages[2:]} <= {0, 1, 2}  # fewer where a minibatch taught nothing
    assert steps[0]["importance"] == pytest.approx(1.0, abs=1e-4) != steps[1]["importance"]


def test_without_overlap_nothing_is_stale(tmp_path):
    steps = [row for row in run(tmp_path, "run", reward=SHORT) if "tokens" in row]
    assert [row["staleness"] for row in steps] == [0, 0, 0] and not any("ahead_s" in row for row in steps)


def test_what_was_drawn_ahead_comes_back_from_a_checkpoint(tmp_path):
    policy, recipe, _ = made(tmp_path, recipe="dapo", overlap=True, attempts=2)
    with Ahead(policy, recipe, overlap=True) as ahead:
        ahead.take(1)
        kept = ahead.state_dict()
        step, rollouts = ahead.waiting()
        disturb(policy)
        expected, facts = ahead.take(2)
        calls = policy.calls
    other, recipe, _ = made(tmp_path, recipe="dapo", overlap=True, attempts=2)
    with Ahead(other, recipe, overlap=False) as ahead:
        ahead.load_state_dict(kept)
        other.optimizer.count = policy.optimizer.count
        got, found = ahead.take(2)
    assert step == 2 and same(got, rollouts) and same(got, expected) and facts == found and calls == other.calls
    assert torch.equal(got.scores[0], expected.scores[0]) and got.scores[1] == expected.scores[1]


@pytest.mark.parametrize("changes", [{"groups": 1}, {"few_shot": 1}, {"seed": 5}])
def test_rollouts_of_other_prompts_are_left_out(tmp_path, changes, capsys):
    policy, recipe, _ = made(tmp_path, overlap=True)
    with Ahead(policy, recipe, overlap=True) as ahead:
        ahead.take(1)
        kept = ahead.state_dict()
    policy, recipe, _ = made(tmp_path, overlap=True, **changes)
    with Ahead(policy, recipe, overlap=True) as ahead:
        ahead.load_state_dict(kept)
        assert ahead.waiting() is None and "their prompts have changed" in capsys.readouterr().err
        assert ahead.take(2)[1]["staleness"] == 0


def test_overlap_can_be_turned_on_and_off_at_a_resume(tmp_path):
    folder = tmp_path / "run"
    for steps, overlap in ((2, False), (4, True), (6, False)):
        config = tiny_runs.config(tmp_path, "run", reward=SHORT, steps=steps, overlap=overlap, eval_problems=0)
        loop.train(config, resume=folder if folder.exists() else None)
    assert [row["staleness"] for row in rows(folder)] == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("recipe", ["grpo", "dapo"])
def test_a_reward_that_fails_loses_nothing_that_was_drawn(tmp_path, recipe, monkeypatch):
    works, calls, on_trial = tiny_runs.shortness, [], 2

    def failing(completion):  # grpo calls it here, at its second step; dapo's rollout in the background, of that step
        calls.append(completion)
        ahead = threading.current_thread() is not threading.main_thread()
        return torch.nan if ahead or (recipe == "grpo" and len(calls) > on_trial + 8) else works(completion)

    settings = dict(recipe=recipe, eval_problems=0, overlap=True, save_every=1)
    with monkeypatch.context() as patch, pytest.raises(RewardError, match=r"finite.*rollout 0") as error:
        patch.setattr(tiny_runs, "shortness", failing)
        run(tmp_path, "run", reward=SHORT, **settings)
    folder = tmp_path / "run"
    assert [row["step"] for row in rows(folder)] == [1]
    assert len((folder / "failed-step-2.jsonl").read_text().splitlines()) == 8
    ahead = folder / "failed-step-3.jsonl"
    assert ahead.exists() == (recipe == "grpo")  # dapo's own rollout, of step 2, is what failed
    assert len(error.value.__notes__) >= 2 and (recipe == "dapo" or str(ahead) in " ".join(error.value.__notes__))
    resumed = loop.train(tiny_runs.config(tmp_path, "run", reward=SHORT, **settings), resume=folder)
    whole = run(tmp_path, "whole", reward=SHORT, **settings)
    if recipe == "grpo":  # whose rollouts of step 2 were kept; those of dapo are drawn anew
        assert numbers(rows(resumed)) == numbers(whole)


# Completions are given, or weights are part of the system.
OTHERS = ("sft", "dpo", "reward_model", "vpo", "r_to_q", "rover", "kl_bayes", "c_grpo", "sdpo")


@pytest.mark.parametrize("name", [name for name in catalogue.RECIPES if name not in OTHERS])
def test_every_recipe_that_draws_takes_weights(tmp_path, name):
    _, plain, _ = made(tmp_path, recipe=name)
    _, weighed, config = made(tmp_path, recipe=name, overlap=True)
    assert config.importance == "truncate" and config.reasons["importance"] == "rollouts are one step old"
    assert plain.loss.weighed is not None and weighed.loss.weighed is None
    assert weighed.loss.scope == plain.loss.scope


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_stale_token_weighs_what_its_two_logprobs_say(tmp_path, kind):
    policy, recipe, _ = made(tmp_path, overlap=True, importance=kind, importance_bound=1.5)
    with Ahead(policy, recipe, overlap=True) as ahead:
        ahead.take(1)
        ahead.wait()
        disturb(policy)
        rollouts = ahead.take(2)[0]
    batch = batch_of(rollouts, torch.zeros(len(rollouts))).with_advantages(torch.linspace(-1, 2, len(rollouts)))
    weight = (policy.score(batch, ["old_logprobs"]).old_logprobs - rollouts.rollout_logprobs).exp()
    inside = weight.where((weight >= 1 / 1.5) & (weight <= 1.5), 0.0)
    weight = weight.clamp(max=1.5) if kind == "truncate" else inside
    expected = -(weight * batch.advantages * rollout_mean(batch)).sum()  # the ratio of an update's only step is 1
    found = policy.update(batch, recipe.loss)
    assert ((weight == 1.5) | (weight == 0)).any() and found["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert found["importance"] == pytest.approx(float(weight.mean()), abs=1e-5)


@pytest.mark.parametrize("setting", [{"overlap": True}, {"importance": "mask"}])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_recipes_of_given_completions_refuse(tmp_path, recipe, setting):
    with pytest.raises(ValueError, match=r"must draw completions|must be one that takes weights"):
        run(tmp_path, "run", recipe=recipe, **setting)


def test_weights_change_what_is_learnt_from_stale_rollouts_alone(tmp_path):
    fresh, stale = (
        [
            numbers(run(tmp_path, f"{kind}{overlap}", reward=SHORT, overlap=overlap, importance=kind, steps=4))
            for kind in ("none", "truncate", "mask")
        ]
        for overlap in (False, True)
    )
    assert stale[0] != stale[1] != stale[2] != stale[0]
    rewards = [[row["reward"] for row in numbers if "reward" in row] for numbers in fresh]
    assert rewards[0] == rewards[1] == rewards[2]


def test_a_source_is_chosen_by_the_settings(tmp_path):
    assert type(made(tmp_path)[0].source) is sources.Own
    assert type(made(tmp_path, overlap=True)[0].source) is sources.Behind
    assert type(made(tmp_path, recipe="ppo", overlap=True, separate_critic=True)[0].source) is sources.Behind


def test_evaluations_are_of_the_weights_as_they_are(tmp_path):
    policy, recipe, config = made(tmp_path, overlap=True, eval_problems=4)
    policy.sync()
    disturb(policy)
    held_out = recipe.prompts(1)
    seen = []
    judged = dataclasses.replace(recipe, reward=lambda rollouts: seen.append(rollouts) or recipe.reward(rollouts))
    loop.evaluated(policy, judged, held_out, 0)
    greedy = vars(policy.sampling) | {"temperature": 0.0}
    expected = generation.generate(
        adapters.base(policy.model), policy.tokenizer, held_out, **greedy, seed=config.seed << 32
    )
    assert same(seen[0], expected)
