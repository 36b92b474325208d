"""Batch: packing, views with global counts, and the glue between tokens, rollouts and groups."""

import itertools

import pytest
import torch
from batches import batches, each_rollout, ragged, rollouts, steady, three
from hypothesis import given
from hypothesis import strategies as st

from fuserl.engine.batch import batch_of, taken

PER_TOKEN = ("tokens", "rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs", "values", "returns")


def test_packing_keeps_every_completion():
    batch = three()
    assert batch.rollout.tolist() == [0, 0, 1, 2, 2, 2] and batch.lengths.tolist() == [2, 1, 3]
    assert (batch.counts.tokens, batch.counts.rollouts, batch.counts.groups) == (6, 3, 2)
    assert batch.rewards.tolist() == [1, 3, 5]
    assert batch_of(rollouts(), torch.tensor([True, False, True])).rewards.dtype == torch.float32
    assert rollouts().prompt_of(2).text == "b" and len(rollouts()) == 3


def test_wrong_number_of_rewards():
    with pytest.raises(ValueError, match=r"rewards must have shape \(3,\), one per rollout; got \(2,\)"):
        batch_of(rollouts(), torch.ones(2))


@steady
@given(batches())
def test_glue_is_what_a_loop_over_rollouts_gives(batch):
    x, spans = batch.values, each_rollout(batch)
    sums = [float(x[span].double().sum()) for span in spans]
    assert batch.lengths.tolist() == [span.stop - span.start for span in spans]
    assert batch.rollout_sum(x).tolist() == pytest.approx(sums, abs=1e-5)
    means = [total / max(span.stop - span.start, 1) for total, span in zip(sums, spans, strict=True)]
    assert batch.rollout_mean(x).tolist() == pytest.approx(means, abs=1e-5)
    assert torch.equal(batch.to_tokens(batch.rewards), batch.rewards[batch.rollout])
    for b, group in enumerate(batch.group.tolist()):
        members = batch.rewards[batch.group == group].double()
        assert float(batch.group_sum(batch.rewards)[b]) == pytest.approx(float(members.sum()), abs=1e-5)
        assert float(batch.group_mean(batch.rewards)[b]) == pytest.approx(float(members.mean()), abs=1e-5)
    rewards = zip(spans, batch.rewards.tolist(), strict=True)
    last = {span.stop - 1: reward for span, reward in rewards if span.stop > span.start}
    assert batch.last.nonzero().squeeze(-1).tolist() == list(last)
    counted = batch.at_last(batch.rewards)
    assert {at: value for at, value in enumerate(counted.tolist()) if value == value} == last


@steady
@given(batches(), st.data())
def test_a_view_of_tokens_keeps_the_counts_and_rollouts_of_the_whole(batch, data):
    known = st.integers(0, len(batch.tokens) - 1) if len(batch.tokens) else st.nothing()
    rows = torch.tensor(data.draw(st.lists(known)), dtype=torch.int64)
    view = batch.take(rows)
    assert view.counts == batch.counts and torch.equal(view.rewards, batch.rewards)
    for name in (*PER_TOKEN, "rollout"):
        assert torch.equal(getattr(view, name), getattr(batch, name)[rows])
    assert torch.equal(view.extra["weight"], batch.extra["weight"][rows])
    assert torch.equal(view.to_tokens(view.lengths), batch.to_tokens(batch.lengths)[rows])


@steady
@given(batches(), st.data())
def test_some_rollouts_are_renumbered_and_keep_their_tokens(batch, data):
    index = data.draw(st.permutations(range(len(batch.group))))
    index = torch.tensor(index[: data.draw(st.integers(0, len(index)))], dtype=torch.int64)
    some, spans = batch.rollouts_at(index), each_rollout(batch)
    expected = [batch.tokens[spans[b]] for b in index]
    assert [some.tokens[span].tolist() for span in each_rollout(some)] == [each.tolist() for each in expected]
    assert torch.equal(batch.rows_of(index), some.tokens)  # tokens count up
    for name in PER_TOKEN:
        assert torch.equal(getattr(some, name), getattr(batch, name)[some.tokens])
    assert torch.equal(some.extra["weight"], batch.extra["weight"][some.tokens])
    assert some.rollout.tolist() == [b for b, each in enumerate(expected) for _ in each]
    assert torch.equal(some.group, batch.group[index]) and torch.equal(some.rewards, batch.rewards[index])
    assert some.counts == batch.counts and len(some.prompt_tokens) == len(batch.prompt_tokens)


@steady
@given(batches(), st.data())
def test_groups_begin_where_group_offsets_say(batch, data):
    whole = data.draw(st.lists(st.sampled_from(sorted(set(batch.group.tolist()))), unique=True, min_size=1))
    index = torch.cat([(batch.group == group).nonzero().squeeze(-1) for group in whole])
    some = batch.rollouts_at(index)
    tokens = [int(batch.lengths[batch.group == group].sum()) for group in whole]
    assert some.group_offsets.tolist() == [0, *itertools.accumulate(tokens)]


def cost(batch, part):
    """Packed tokens of some rollouts: theirs, and each prompt once."""
    prompts = {int(group) for group in batch.group[part]}
    return int(batch.offsets.diff()[part].sum()) + sum(len(batch.prompt_tokens[group]) for group in prompts)


