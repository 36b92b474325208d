"""sft: its loss is the cross-entropy of the answers, exactly."""

from types import SimpleNamespace

import torch
from test_batch import rollouts

from fuserl.engine import catalogue
from fuserl.engine.batch import batch_of
from fuserl.engine.config import Config


def test_loss_is_the_cross_entropy_of_the_answers():
    recipe = catalogue.recipe(Config(recipe="sft").resolved())
    batch = batch_of(rollouts(), torch.zeros(3))
    batch = batch.replace(advantages=batch.to_tokens(recipe.advantage(batch)))
    logits = torch.randn(6, 20)
    logprobs = logits.log_softmax(-1).gather(1, batch.tokens[:, None]).squeeze(1)
    per_token, _ = recipe.loss(SimpleNamespace(logprob=logprobs), batch)
    assert torch.allclose(per_token.sum(), torch.nn.functional.cross_entropy(logits, batch.tokens))
