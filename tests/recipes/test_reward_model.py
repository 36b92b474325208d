"""reward_model: the likelihood of pairs under scores at the last tokens."""

import pytest
import torch
from batches import each_rollout, losses, pairs, recipe


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("centre", [0.0, 0.05])
def test_the_loss_and_its_gradient_are_those_of_the_scores(seed, centre, tmp_path):
    batch, model = pairs((3, 1, 4, 2, 2, 5, 1, 1), seed=seed), recipe(tmp_path, "reward_model", centre=centre)
    value = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(seed))
    wide, narrow = (value.to(kind).requires_grad_() for kind in (torch.float64, torch.float32))
    scores = torch.stack([wide[span.stop - 1] for span in each_rollout(batch)])
    each = []
    for group in batch.group.unique():
        chosen, rejected = (scores[(batch.group == group) & (batch.rewards == reward)] for reward in (1, 0))
        each.append((1 + (rejected - chosen).exp()).log() + centre * (chosen + rejected) ** 2)
    expected = torch.cat(each).mean()
    got = losses(model, batch, score=narrow).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(total, leaf)[0].double() for total, leaf in ((got, narrow), (expected, wide))]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    assert not gradients[0][~batch.last].any() and gradients[0][batch.last].all()


def test_it_learns_from_pairs_with_a_head_alone(tmp_path):
    model = recipe(tmp_path, "reward_model")
    assert model.loss.outputs == ("score",) and model.loss.scope == "group" and model.reward is None
    assert model.learns_from == ("chosen", "rejected") and model.critic is None
