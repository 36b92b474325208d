"""rorecomp: which rollouts have priority, what waits and for how long, credit of either batch, resuming."""

import shutil

import pytest
import tiny_runs
import torch
from batches import ragged, recipe
from tiny_runs import numbers

from fuserl.engine import checks, loop
from fuserl.engine.advantages import over_batch, standardized
from fuserl.engine.losses import clipped, rollout_mean, squared_value, summed, token_mean
from fuserl.engine.recomposition import Buffer, measured, priority, recomposed
from fuserl.engine.toys import rorecomp as toys

SHORT = "tiny_runs:shortness"
LENGTHS, REWARDS = (3, 1, 5, 2, 4, 1, 6, 2), (1.0, 0, 1, 0, 1, 0, 0, 1)


def batch(rewards=REWARDS, seed=0, step=1, **changes):
    given = ragged(LENGTHS, (0, 0, 0, 0, 1, 1, 1, 1), (2, 3), seed=seed)
    given = given.replace(rewards=torch.tensor(rewards), step=step, extra={}, tokens=given.tokens + 100 * seed)
    return given.replace(**changes)


def credited(rorecomp, given):
    return checks.credited(given, rorecomp.advantage)


def rollouts(part, given):
    """The numbers of a part's rollouts in the batch that they are of, by their tokens."""
    firsts = given.tokens[given.offsets[:-1]].tolist()
    return [firsts.index(int(part.tokens[at])) for at in part.offsets[:-1].tolist()]


@pytest.mark.parametrize(("alpha", "chosen"), [(0.5, [1, 0, 0, 0, 0, 0, 1, 1]), (0.25, [0, 0, 0, 0, 0, 0, 1, 1])])
def test_short_right_and_long_wrong_ones_come_first(alpha, chosen):
    """Right are lengths 3, 5, 4, 2 and wrong 1, 2, 1, 6: of equal ones the first."""
    found = priority(batch(), alpha, torch.tensor(LENGTHS))
    expected = [bool(x) for x in chosen]
    if alpha == 0.5:
        expected[3] = True  # the second longest wrong one
        expected[1] = False
    assert found.tolist() == expected


def test_with_one_side_empty_nothing_has_priority():
    for rewards in ((1.0,) * 8, (0.0,) * 8):
        assert not priority(batch(rewards), 1.0, torch.tensor(LENGTHS)).any()
    assert (
        priority(batch(), 1.0, torch.tensor(LENGTHS)).all() and not priority(batch(), 0.0, torch.tensor(LENGTHS)).any()
    )


def test_a_share_that_is_whole_rollouts_is_taken_whole():
    given = ragged((1,) * 101, [0] * 101).replace(rewards=torch.cat([torch.ones(100), torch.zeros(1)]))
    found = priority(given, 0.29, torch.arange(101))
    assert found.nonzero().squeeze(-1).tolist() == list(range(29))


def test_each_response_is_learnt_from_once_the_oldest_first(tmp_path):
    rorecomp, seen, given = recipe(tmp_path, "rorecomp"), [], []
    waiting = rorecomp.state["buffer"]
    for step in range(1, 6):
        given.append(batch(seed=step, step=step))
        parts = rorecomp.batches(credited(rorecomp, given[-1]))
        assert len(parts) == (2 if step in (2, 4) else 1)  # four wait after each step, until eight do
        assert all(part.step == step for part in parts) and len(waiting) == (0 if step in (2, 4) else 4)
        seen += [part.tokens for part in parts]
        if step == 2:
            old = torch.cat([given[0].tokens, given[1].tokens])
            expected = torch.cat([old[~torch.isin(old, part)] for part in [torch.cat([seen[0], seen[1]])]])
            assert torch.equal(parts[1].tokens, expected)
    tokens = torch.cat([*seen, waiting.held.tokens])
    assert sorted(tokens.tolist()) == sorted(torch.cat([each.tokens for each in given]).tolist())


