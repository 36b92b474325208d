"""Several objectives in one pass: each part's loss and gradient are those it has alone, however the batch is cut."""

from types import SimpleNamespace

import pytest
import torch
from batches import pairs, ragged

from fuserl.engine import checks
from fuserl.engine.losses import clipped, mean_over, negative_logprob, rollout_mean, rollout_sum, token_mean
from fuserl.engine.mixtures import appended, joined, mixture
from fuserl.engine.preferences import preference


def two():
    first, second = ragged((3, 2, 4), (0, 0, 1)).counted(), ragged((2, 5), (0, 1), seed=1).counted()
    return first.replace(step=7), second


@pytest.mark.parametrize("reduce", [token_mean, rollout_mean, rollout_sum, mean_over(3)])
def test_each_loss_is_as_it_is_alone(reduce):
    first, second = two()
    losses = clipped(reduce=reduce), negative_logprob(reduce=reduce)
    alone = [checks.gradient(batch, loss) for batch, loss in zip((first, second), losses, strict=True)]
    whole = joined(first, second)
    assert torch.equal(checks.gradient(whole, mixture(*losses)), torch.cat(alone))
    assert whole.step == 7 and whole.counts.tokens == 16 and whole.counts.groups == 4
    values = [checks.value(batch, loss) for batch, loss in zip((first, second), losses, strict=True)]
    assert checks.value(whole, mixture(*losses)) == pytest.approx(sum(values), rel=1e-6)


def test_a_mixture_does_not_depend_on_how_it_is_cut():
    whole, loss = joined(*two()), mixture(clipped(), negative_logprob(reduce=rollout_mean))
    expected = checks.gradient(whole, loss)
    for index in (torch.tensor([0, 3]), torch.tensor([1, 2, 4])):
        part = whole.rollouts_at(index)
        assert torch.equal(checks.gradient(part, loss), expected[whole.rows_of(index)])
    some = torch.tensor([0, 4, 12])  # a chunk of tokens
    assert torch.equal(checks.gradient(whole.take(some), loss), expected[some])


def test_counts_of_a_minibatch_are_its_own_for_each_objective():
    part = joined(*two()).rollouts_at(torch.tensor([0, 1, 3])).counted()
    assert [each.counts for each in part.objectives] == [
        type(part.counts)(tokens=5, rollouts=2, groups=1),
        type(part.counts)(tokens=2, rollouts=1, groups=1),
    ]
    assert part.counts.tokens == 7


def test_what_one_lacks_is_nan_and_its_rows_are_live_by_its_own_loss():
    first, second = two()
    whole = joined(first.replace(ref_logprobs=None, facts={"a": torch.ones(3)}), second)
    assert whole.ref_logprobs[:9].isnan().all() and not whole.ref_logprobs[9:].isnan().any()
    assert whole.facts["a"][3:].isnan().all()
    live = mixture(clipped(), clipped(beta=0.1)).live(whole)
    assert torch.equal(live, torch.cat([first.advantages != 0, torch.ones(7, dtype=torch.bool)]))


def test_a_token_behind_some_rollouts_is_another_objective():
    batch = ragged((3, 2, 4), (0, 0, 1)).counted()
    chosen, marks = torch.tensor([True, False, True]), torch.tensor([91, 92, 93])
    more = appended(batch, marks, chosen)
    assert more.tokens.tolist() == [*batch.tokens[:3].tolist(), 91, *batch.tokens[3:].tolist(), 93]
    assert more.offsets.tolist() == [0, 4, 6, 11] and more.objective.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    loss = mixture(clipped(), negative_logprob(reduce=rollout_mean))
    more = more.replace(advantages=torch.where(more.objective == 1, 1.0, more.advantages))
    gradient = checks.gradient(more.replace(rollout_logprobs=more.rollout_logprobs.nan_to_num(-1.0)), loss)
    alone = checks.gradient(batch, clipped())
    assert torch.equal(gradient[more.objective == 0], alone)
    assert torch.equal(gradient[more.objective == 1], torch.tensor([-0.5, -0.5]))
    texts = [[1, 2], [7]]
    partly = batch.rollouts_at(torch.tensor([0, 1])).replace(
        completions=[[torch.tensor([9, *texts[0], 9])], [torch.tensor([9, 9, 9])]],
        place=torch.tensor([0, 1, 2, 0, 1]),
    )
    grown = appended(partly, marks[:2], torch.tensor([False, True]))
    assert [each[0].tolist() for each in grown.completions] == [[9, 1, 2, 9], [9, 9, 9, 92]]
    assert grown.place.tolist() == [0, 1, 2, 0, 1, 3]
    whole = joined(partly, batch)  # of which one trains all that it reads
    read = [torch.cat(each).tolist() for each in whole.as_read]
    assert read == [[9, 1, 2, 9], [9, 9, 9], *(each.tolist() for each in batch.tokens.split([3, 2, 4]))]
    assert whole.place.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3] and batch.as_read[1][0].shape == (2,)


def test_what_has_several_objectives_is_refused():
    whole = joined(*two())
    for again in (lambda: joined(whole, whole), lambda: appended(whole, whole.tokens, whole.rewards > 0)):
        with pytest.raises(ValueError, match="must have one objective"):
            again()


def test_pairs_may_be_one_of_several_objectives():
    """What couples rollouts sees those of its own objective alone."""
    explored = ragged((3, 1, 2), (0, 0, 0))
    paired = pairs((2, 1, 3, 2))
    paired = paired.replace(advantages=torch.ones_like(paired.advantages))
    first, second = clipped(), preference(beta=0.3)
    for batches, losses in (((explored, paired), (first, second)), ((paired, explored), (second, first))):
        whole = joined(*batches)
        logprob = whole.rollout_logprobs + 0.1
        found = mixture(*losses)(SimpleNamespace(logprob=logprob), whole)[0]
        each = logprob.split([len(batch.tokens) for batch in batches])
        parts = [loss(SimpleNamespace(logprob=x), b)[0] for loss, x, b in zip(losses, each, batches, strict=True)]
        assert torch.equal(found, torch.cat(parts))
