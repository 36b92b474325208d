"""cispo: the gradient at a token is its truncated ratio times the advantage, however far the ratio has gone."""

import torch
from batches import gradient, losses, ragged, recipe


def test_the_weight_is_truncated_and_never_gone(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 0, 1))
    ratio = torch.tensor([0.01, 0.5, 1, 2, 4, 4.9, 5, 6, 100, 1, 3])
    batch = batch.replace(old_logprobs=batch.rollout_logprobs - ratio.log())
    for options, least, most in (({}, 0.0, 5.0), ({"low": 0.2, "high": 0.5}, 0.8, 1.5)):
        cispo = recipe(tmp_path, "cispo", **options)
        advantages = batch.to_tokens(cispo.advantage(batch))
        expected = -ratio.clamp(least, most) * advantages / 11
        assert torch.allclose(gradient(cispo, batch, batch.rollout_logprobs), expected, rtol=1e-5)
        each = losses(cispo, batch, logprob=batch.rollout_logprobs)
        assert torch.allclose(each, expected * batch.rollout_logprobs, rtol=1e-5)
