"""grpo: on-policy it is REINFORCE with the group baseline, exactly; its options reach the loss."""

import torch
from batches import gradient, ragged, recipe, three


def test_on_policy_the_gradient_is_reinforce_with_the_group_baseline(tmp_path):
    grpo, batch = recipe(tmp_path, "grpo"), three()
    advantages = grpo.advantage(batch)
    expected = -batch.to_tokens(advantages) / (3 * batch.to_tokens(batch.lengths))
    assert torch.equal(gradient(grpo, batch, -torch.rand(6)), expected)
    assert advantages[2] == 0 and torch.allclose(advantages[:2], torch.tensor([-1.0, 1.0]) / 2**0.5)
    assert grpo.loss.live(batch.with_advantages(advantages)).tolist() == [True, True, True, False, False, False]


def test_options_reach_the_loss(tmp_path):
    batch = ragged((3, 2, 4, 1), (0, 0, 1, 1))
    logprob = batch.old_logprobs + torch.linspace(-1, 1, 10)
    plain = gradient(recipe(tmp_path, "grpo"), batch, logprob)
    for options in ({"low": 0.5}, {"high": 0.5}, {"dual": 1.1}, {"beta": 0.1}):
        assert not torch.allclose(gradient(recipe(tmp_path, "grpo", **options), batch, logprob), plain)
    assert recipe(tmp_path, "grpo", beta=0.1).loss.reads == ("ref_logprobs",)
    assert recipe(tmp_path, "grpo", entropy_coef=0.1).loss.outputs == ("logprob", "entropy")
    assert recipe(tmp_path, "grpo").loss.reads == () and recipe(tmp_path, "grpo").reads == ()