def test_what_waits_keeps_its_old_log_probs_and_prompts(tmp_path):
    rorecomp = recipe(tmp_path, "rorecomp", advantages="group")
    first, second = batch(seed=1), batch(seed=2, step=2)
    first = first.replace(prompt_tokens=[torch.tensor([1, 2]), torch.tensor([3])])
    second = second.replace(prompt_tokens=[torch.tensor([4]), torch.tensor([5, 6])])
    rorecomp.batches(credited(rorecomp, first))
    late = rorecomp.batches(credited(rorecomp, second))[1]
    for given in (first, second):
        inside = torch.isin(late.tokens, given.tokens)
        order = torch.tensor([given.tokens.tolist().index(each) for each in late.tokens[inside].tolist()])
        for name in ("old_logprobs", "rollout_logprobs"):
            assert torch.equal(getattr(late, name)[inside], getattr(given, name)[order])
        assert torch.equal(late.advantages[inside], credited(rorecomp, given).advantages[order])
        for b in late.rollout[inside].unique().tolist():
            source = given.group[given.rollout[given.tokens.tolist().index(int(late.tokens[late.offsets[b]]))]]
            assert torch.equal(late.prompt_tokens[late.group[b]], given.prompt_tokens[source])
    assert late.counts.rollouts == 8 and late.counts.tokens == len(late.tokens)


def test_advantages_are_over_each_batch_or_as_they_were(tmp_path):
    for kind in ("batch", "group"):
        rorecomp, given = recipe(tmp_path, "rorecomp", advantages=kind), batch()
        part = rorecomp.batches(credited(rorecomp, given))[0]
        numbers_of = rollouts(part, given)
        assert numbers_of == [0, 3, 6, 7]
        own = over_batch(part) if kind == "batch" else standardized(given)[numbers_of]
        assert torch.equal(part.advantages, part.to_tokens(own)) and own.any()


def test_with_everything_in_priority_it_is_grpo(tmp_path):
    rorecomp, given = recipe(tmp_path, "rorecomp", alpha=1.0, advantages="group"), batch()
    (part,) = rorecomp.batches(credited(rorecomp, given))
    grpo = checks.credited(given, standardized)
    assert torch.equal(checks.gradient(part, rorecomp.loss), checks.gradient(grpo, clipped()))
    assert checks.gradient(part, clipped(reduce=rollout_mean)).any()


def test_a_critic_gives_ppos_advantages_and_values_wait_too(tmp_path):
    options = {"advantages": "critic", "gamma": 0.9, "lam": 0.5, "value_coef": 0.7}
    rorecomp = recipe(tmp_path, "rorecomp", **options)
    assert rorecomp.reads == ("old_logprobs", "values") and "value" in rorecomp.loss.outputs
    given = credited(rorecomp, batch(seed=1))
    rorecomp.batches(given)
    late = rorecomp.batches(credited(rorecomp, batch(seed=2, step=2)))[1]
    inside = torch.isin(late.tokens, given.tokens)
    order = torch.tensor([given.tokens.tolist().index(each) for each in late.tokens[inside].tolist()])
    for name in ("values", "returns", "advantages"):
        assert torch.equal(getattr(late, name)[inside], getattr(given, name)[order])
    loss = summed(clipped(reduce=token_mean), squared_value(clip=0.2), 0.7)
    assert torch.equal(checks.gradient(late, rorecomp.loss), checks.gradient(late, loss))


def test_a_buffer_gives_by_chance_and_must_when_full():
    def parts(capacity, chance, steps=6):
        split = recomposed(
            Buffer(), alpha=0.5, capacity=capacity, measure=lambda given: given.lengths, chance=chance, credit=None
        )
        return [len(split(batch(seed=step, step=step))) for step in range(1, steps + 1)]

    assert parts(9.0, lambda step: False) == [1] * 6
    assert parts(9.0, lambda step: step == 5) == [1, 1, 1, 1, 2, 1]
    assert parts(3.0, lambda step: False) == [1, 1, 2, 1, 2, 1]  # twelve wait, eight go
    assert parts(0.0, lambda step: False) == [2] * 6
    assert parts(9.0, lambda step: True) == [1, 2, 1, 2, 1, 2]


def test_the_chance_falls_over_the_run(tmp_path):
    def given(**options):
        rorecomp = recipe(tmp_path, "rorecomp", steps=400, buffer=1e9, **options)
        return [len(rorecomp.batches(credited(rorecomp, batch(seed=1, step=step)))) - 1 for step in range(1, 401)]

    falling = given(p_comp=1.0, p_comp_end=0.0)
    assert sum(falling[:50]) == 25 and sum(falling[-50:]) < 10 and not any(given(p_comp=0.0, p_comp_end=0.0))
    assert given(p_comp=0.3, p_comp_end=0.3) == given(p_comp=0.3, p_comp_end=0.3) != given(p_comp=0.3, seed=1)


