"""self_interference: its greedy pass, skipped steps, its divergence's weight, and the reports of who unlearns whom."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_runs
import torch
from batches import gradient, ragged, recipe
from test_second_models import batch_, policy

from fuserl.engine import catalogue, checks, interference, loop
from fuserl.engine.batch import Rollouts, offsets_of
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.meter import Meter
from fuserl.engine.prompts import Prompt
from fuserl.engine.second_models import Teacher
from fuserl.engine.toys import shared_softmax


def test_without_a_weight_and_the_pass_it_is_grpo(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 0, 1)).replace(ref_logprobs=None)
    plain = recipe(tmp_path, "self_interference", beta=0.0, greedy_pass=False)
    grpo = dataclasses.replace(plain, loss=clipped(reduce=token_mean))
    assert torch.equal(gradient(plain, batch, batch.old_logprobs), gradient(grpo, batch, batch.old_logprobs))
    assert plain.teacher is None and recipe(tmp_path, "self_interference").teacher == Teacher()
    wide = recipe(tmp_path, "self_interference", beta=0.0, greedy_pass=False, low=0.9, high=9.0)
    moved = batch.old_logprobs + 0.5
    assert not torch.equal(gradient(wide, batch, moved), gradient(plain, batch, moved))


@pytest.mark.parametrize("beta", [0.001, 0.3])
def test_the_divergence_has_its_weight(beta, tmp_path):
    made, batch = recipe(tmp_path, "self_interference", beta=beta), ragged((3, 2), (0, 0)).replace(ref_logprobs=None)
    batch = batch.replace(facts={"solved": torch.zeros(2)})
    out = SimpleNamespace(logprob=batch.old_logprobs, forward_kl=torch.arange(5.0))
    credited = checks.credited(batch, made.advantage)
    found = made.loss(out, credited)[0] - clipped(reduce=token_mean)(out, credited)[0]
    torch.testing.assert_close(found, beta * torch.arange(5.0) / 5, rtol=1e-4, atol=1e-6)


class Speaking:
    """A policy that answers greedily what each prompt says, and otherwise two letters of its own."""

    meter = Meter()

    def generate(self, prompts, *, group_size, greedy=False):
        texts = [prompt.metadata["greedy"] if greedy else f"{n}" for prompt in prompts for n in range(group_size)]
        return Rollouts(
            prompts=list(prompts),
            prompt_tokens=[torch.zeros(1, dtype=torch.int64)] * len(prompts),
            group=torch.arange(len(prompts)).repeat_interleave(group_size),
            tokens=torch.zeros(len(texts), dtype=torch.int64),
            offsets=offsets_of(torch.ones(len(texts), dtype=torch.int64)),
            rollout_logprobs=torch.zeros(len(texts)),
            texts=texts,
            finish=["stop"] * len(texts),
        )


def right(rollouts):
    rewards = [float(text == rollouts.prompt_of(b).answer) for b, text in enumerate(rollouts.texts)]
    return torch.tensor(rewards), {}


def test_what_greedy_decoding_solves_is_dropped_before_anything_is_drawn():
    asked = [Prompt("a", "1", {"greedy": "1"}), Prompt("b", "0", {"greedy": "x"}), Prompt("c", "5", {"greedy": "5"})]
    slot = interference.unsolved_by_greedy(4, right)
    found = slot(Speaking(), asked)
    assert [prompt.text for prompt in found.prompts] == ["b"] and len(found) == 4
    assert found.facts["dropped"].tolist() == pytest.approx([2 / 3] * 4) and not found.facts["solved"].any()
    every = slot(Speaking(), [asked[0], asked[2]])
    assert every.facts["solved"].tolist() == [1, 1] and every.facts["dropped"].tolist() == [1, 1]
    assert interference.unsolved(torch.tensor([1.0, 0.99, 0.0, 2.0])).tolist() == [False, True, True, False]


def test_a_step_of_solved_prompts_is_skipped_and_others_are_not(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    for reward, live in (("perfect", 0.0), ("constant", 1.0)):
        rows = tiny_runs.run(
            tmp_path, reward, recipe="self_interference", reward=f"tiny_runs:{reward}", steps=1,
            eval_every=0,
        )  # fmt: skip
        (row,) = (row for row in rows if "live" in row)
        assert row["live"] == live and row["dropped"] == row["solved"] == 1 - live
        assert ("grad_norm" in row) == bool(live)


def test_the_matrix_by_trial_is_the_one_of_gradients_for_a_small_step():
    """Steps of plain descent: the change over the rate tends to the products of the gradients."""
    actor, whole = policy(tiny_models.model(dtype=torch.float64)), batch_()
    parts = [whole.rollouts_at(torch.tensor([b])).counted() for b in (0, 2)]
    parts = [part.replace(advantages=torch.ones(len(part.tokens))) for part in parts]
    rate, learnt = 1e-4, actor.parameters()

    def descend():
        with torch.no_grad():
            for parameter in learnt.values():
                parameter -= rate * parameter.grad
                parameter.grad = None
        return {}

    def of(batch):
        towards = clipped(reduce=token_mean)
        taken, step = [], actor.optimizer.step
        actor.optimizer.step = lambda: taken.append(torch.cat([-p.grad.flatten() for p in learnt.values()])) or {}
        actor.update(batch, towards)
        actor.optimizer.step = step
        for parameter in learnt.values():
            parameter.grad = None
        return taken[0]

    steps = torch.stack([of(part) for part in parts])
    actor.optimizer.step = descend
    solutions = whole.rollouts_at(torch.tensor([0, 2])).counted()
    before = {name: x.detach().clone() for name, x in learnt.items()}
    found = interference.measured(actor, parts, clipped(reduce=token_mean), solutions) / rate
    assert all(torch.equal(x, before[name]) for name, x in learnt.items())
    torch.testing.assert_close(found.double(), interference.matrix(steps, steps), rtol=0.05, atol=0.05)


def test_a_trial_leaves_policy_optimizer_and_average_as_they_were():
    actor, batch = policy(teacher=Teacher("average", 0.5)), batch_()
    actor.update(batch, clipped())
    state = {**actor.parameters(), **actor.optimizer.state_dict(), **actor.seconds["teacher"].state_dict()}
    updates = state.pop("updates")
    before, count = {name: x.detach().clone() for name, x in state.items()}, actor.optimizer.count
    interference.measured(actor, [batch, batch], clipped(), batch)
    state = {**actor.parameters(), **actor.optimizer.state_dict(), **actor.seconds["teacher"].state_dict()}
    assert state.pop("updates") == updates and actor.optimizer.count == count
    assert all(torch.equal(x, before[name]) for name, x in state.items())


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_evaluation_measures_the_matrix_and_changes_nothing(beta, tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="self_interference", reward="tiny_runs:modest", lr=0.01, eval_every=1, steps=2, beta=beta)
    plain = tiny_runs.run(tmp_path, "plain", **settings)
    tried = tiny_runs.run(tmp_path, "tried", interference=3, **settings)
    found = [row for row in tried if "interference" in row]
    assert [row["step"] for row in found] == [0, 1, 2]
    for row in found:
        table = torch.tensor(row["interference"])
        assert table.shape == (3, 3) and ((table != 0).all(1) | (table == 0).all(1)).all() and table.any()
        assert len(table.unique(dim=0)) > 1  # each row is of a problem of its own
        assert row["negative_interference"] == pytest.approx(interference.negative_mass(table), rel=1e-4)
    for row in tried:
        row.pop("interference", None)
        row.pop("negative_interference", None)
    assert tiny_runs.numbers(tried) == tiny_runs.numbers(plain)
    with pytest.raises(ValueError, match="count must be an integer >= 2"):
        recipe(tmp_path, "self_interference", interference=1)


def test_reports():
    found = torch.tensor([[1.0, -2.0], [0.5, -9.0]])
    assert interference.negative_mass(found) == -2.0
    base, change = torch.tensor([0.05, 0.3, 0.4, 1.0]), torch.tensor([-1.0, 1.0, 3.0, 0.5])
    assert interference.winners(base, change) == {
        "change_from_0_to_0.1": -1.0, "change_from_0.1_to_0.5": 2.0, "change_from_0.5_to_1": 0.5,
    }  # fmt: skip
    assert interference.crossing([0.1, 0.3, 0.6], [0.2, 0.35, 0.5]) == 3
    assert interference.crossing([0.1], [0.2]) is None


def test_held_out_answers_say_who_wins_and_a_resumed_run_still_knows(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="self_interference", reward="tiny_runs:modest", lr=0.01, eval_every=2, save_every=1)
    whole = tiny_runs.run(tmp_path, "whole", steps=3, **settings)
    tiny_runs.run(tmp_path, "parts", steps=2, **settings)
    folder = loop.train(tiny_runs.config(tmp_path, "parts", steps=3, **settings), resume=tmp_path / "parts")
    key = "change_from_0_to_0.1"
    changes = [[row[key] for row in rows if key in row] for rows in (whole, tiny_runs.rows(folder))]
    assert changes[0][0] == 0 and changes[0][-1] != 0 and changes[0] == changes[1]


@pytest.mark.slow
def test_the_paradox_in_more_runs():
    plain = clipped(reduce=shared_softmax.per_problem)
    advantage = catalogue._module("self_interference").standardized
    grpo, ours = (shared_softmax.trained(advantage, plain, greedy_pass=x, seeds=200) for x in (False, True))
    start = shared_softmax.solved(shared_softmax.START.softmax(-1)[:2])
    assert shared_softmax.solved(grpo) < start - 0.05 and shared_softmax.solved(ours) > 0.95
