"""What ranks find together, and their gradients: numbers and texts of any length, and ranks that have none."""

import itertools
import math

import pytest
import torch
from batches import rollouts
from ranks import on_ranks
from torch import nn

from fuserl.engine import ranks, sharding
from fuserl.engine.rewards import RewardError, Scorer

RANKS = 3


def bring_together():
    rank = ranks.rank()
    assert (ranks.world(), ranks.first()) == (RANKS, rank == 0)
    found = ranks.gathered(torch.arange(2 * rank))  # the first has none
    assert [each.tolist() for each in found] == [[], [0, 1], [0, 1, 2, 3]]
    own = {"text": "\ud800 é\u2028" * rank, "number": [0.1, math.inf, 2**60][rank], "none": None}
    texts = ranks.everyones(own)
    assert texts[rank] == own and [each["number"] for each in texts] == [0.1, math.inf, 2**60]
    for count in (0, 1, 2, 3, 7):
        shares = ranks.everyones(list(ranks.share(count)))
        assert list(itertools.chain(*shares)) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ranks.summed(torch.tensor([1.0, rank])).tolist() == [3, 3]
    ranks.require_same("prompts", ["a"])
    with pytest.raises(RuntimeError, match=r"prompts must be the same on every rank; rank 2 has others than rank 0"):
        ranks.require_same("prompts", ["b" if rank == 2 else "a"])


def sum_up():
    """Several buckets; a parameter without a gradient on one rank, and one without on all."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sharding, "_BUCKET", 5)
    rank, parameters = ranks.rank(), [nn.Parameter(torch.zeros(2, 2)) for _ in range(4)]
    for number, parameter in enumerate(parameters[:3]):
        if number != rank:
            parameter.grad = torch.full((2, 2), 10.0**number * (rank + 1))
    sharding.sum_gradients(parameters)
    expected = [2 + 3, 10 * (1 + 3), 100 * (1 + 2)]
    assert [parameter.grad.unique().tolist() for parameter in parameters[:3]] == [[float(each)] for each in expected]
    assert parameters[3].grad is None
    patch.undo()


def align_and_cut():
    """Whatever each has loaded, the first one's; a piece takes a whole value, and gives it back."""
    torch.manual_seed(ranks.rank())
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    sharding.align(model)
    weight = model[1].weight.detach().clone()
    assert all(each == weight.tolist() for each in ranks.everyones(weight.tolist()))
    sharding.cut(model, torch.device("cpu"))
    piece = model[1].weight
    assert piece.to_local().shape[0] < 5 and torch.equal(sharding.whole(piece), weight)
    sharding.assign(piece, 2 * weight)
    assert torch.equal(sharding.whole(piece), 2 * weight)
    with sharding.uncut(model):
        for _ in range(ranks.rank()):  # each as often as it likes
            model(torch.eye(4))
            assert torch.equal(model[1].weight, 2 * weight)
    assert model[1].weight is piece
    (sharding.inside(model, lambda: model[1].weight.sum()) * (ranks.rank() + 1)).backward()
    assert sharding.whole(piece.grad).unique().tolist() == [6]  # 1 + 2 + 3


def reward_alike():
    """A call each: the same rewards everywhere, and the same failure, with what the other ranks know."""
    asked, called = rollouts(), []

    def place(completion):
        called.append(completion)
        return ord(completion) / 3  # no number of float32

    expected = torch.tensor([ord(text) / 3 for text in asked.texts])
    with Scorer(place) as scorer:
        found, facts = scorer(asked)
    assert called == [asked.texts[ranks.rank()]] and torch.equal(found, expected) and facts == {"timeouts": 0}

    def failing(completion):
        return place(completion) if completion != asked.texts[1] else math.nan

    with (
        Scorer(failing) as scorer,
        pytest.raises(RewardError, match=r"finite number; got nan for rollout 1 \(") as failed,
    ):
        scorer(asked)
    assert failed.value.rewards.isnan().tolist() == [False, True, False]
    assert torch.equal(failed.value.rewards[::2], expected[::2])


@pytest.mark.parametrize("task", [bring_together, sum_up, align_and_cut, reward_alike])
def test_three_ranks(task):
    on_ranks(RANKS, task)


def test_one_rank_waits_for_nobody():
    tensor = torch.ones(2)
    assert (ranks.world(), ranks.rank(), ranks.share(5)) == (1, 0, range(5))
    assert ranks.everyones({"a": tensor}) == [{"a": tensor}] and ranks.gathered(tensor)[0] is tensor
    assert ranks.summed(tensor) is tensor and sharding.whole(tensor) is tensor
    ranks.require_same("prompts", ["a"])
    with ranks.joined("cpu"):
        assert ranks.world() == 1