def test_length_may_be_any_fact_of_rollouts(tmp_path):
    calls = torch.tensor([9.0, 0, 1, 0, 2, 7, 0, 3])
    rorecomp, given = recipe(tmp_path, "rorecomp", measure="calls"), batch(facts={"calls": calls})
    part = rorecomp.batches(credited(rorecomp, given))[0]
    assert rollouts(part, given) == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="measure must be one of length; got 'calls'"):
        rorecomp.batches(credited(rorecomp, batch()))


@pytest.mark.parametrize("partly", [False, True])
def test_a_buffer_goes_to_a_checkpoint_and_back(partly):
    given = batch(seed=3)
    if partly:
        chunks = [[torch.tensor([9, 9]), piece] for piece in given.tokens.split(list(LENGTHS))]
        place = torch.arange(len(given.tokens)) - given.offsets[given.rollout] + 2
        given = given.replace(completions=chunks, place=place)
    one, two = Buffer(), Buffer()
    one.add(given)
    two.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    first, second = one.pop(3, step=5), two.pop(3, step=5)
    assert torch.equal(first.tokens, given.tokens[:9]) and torch.equal(one.held.tokens, given.tokens[9:])  # the oldest
    for buffer in (one, two):
        assert len(buffer) == 5
    for a, b in ((first, second), (one.held, two.held)):
        for name in ("tokens", "rollout", "offsets", "group", "rewards", "old_logprobs", "advantages", "values"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(a.packed().input_ids, b.packed().input_ids) and a.counts == b.counts
    empty = Buffer()
    empty.load_state_dict(Buffer().state_dict())
    assert len(empty) == 0


def test_wrong_options_are_refused(tmp_path):
    for options, words in (
        ({"alpha": 1.5}, "alpha must be in"),
        ({"buffer": -1.0}, "buffer must be"),
        ({"p_comp": 2.0}, "p_comp must be in"),
        ({"p_comp_end": -0.1}, "p_comp_end must be in"),
        ({"advantages": "groups"}, "advantages must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe(tmp_path, "rorecomp", **options)


@pytest.fixture
def tiny(monkeypatch):
    tiny_runs.use(monkeypatch)


def run(folder, name, **changes):
    return tiny_runs.run(folder, name, recipe="rorecomp", reward=SHORT, **{"steps": 4, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.8},
        {"advantages": "group", "minibatches": 2},
        {"advantages": "critic"},
        {"p_comp": 0.0, "p_comp_end": 0.0},
        {"buffer": 0.0},
        {"low": 0.001, "high": 0.001, "epochs": 2},
    ],
)
def test_a_run_takes_its_options(tmp_path, tiny, options):
    assert numbers(run(tmp_path, "plain")) != numbers(run(tmp_path, "run", **options))


@pytest.mark.parametrize("advantages", ["batch", "critic"])
def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, tiny, advantages):
    options = dict(recipe="rorecomp", reward=SHORT, save_every=1, keep=9, steps=6, advantages=advantages)
    whole = tiny_runs.run(tmp_path, "whole", **options)
    for path in sorted((tmp_path / "whole").glob("checkpoints/*"))[-3:]:
        shutil.rmtree(path)
    again = tiny_runs.rows(loop.train(tiny_runs.config(tmp_path, "whole", **options), resume=tmp_path / "whole"))
    assert numbers([row for row in again if "tokens" in row]) == numbers([row for row in whole if "tokens" in row])


@pytest.mark.slow
def test_even_where_length_does_not_matter_answers_become_short():
    """Measured: GRPO 7 to 10, priority alone 1.1, with compensation 1.1."""
    slots = {
        "advantage": standardized, "loss": clipped(), "measure": measured("spoken"), "credit": over_batch,
    }  # fmt: skip
    grpo, alone, both = (
        toys.mean(toys.lengths(slots, kind, seeds=range(4), right=toys.even))[0]
        for kind in ("grpo", "priority", "compensation")
    )
    assert max(alone, both) < 1.5 < 5 < grpo, (grpo, alone, both)
    assert all(each[1] < 0.75 for each in toys.lengths(slots, "priority", seeds=range(4)))  # it collapses
