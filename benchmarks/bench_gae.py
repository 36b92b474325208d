"""gae of 64 x 4096 and 8 x 32768 tokens: against a copy of the same bytes, verl's and TRL's loop over time, and torch.

Two reads and two writes a token are the floor. Above it one thread has the four steps in which a vector of sixteen
tokens is scanned; one token after the other, as in the loop, would each wait for a product and a sum, four cycles.
"""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.gae import gae

GAMMA, LAM = 0.99, 0.95


def loop(rewards, values, mask):
    """Generalised advantages as trainers have them (verl's core_algos, TRL's PPOTrainer): one token of all rows a step.

    A masked token hands on what came to it.
    """
    following, last, found = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        advantage = delta + GAMMA * LAM * last
        following = values[:, t] * mask[:, t] + (1 - mask[:, t]) * following
        last = advantage * mask[:, t] + (1 - mask[:, t]) * last
        found.append(last)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def products(rewards, values, width=128):
    """In torch without a loop over tokens: a triangular product for each stretch of `width`, and a loop over those."""
    rows, T = rewards.shape
    following = torch.cat([values[:, 1:], values.new_zeros(rows, 1)], 1)
    delta = (rewards + GAMMA * following - values).view(rows, T // width, width)
    powers = (GAMMA * LAM) ** torch.arange(width + 1, device=rewards.device, dtype=rewards.dtype)
    apart = torch.arange(width, device=rewards.device)
    apart = apart[:, None] - apart
    within = delta @ torch.where(apart >= 0, powers[apart.clamp(min=0)], 0.0)
    carry, carries = rewards.new_zeros(rows), []
    for stretch in reversed(range(T // width)):
        carries.append(carry)
        carry = within[:, stretch, 0] + powers[width] * carry
    carries = torch.stack(carries[::-1], 1)
    advantages = (within + powers[1:].flip(0) * carries[..., None]).view(rows, T)
    return advantages, advantages + values


def cases(rows, tokens, device, masked):
    """Rewards, values and a mask whose rows end in padding; the truth of them in double."""
    rewards, values = torch.randn(2, rows, tokens, device=device)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), device=device)
    mask = torch.arange(tokens, device=device) < (lengths if masked else torch.full_like(lengths, tokens))
    return rewards, values, mask, loop(rewards.double(), values.double(), mask.double())


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize(("rows", "tokens"), [(64, 4096), (8, 32768), (64, 32768)])
def test_gae(benchmark, device, smoke, rows, tokens, masked):
    if smoke:
        rows, tokens = 3, 256
    elif device == "cpu" and rows * tokens > 1 << 18:
        pytest.skip("a GPU's size")
    rewards, values, mask, truth = cases(rows, tokens, device, masked)

    def right(found):
        for got, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(
                torch.where(mask, got.double(), 0), torch.where(mask, expected, 0), rtol=1e-4, atol=1e-4
            )

    source = torch.randn(2 * rewards.numel(), device=device)
    target, kept = torch.empty_like(source), mask.to(rewards.dtype)
    providers = [
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", lambda: gae(rewards, values, gamma=GAMMA, lam=LAM, mask=mask if masked else None), right),
        Provider("a loop over time (verl, TRL)", lambda: loop(rewards, values, kept), right),
    ]
    if not masked:
        providers.append(Provider("torch, products of stretches", lambda: products(rewards, values), right))
    compare(benchmark, *providers, rounds=3, smoke=smoke)
