"""dpo: its loss is that of the paper on any pairs, in any order, whole or in pieces."""

from types import SimpleNamespace

import pytest
import torch
from batches import each_rollout, losses, pairs, recipe


def plain(batch, logprob, beta, smoothing):
    """Equation 7 of the paper: the mean over pairs of -log sigmoid of the margin; and with labels turned round."""
    totals = torch.stack([(logprob[span] - batch.ref_logprobs[span].double()).sum() for span in each_rollout(batch)])
    each = []
    for group in batch.group.unique():
        mine = batch.group == group
        margin = beta * (totals[mine & (batch.rewards == 1)] - totals[mine & (batch.rewards == 0)])
        each.append(-(1 - smoothing) * torch.sigmoid(margin).log() - smoothing * torch.sigmoid(-margin).log())
    return torch.cat(each).mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_the_loss_and_its_gradient_are_the_papers(seed, beta, smoothing, tmp_path):
    batch = pairs((3, 1, 4, 2, 2, 5, 1, 1), seed=seed)
    dpo = recipe(tmp_path, "dpo", beta=beta, label_smoothing=smoothing)
    wide, narrow = (batch.rollout_logprobs.to(kind).requires_grad_() for kind in (torch.float64, torch.float32))
    expected = plain(batch, wide, beta, smoothing)
    got = losses(dpo, batch, logprob=narrow).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(total, leaf)[0].double() for total, leaf in ((got, narrow), (expected, wide))]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9) and dpo.loss.scope == "group"


def test_pieces_of_whole_pairs_have_the_same_losses(tmp_path):
    batch, dpo = pairs((3, 1, 4, 2, 2, 5, 1, 1)), recipe(tmp_path, "dpo")
    whole = losses(dpo, batch, logprob=batch.rollout_logprobs)
    for groups in ([0], [1, 3], [2, 0]):
        index = torch.tensor([b for group in groups for b in (batch.group == group).nonzero().squeeze(-1).tolist()])
        rows = batch.rows_of(index)
        for part in (batch.take(rows), batch.rollouts_at(index)):
            seen = dpo.loss(SimpleNamespace(logprob=part.rollout_logprobs), part)[0]
            assert torch.allclose(seen, whole[rows])


def test_a_pair_is_never_cut_by_minibatches(tmp_path):
    batch, dpo = pairs((1, 2, 3, 1)), recipe(tmp_path, "dpo")
    parts = batch.minibatches(4, whole_groups=True)
    assert [len(part.group) for part in parts] == [2, 2]
    each = [losses(dpo, part, logprob=part.rollout_logprobs).sum() for part in parts]
    assert sum(each).item() / 2 == pytest.approx(losses(dpo, batch, logprob=batch.rollout_logprobs).sum().item())


def test_confidence_pays_less_and_less(tmp_path):
    batch = pairs((1, 1)).replace(rewards=torch.tensor([1.0, 0.0]), ref_logprobs=torch.zeros(2))
    far = [
        losses(recipe(tmp_path, "dpo", beta=1.0), batch, logprob=torch.tensor([x, -x])).sum()
        for x in (0.0, 1.0, 5e1, -5e1)
    ]
    assert far[0] > far[1] > far[2] >= 0 and far[3].item() == pytest.approx(100)
