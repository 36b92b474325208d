"""ppo: its options reach advantage, policy and value loss; the value model is a head on the trunk or a critic apart."""

from types import SimpleNamespace

import pytest
import torch
from batches import each_rollout, losses, ragged, recipe

from fuserl.engine import checks


def advantages(batch, gamma, lam):
    """Generalised advantages of the reward at the end, in plain Python."""
    found = [0.0] * len(batch.tokens)
    for span, reward in zip(each_rollout(batch), batch.rewards.tolist(), strict=True):
        value = advantage = 0.0
        for t in reversed(range(span.start, span.stop)):
            now = float(batch.values[t])
            advantage = reward * (t == span.stop - 1) + gamma * value - now + gamma * lam * advantage
            found[t], value = advantage, now
    return torch.tensor(found)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_the_loss_is_the_surrogate_plus_the_value_loss(gamma, lam, tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 2, 3))
    options = dict(gamma=gamma, lam=lam, whiten=False, value_coef=0.7, value_clip=0.4, low=0.1, high=0.3)
    ppo = recipe(tmp_path, "ppo", **options)
    random = torch.Generator().manual_seed(1)
    value, logprob = torch.randn(11, generator=random), batch.old_logprobs + 0.3 * torch.randn(11, generator=random)
    a = advantages(batch, gamma, lam)
    ratio = (logprob - batch.old_logprobs).exp()
    policy = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
    near = batch.values + (value - batch.values).clamp(-0.4, 0.4)
    error = torch.maximum((value - a - batch.values) ** 2, (near - a - batch.values) ** 2) / 2
    got = losses(ppo, batch, logprob=logprob, value=value)
    assert torch.allclose(got, (policy + 0.7 * error) / 11, rtol=1e-4, atol=1e-6)
    assert ppo.critic is None and ppo.loss.outputs == ("logprob", "value") and ppo.reads == ("values",)


def test_a_critic_apart_has_the_same_losses_in_two(tmp_path):
    batch = ragged((3, 1, 5, 2), (0, 1, 2, 3))
    whole, apart = (recipe(tmp_path, "ppo", separate_critic=separate, value_coef=0.7) for separate in (False, True))
    random = torch.Generator().manual_seed(1)
    value, logprob = torch.randn(11, generator=random), batch.old_logprobs + 0.3 * torch.randn(11, generator=random)
    credited = checks.credited(batch, apart.advantage)
    theirs = apart.critic.loss(SimpleNamespace(value=value), credited)[0]
    both = losses(apart, batch, logprob=logprob) + 0.7 * theirs
    assert torch.allclose(both, losses(whole, batch, logprob=logprob, value=value))
    assert apart.critic.lr is None and recipe(tmp_path, "ppo", separate_critic=True, critic_lr=0.1).critic.lr == 0.1


def test_advantages_are_white_by_default_and_a_penalty_reads_the_reference(tmp_path):
    batch, ppo = ragged((3, 1, 5, 2), (0, 1, 2, 3)), recipe(tmp_path, "ppo")
    white = ppo.advantage(batch).advantages
    assert float(white.mean()) == pytest.approx(0, abs=1e-6) and float(white.std(correction=0)) == pytest.approx(1)
    held = recipe(tmp_path, "ppo", beta=0.1)
    assert set(held.reads) == {"values", "old_logprobs", "ref_logprobs"}
    assert not torch.allclose(held.advantage(batch).advantages, white)