@steady
@given(batches(), st.data(), st.integers(1, 30), st.booleans())
def test_micro_batches_fill_the_limit_and_keep_within_it(batch, data, limit, whole):
    index = data.draw(st.permutations(range(len(batch.group))))
    index = torch.tensor(index[: data.draw(st.integers(0, len(index)))], dtype=torch.int64)
    parts = list(batch.micro_batches(index, limit, whole_groups=whole))
    in_order = index[batch.group[index].argsort(stable=True)]
    assert torch.cat([index[:0], *parts]).tolist() == in_order.tolist() and all(len(part) for part in parts)
    held = [set(batch.group[part].tolist()) for part in parts]
    if whole:
        assert sum(map(len, held)) == len(set(batch.group[index].tolist()))
    for part, groups in zip(parts, held, strict=True):
        single = len(groups) == 1 if whole else len(part) == 1
        assert cost(batch, part) <= limit or single
    for part, after in itertools.pairwise(parts):
        following = after[batch.group[after] == batch.group[after[0]]] if whole else after[:1]
        assert cost(batch, torch.cat([part, following])) > limit  # it could not have taken more


@pytest.mark.parametrize(
    ("whole", "limit", "parts"),
    [
        (True, 10, [[0], [1, 2], [3]]),  # the second pair is counted whole when it is put off
        (True, 11, [[0], [1, 2, 3]]),
        (True, 5, [[0], [1, 2], [3]]),
        (False, 10, [[0, 1], [2, 3]]),
        (False, 14, [[0, 1, 2], [3]]),
        (False, 1, [[0], [1], [2], [3]]),
    ],
)
def test_micro_batches_by_hand(whole, limit, parts):
    batch = ragged((5, 3, 3, 3), (0, 1, 1, 2))
    assert [part.tolist() for part in batch.micro_batches(torch.arange(4), limit, whole_groups=whole)] == parts


@steady
@given(batches(), st.data(), st.integers(1, 30), st.integers(1, 3), st.booleans())
def test_balanced_micro_batches_share_the_tokens_evenly(batch, data, limit, of, whole):
    index = data.draw(st.permutations(range(len(batch.group))))
    index = torch.tensor(index[: data.draw(st.integers(0, min(7, len(index))))], dtype=torch.int64)
    parts = batch.balanced(index, limit, of=of, whole_groups=whole)
    in_order = index[batch.group[index].argsort(stable=True)]
    assert torch.cat([index[:0], *parts]).tolist() == in_order.tolist()
    least = len(list(batch.micro_batches(index, limit, whole_groups=whole)))
    most = -(-least // of) * of
    assert least <= len(parts) <= most
    places = [
        at for at in range(1, len(index)) if not whole or batch.group[in_order[at]] != batch.group[in_order[at - 1]]
    ]
    cuts = [each for count in range(most) for each in itertools.combinations(places, count)]
    largest = min((max(cost(batch, part) for part in in_order.tensor_split(cut)) for cut in cuts), default=0)
    assert max((cost(batch, part) for part in parts), default=0) == largest


@steady
@given(batches(), st.integers(2, 8), st.booleans())
def test_minibatches_have_every_rollout_once_and_their_own_counts(batch, count, whole):
    parts = batch.minibatches(count, whole_groups=whole)
    rewards = [float(reward) for part in parts for reward in part.rewards]
    assert sorted(rewards) == sorted(batch.rewards.tolist())
    assert sorted(torch.cat([part.tokens for part in parts]).tolist()) == batch.tokens.tolist()
    groups = [part.group.unique().tolist() for part in parts]
    for part, held in zip(parts, groups, strict=True):
        counts = part.counts
        assert (counts.tokens, counts.rollouts, counts.groups) == (len(part.tokens), len(part.group), len(held))
    kinds = batch.counts.groups
    if whole or kinds >= count:
        assert sum(map(len, groups)) == kinds and len(parts) == min(count, kinds)  # none is cut
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
    else:
        assert len(parts) == min(count, len(batch.group))
        assert max(len(part.group) for part in parts) - min(len(part.group) for part in parts) <= 1


def test_one_minibatch_is_the_batch_itself():
    batch = three()
    assert batch.minibatches(1)[0] is batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_come_per_rollout_or_per_token(dtype):
    batch = three()
    assert batch.with_advantages(torch.tensor([1, 2, 3], dtype=dtype)).advantages.tolist() == [1, 1, 2, 3, 3, 3]
    spread = batch.with_advantages(torch.arange(6, dtype=dtype))
    assert spread.advantages.tolist() == [0, 1, 2, 3, 4, 5] and spread.advantages.dtype == torch.float32
    short = ragged((1, 1), (0, 0))
    assert short.with_advantages(torch.tensor([4.0, 5.0])).advantages.tolist() == [4, 5]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_advantages_of_another_number_are_refused(size):
    with pytest.raises(ValueError, match=rf"\(3,\), one per rollout, or \(6,\), one per token; got \({size},\)"):
        three().with_advantages(torch.ones(size))


def test_moving_takes_everything_but_the_offsets():
    moved = ragged((2, 0, 3), (0, 1, 0)).to("meta")
    fields = [getattr(moved, name) for name in (*PER_TOKEN, "rollout", "group", "rewards")]
    assert all(field.device.type == "meta" for field in (*fields, moved.extra["weight"]))
    assert moved.offsets.device.type == "cpu" and moved.lengths.device.type == "meta"


def test_the_gradient_of_rows_that_several_take_repeats_bit_for_bit():
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)  # as in a run: it must not take that
    random = torch.Generator().manual_seed(0)
    x, rows = torch.randn(3000, 576, generator=random), torch.randint(0, 20, (3000,), generator=random)

    def gradient():
        source = torch.zeros(20, 576, requires_grad=True)
        return torch.autograd.grad((taken(source, rows) * x).sum(), source)[0]

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(20))
    expected = torch.zeros(20, 576, dtype=torch.float64).index_add(0, rows, x.double())
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)
