"""dr_grpo: neither a rollout's length nor a group's deviation weighs in."""

import torch
from batches import gradient, ragged, recipe


def test_the_gradient_is_the_centred_reward_over_the_longest_length(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 0, 1)).replace(old_logprobs=None)
    got = gradient(recipe(tmp_path, "dr_grpo", max_new_tokens=11), batch, batch.rollout_logprobs)
    mean = batch.group_mean(batch.rewards)
    assert torch.allclose(got, -batch.to_tokens(batch.rewards - mean) / (4 * 11))


def test_options_reach_the_loss(tmp_path):
    batch = ragged((3, 2, 4, 1), (0, 0, 1, 1))
    logprob = batch.old_logprobs + torch.linspace(-1, 1, 10)
    plain = gradient(recipe(tmp_path, "dr_grpo"), batch, logprob)
    for options in ({"low": 0.5}, {"high": 0.5}, {"beta": 0.1}):
        assert not torch.allclose(gradient(recipe(tmp_path, "dr_grpo", **options), batch, logprob), plain)
