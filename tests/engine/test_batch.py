"""Batch: packing, views with global counts, and the glue between tokens, rollouts and groups."""

import pytest
import torch

from fuserl.engine.batch import Rollouts, batch_of
from fuserl.engine.prompts import Prompt


def rollouts():
    """Two prompts, three completions of 2, 1 and 3 tokens."""
    return Rollouts(
        prompts=[Prompt("a"), Prompt("b")],
        prompt_tokens=[torch.tensor([1, 2]), torch.tensor([3])],
        group=torch.tensor([0, 0, 1]),
        tokens=torch.arange(10, 16),
        offsets=torch.tensor([0, 2, 3, 6]),
        rollout_logprobs=-torch.arange(6.0),
        texts=["x", "y", "z"],
        finish=["stop", "length", "stop"],
    )


def test_glue():
    batch = batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0]))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert batch.rollout.tolist() == [0, 0, 1, 2, 2, 2] and batch.lengths.tolist() == [2, 1, 3]
    assert batch.rollout_sum(values).tolist() == [3, 3, 15] and batch.rollout_mean(values).tolist() == [1.5, 3, 5]
    assert batch.to_tokens(batch.rewards).tolist() == [1, 1, 3, 5, 5, 5]
    assert batch.group_mean(batch.rewards).tolist() == [2, 2, 5]
    assert (batch.counts.tokens, batch.counts.rollouts, batch.counts.groups) == (6, 3, 2)


def test_views_keep_the_counts_of_the_whole():
    batch = batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0])).replace(extra={"weight": torch.arange(6.0)})
    view = batch.take(torch.tensor([5, 2]))
    assert view.tokens.tolist() == [15, 12] and view.rollout.tolist() == [2, 1] and view.counts == batch.counts
    assert view.extra["weight"].tolist() == [5, 2] and view.to_tokens(view.rewards).tolist() == [5, 3]
    some = batch.rollouts_at(torch.tensor([2, 0]))
    assert some.tokens.tolist() == [13, 14, 15, 10, 11] and some.offsets.tolist() == [0, 3, 5]
    assert some.rollout.tolist() == [0, 0, 0, 1, 1] and some.group.tolist() == [1, 0] and some.counts == batch.counts


def test_minibatches_have_their_own_counts():
    batch = batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0]))
    assert batch.minibatches(1) == [batch]
    first, second = batch.minibatches(2)
    assert (first.counts.tokens, first.counts.rollouts, first.counts.groups) == (3, 2, 1)
    assert (second.counts.tokens, second.counts.rollouts) == (3, 1) and second.tokens.tolist() == [13, 14, 15]
    assert len(batch.minibatches(5)) == 3


def test_wrong_number_of_rewards():
    with pytest.raises(ValueError, match=r"rewards must have shape \(3,\)"):
        batch_of(rollouts(), torch.ones(2))
