"""sft: its loss is the cross-entropy of the answers, exactly."""

import torch
from batches import gradient, losses, recipe, three


def test_loss_and_gradient_are_those_of_the_cross_entropy(tmp_path):
    sft, batch = recipe(tmp_path, "sft"), three()
    logits = torch.randn(6, 20)
    logprob = logits.log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)
    expected = torch.nn.functional.cross_entropy(logits, batch.tokens)
    assert torch.allclose(losses(sft, batch, logprob=logprob).sum(), expected)
    assert torch.allclose(gradient(sft, batch, logprob), torch.tensor(-1 / 6)) and sft.learns_from == ("answer",)
