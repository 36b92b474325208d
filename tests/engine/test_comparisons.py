"""Pairs of a policy's own: who draws them, what an oracle prefers, and a buffer that keeps and gives back all."""

import dataclasses

import pytest
import tiny_runs
import torch
from batches import config, ragged, recipe

from fuserl.engine import comparisons, learners
from fuserl.engine.batch import batch_of
from fuserl.engine.comparisons import Buffer, apart, preferred
from fuserl.engine.prompts import Prompt

PROMPTS = [Prompt("1+1="), Prompt("23+4="), Prompt("5+5=")]


def drawn(step, prompts=3):
    """A batch of pairs and what calibrates, in the order of the rollouts."""
    lengths = [2, 3, 1, 1, 4, 5, 2, 2, 3]
    batch = ragged(lengths, [0, 0, 0, 1, 1, 1, 2, 2, 2], (3, 2, 4), seed=step)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.2, 0.7, 0.45])
    return batch.replace(
        rewards=rewards, step=step, advantages=torch.ones(len(batch.tokens)), values=None, returns=None
    )


def test_the_reference_stands_behind_the_pairs(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    given = config(tmp_path, "vpo", online=True, max_new_tokens=4, threads=1)
    policy = learners.of(given, recipe(tmp_path, "vpo", online=True))[0]
    for parameter in policy.parameters().values():
        parameter.data *= 1.3

    def reward(rollouts):
        return torch.arange(float(len(rollouts))), {"share": 0.5, "each": torch.zeros(len(rollouts))}

    for second, own in (("policy", [0, 1, 3, 4, 6, 7]), ("reference", [0, 3, 6])):
        found = comparisons.calibrated(comparisons.drawn(reward, second=second))(policy, PROMPTS)
        assert found.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and found.prompts == PROMPTS
        rewards, facts = found.scores
        assert rewards.tolist() == [0, 1, 0.5, 2, 3, 2.5, 4, 5, 4.5] and facts == {"share": 0.5}
        batch = policy.score(batch_of(found, rewards), ("old_logprobs",))
        apart_by = batch.rollout_sum((batch.rollout_logprobs - batch.old_logprobs).abs())
        assert apart_by.isnan().logical_not().nonzero().squeeze(-1).tolist() == own
        assert (apart_by[own] < 1e-3).all()
    with pytest.raises(ValueError, match="second must be"):
        comparisons.drawn(reward, second="nobody")


def test_oracles_label_and_equals_are_left_out():
    pairs, rest = apart(drawn(1))
    assert pairs.counts.rollouts == 6 and rest.counts.rollouts == rest.counts.groups == 3
    labelled = preferred(pairs, "larger", torch.Generator().manual_seed(0))
    assert labelled.rewards.tolist() == [1, 0, 0, 1] and labelled.group.tolist() == [0, 0, 2, 2]
    assert labelled.counts.groups == 2 and labelled.counts.rollouts == 4 and len(labelled.tokens) == 9
    random, wins = torch.Generator().manual_seed(0), torch.zeros(6)
    for _ in range(2000):
        found = preferred(pairs, "bradley_terry", random)
        assert found.rewards.view(-1, 2).sum(1).tolist() == [1, 1, 1]
        wins += found.rewards
    expected = torch.tensor([1.0, 0.0, -0.5]).sigmoid()
    assert torch.allclose(wins[::2] / 2000, expected, atol=4 * (0.25 / 2000) ** 0.5)
    equal = preferred(pairs.replace(rewards=torch.zeros(6)), "larger", random)
    assert len(equal.group) == len(equal.tokens) == 0
    with pytest.raises(ValueError, match="oracle must be one of"):
        preferred(pairs, "nobody", random)


def sizes(batches):
    return sorted(batch.counts.rollouts for batch in batches)


def test_a_step_goes_through_all_that_was_compared():
    buffer = Buffer("larger", None, 0)
    found = [buffer.grown(drawn(step)) for step in (1, 2, 3)]
    assert [len(batches) for batches in found] == [1, 2, 3] and sizes(found[2]) == [7, 7, 7]
    tokens = torch.cat([batch.tokens for batch in found[2]])
    assert len(tokens) == 3 * 18 and all(batch.objectives for batch in found[2])
    assert found[2][0].step == 3 and sorted(batch.step for batch in found[2][1:]) == [1, 2]
    orders = set()
    for seed in range(8):
        other = Buffer("larger", None, seed)
        orders.add(tuple([[batch.step for batch in other.grown(drawn(step))] for step in (1, 2, 3)][-1]))
    assert orders == {(3, 1, 2), (3, 2, 1)}
    few = Buffer("larger", 1, 0)
    counts = [len(few.grown(drawn(step))) for step in (1, 2, 3, 4)]
    assert counts == [1, 2, 2, 2]
    none = Buffer("larger", 0, 0)
    assert [[batch.step for batch in none.grown(drawn(step))] for step in (1, 2, 3)] == [[1], [2], [3]]


def test_only_new_completions_say_who_drew_them():
    buffer = Buffer("larger", None, 0)
    buffer.grown(drawn(1))
    for batch in buffer.grown(drawn(2)):
        assert bool(batch.rollout_logprobs.isnan().all()) == (batch.step == 1)
        assert not batch.ref_logprobs.isnan().any()


def test_a_buffer_goes_on_as_if_nothing_had_been():
    buffer, again = Buffer("bradley_terry", 2, 3), Buffer("bradley_terry", 2, 3)
    assert buffer.state_dict() == {}
    again.load_state_dict({})
    for step in (1, 2, 3):
        buffer.grown(drawn(step))
    again.load_state_dict({name: x.clone() for name, x in buffer.state_dict().items()})
    assert all(isinstance(x, torch.Tensor) for x in buffer.state_dict().values())
    for ours, theirs in zip(buffer.grown(drawn(4)), again.grown(drawn(4)), strict=True):
        for each in dataclasses.fields(ours):
            one, two = getattr(ours, each.name), getattr(theirs, each.name)
            if isinstance(one, torch.Tensor):
                assert torch.allclose(one.double(), two.double(), equal_nan=True, rtol=0, atol=0), each.name
        used = ours.group.unique().tolist()
        assert all(torch.equal(ours.prompt_tokens[at], theirs.prompt_tokens[at]) for at in used)
        assert ours.counts == theirs.counts and ours.step == theirs.step
    with pytest.raises(ValueError, match="replay must be"):
        Buffer("larger", -1, 0)


def test_pairs_that_are_all_equal_still_calibrate():
    batch = drawn(1)
    [only] = Buffer("larger", None, 0).grown(batch.replace(rewards=torch.zeros(9)))
    assert only.counts.rollouts == 3 and only.objective.tolist() == [1] * 9
