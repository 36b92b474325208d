"""The tabular policy: its outputs are those of a softmax, and a recipe's slots train it."""

import torch

from fuserl.engine import tabular
from fuserl.engine.advantages import standardized
from fuserl.engine.losses import clipped, rollout_sum
from fuserl.engine.tabular import Table


def test_the_gradient_is_that_of_the_expected_reward():
    """Every arm once, weighted by its probability as a reward: a REINFORCE gradient that is known."""
    table = Table(torch.tensor([[0.3, -0.2, 0.5]]))
    batch = table.given(torch.tensor([[0], [1], [2]]), torch.zeros(3, dtype=torch.int64), torch.eye(3)[1], 3)
    batch = batch.with_advantages(torch.tensor([0.0, 1.0, 0.0]))
    p = table.probabilities[0]
    expected = -(torch.eye(3, dtype=torch.float64)[1] - p) / 3
    torch.testing.assert_close(table.gradient(batch, clipped(reduce=rollout_sum))[0], expected, rtol=1e-12, atol=0)


def test_rollouts_pass_through_states_and_learn():
    def state(context, said):
        return 2 * context + len(said)

    table = Table(torch.zeros(4, 3), state=state, length=2, lr=1.0, seed=3)
    wanted = torch.tensor([[1, 2], [0, 0]])
    for _ in range(60):
        batch = table.drawn([0, 1], 8, lambda context, said: bool((said == wanted[context]).all()))
        assert batch.extra["state"].tolist() == [0, 1] * 8 + [2, 3] * 8
        tabular.learnt(table, batch, standardized, clipped())
    assert table.probabilities.gather(1, wanted.reshape(-1, 1)).min() > 0.9
    assert table.updates == 60


def test_outputs_are_those_of_the_definition():
    table = Table(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    batch = table.given(torch.tensor([[4, 1]]), torch.tensor([1, 0]), torch.ones(1), 1)
    teacher = torch.zeros(2, 5, dtype=torch.float64)
    found, p = table.outputs(batch, teacher=teacher), table.probabilities[[1, 0]]
    torch.testing.assert_close(found.logprob, p[[0, 1], [4, 1]].log())
    torch.testing.assert_close(found.reverse_kl, (p * (p * 5).log()).sum(-1))
    torch.testing.assert_close(found.forward_kl, -(p * 5).log().mean(-1))
    torch.testing.assert_close(found.mean_logprob, p.log().mean(-1))
