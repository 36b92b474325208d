"""Credit: each advantage against its definition in plain Python and float64, on ragged rollouts and any groups."""

import math
import re

import pytest
import torch
from batches import batches, each_rollout, ragged, steady, three
from hypothesis import given
from hypothesis import strategies as st

from fuserl.engine.advantages import (
    best_of,
    centred,
    discounted,
    generalised,
    leave_one_out,
    length_centred,
    normalised,
    over_batch,
    over_mean,
    overconfident,
    penalised,
    ranked,
    several,
    signed,
    standardized,
    token_rewards,
    uniform,
    whitened,
)


def close(got, expected, scale=1.0):
    assert got.dtype == torch.float32 and got.shape == torch.Size([len(expected)])
    assert got.tolist() == pytest.approx(expected, rel=2e-6, abs=2e-6 * scale)


def grouped(batch):
    """(rewards of the group, in float64; this one's) of each rollout."""
    return [
        (batch.rewards[batch.group == group].double(), float(reward))
        for group, reward in zip(batch.group, batch.rewards, strict=True)
    ]


def plain_discounted(x, batch, factor):
    """The definition, a double sum."""
    found = [0.0] * len(x)
    for span in each_rollout(batch):
        for t in range(span.start, span.stop):
            found[t] = sum(factor ** (s - t) * float(x[s]) for s in range(t, span.stop))
    return found


def plain_token_rewards(batch, beta):
    found = [0.0] * len(batch.tokens)
    for span, reward in zip(each_rollout(batch), batch.rewards.tolist(), strict=True):
        for t in range(span.start, span.stop):
            found[t] = -beta * (float(batch.old_logprobs[t]) - float(batch.ref_logprobs[t]))
            found[t] += reward if t == span.stop - 1 else 0.0
    return found


def plain_whitened(x):
    mean = sum(x) / len(x)
    return [(each - mean) / math.sqrt(sum((other - mean) ** 2 for other in x) / len(x)) for each in x]


@steady
@given(batches())
def test_group_advantages(batch):
    for function, of in (
        (centred, lambda rewards, r: r - float(rewards.mean())),
        (leave_one_out, lambda rewards, r: r - (float(rewards.sum()) - r) / (len(rewards) - 1)),
        (standardized, lambda rewards, r: (r - float(rewards.mean())) / (float(rewards.std()) + 1e-6)),
    ):
        close(function(batch), [of(rewards, r) if len(rewards) > 1 else 0.0 for rewards, r in grouped(batch)])
    close(uniform(batch), [1.0] * len(batch.group))


@steady
@given(batches(), st.data())
def test_over_mean(batch, data):
    batch = batch.replace(
        rewards=torch.tensor(
            data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(batch.group), max_size=len(batch.group)))
        )
    )
    expected = []
    for rewards, r in grouped(batch):
        mean = float(rewards.mean())
        expected.append(r if len(rewards) == 1 else (r - mean) / mean if mean else 0.0)
    close(over_mean(batch), expected)


@steady
@given(batches())
def test_advantages_over_the_batch_and_by_length(batch):
    r, lengths = batch.rewards.double(), batch.lengths.double()
    if len(r) > 1:
        close(over_batch(batch), ((r - r.mean()) / (r.std() + 1e-6)).tolist())
    expected = []
    for b, (rewards, reward) in enumerate(grouped(batch)):
        weights = lengths[batch.group == batch.group[b]]
        flat = rewards[weights > 0].unique()
        mean = float((weights * rewards).sum() / weights.sum()) if len(flat) != 1 else float(flat[0])
        expected.append(reward - mean if len(flat) else 0.0)
    close(length_centred(batch), expected)


def test_ranked_signed_and_best_of():
    batch = ragged((1, 2, 1, 1, 3, 1), (0, 0, 0, 1, 1, 1)).replace(rewards=torch.tensor([0.9, 5.0, -3, 0, 0, 0]))
    close(ranked(batch), [0, 0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6), 0, 0, 0])
    assert signed()(batch).tolist() == [1, 1, -1, -1, -1, -1]
    assert signed(keep="negative")(batch).tolist() == [0, 0, -1, -1, -1, -1]
    one = batch.replace(rewards=torch.tensor([1.0, 0, 0, 0, 0, 0]))
    rate = 2 / 3  # of pairs with the one success; 1/3 of its group without it, which is all failure
    close(best_of(2)(one), [x / math.sqrt(rate / 3) for x in (1 / 3, -1 / 6, -1 / 6)] + [0] * 3)


def test_overconfident_errors_weigh_more():
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1)).replace(rewards=torch.tensor([1.0, 0, 0, 1]))
    got, plain = overconfident(centred, alpha=2.0)(batch), centred(batch)
    gap = batch.rollout_sum(batch.old_logprobs - batch.ref_logprobs).tolist()
    factors = [1 + 2 * math.log1p(math.exp(c)) * (r == 0) for c, r in zip(gap, batch.rewards.tolist(), strict=True)]
    close(got, [a * factor for a, factor in zip(plain.tolist(), factors, strict=True)])
    even = batch.replace(ref_logprobs=batch.old_logprobs)
    close(overconfident(centred, alpha=1.0)(even), [0.5, -0.5 * (1 + math.log(2)), -0.5 * (1 + math.log(2)), 0.5])
    assert torch.equal(overconfident(centred, alpha=0.0)(batch), plain)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("penalty", ["softplus", "relu"])
def test_the_confidence_shift_may_be_a_mean_and_bounded(mean, penalty):
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1)).replace(rewards=torch.zeros(4))
    shift = torch.tensor([6.0, -2.0, 10.0, 0.5])  # of whole rollouts
    batch = batch.replace(old_logprobs=batch.ref_logprobs + batch.to_tokens(shift / batch.lengths))
    bounded = [min(c / (length if mean else 1), 4.0) for c, length in zip(shift.tolist(), (3, 1, 5, 2), strict=True)]
    expected = [3 * (max(c, 0.0) if penalty == "relu" else math.log1p(math.exp(c))) + 1 for c in bounded]
    close(overconfident(uniform, alpha=3.0, penalty=penalty, mean=mean, cap=4.0)(batch), expected, 16)


def test_what_makes_no_penalty_is_refused():
    for options, says in (
        ({"alpha": -1.0}, "alpha must be a finite number >= 0; got -1.0"),
        ({"penalty": "rely"}, "penalty must be one of softplus, relu; got 'rely'. Did you mean 'relu'?"),
        ({"cap": -1.0}, "cap must be a number >= 0, or None for no bound; got -1.0"),
    ):
        with pytest.raises(ValueError, match=f"^overconfident: {re.escape(says)}"):
            overconfident(centred, **{"alpha": 1.0, **options})


def test_a_channel_of_several_does_not_drown_another():
    rewards, group = torch.randn(12, 2), torch.arange(12) // 4
    weights = torch.tensor([1.0, 0.5])
    scaled = several(rewards * torch.tensor([1.0, 1000.0]), group, weights)
    torch.testing.assert_close(scaled, several(rewards, group, weights), rtol=1e-4, atol=1e-4)


def test_over_mean_refuses_negative_rewards():
    with pytest.raises(ValueError, match=r"over_mean: rewards must not be negative; got -1\.0"):
        over_mean(three().replace(rewards=torch.tensor([1.0, -1.0, 0.0])))


@steady
@given(batches(), st.sampled_from([0.0, 0.5, 0.97, 1.0]))
def test_discounted_sums(batch, factor):
    close(discounted(batch.values, batch, factor), plain_discounted(batch.values, batch, factor))


def test_a_long_sum_is_as_good_as_its_last_digit():
    batch = ragged((4096, 1), (0, 0))
    x = torch.full((4097,), 0.1)
    assert float(discounted(x, batch, 1.0)[0]) == float(torch.tensor(4096 * float(x[0])))
    assert torch.equal(x, torch.full((4097,), 0.1))  # what was given is left alone


@steady
@given(batches(), st.sampled_from([0.0, 0.3]))
def test_token_rewards_and_penalised_rewards(batch, beta):
    expected = plain_token_rewards(batch, beta)
    close(token_rewards(batch, beta), expected)
    shaped = penalised(beta)(batch).rewards
    if not beta:
        assert shaped is batch.rewards
    gap = batch.old_logprobs.double() - batch.ref_logprobs.double()
    close(
        shaped,
        [
            r - beta * float(gap[span].sum())
            for span, r in zip(each_rollout(batch), batch.rewards.tolist(), strict=True)
        ],
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("lengths", [(3, 1, 5, 2), (1, 1), (4, 0, 2, 7), (40, 3)])
def test_generalised_advantages(gamma, lam, beta, lengths):
    batch = ragged(lengths, [0] * len(lengths))
    rewards, expected = plain_token_rewards(batch, beta), [0.0] * len(batch.tokens)
    for span in each_rollout(batch):
        value, advantage = 0.0, 0.0
        for t in reversed(range(span.start, span.stop)):
            now = float(batch.values[t])
            advantage = rewards[t] + gamma * value - now + gamma * lam * advantage
            expected[t], value = advantage, now
    got = generalised(gamma=gamma, lam=lam, beta=beta, whiten=False)(batch)
    largest = max(map(abs, expected))
    close(got.advantages, expected, largest)
    close(got.returns, [a + float(v) for a, v in zip(expected, batch.values, strict=True)], largest)
    white = generalised(gamma=gamma, lam=lam, beta=beta)(batch)
    close(white.advantages, plain_whitened(expected), 10)
    assert torch.equal(white.returns, got.returns)  # of the advantages before


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("over_group", [False, True])
def test_normalised_over_the_batch(beta, over_group):
    batch = ragged((3, 1, 5, 2, 4), (0, 1, 0, 1, 1))
    centre = [r - float(rewards.mean()) * over_group for rewards, r in grouped(batch)]
    rewards = plain_token_rewards(batch.replace(rewards=torch.tensor(centre)), beta)
    expected = plain_whitened(plain_discounted(rewards, batch, 1.0))
    close(normalised(beta=beta, over_group=over_group)(batch), expected)


def test_rewards_that_agree_teach_nothing():
    batch = ragged((3, 1, 5, 2), (0, 0, 1, 1)).replace(rewards=torch.full((4,), 0.3))
    for advantage in (
        standardized,
        centred,
        leave_one_out,
        over_mean,
        normalised(beta=0.0),
        normalised(beta=0.0, over_group=True),
    ):
        assert not advantage(batch).any()


def test_whitened_has_mean_0_and_deviation_1():
    x = whitened(torch.tensor([1e4, 1e4 + 1, 1e4 + 2]))
    assert x.tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-6) and x.dtype == torch.float32
    assert whitened(torch.tensor([3.0, 3.0])).tolist() == [0, 0] and whitened(torch.zeros(0)).shape == (0,)
    assert whitened(torch.tensor([1.0, torch.nan])).isnan().all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: generalised(gamma=1.1, lam=1.0, beta=0.0),
            r"generalised: gamma must be in \[0, 1\]; 1 is no discount; got 1.1",
        ),
        (lambda: generalised(gamma=1.0, lam=-0.1, beta=0.0), "generalised: lam must be"),
        (
            lambda: generalised(gamma=1.0, lam=1.0, beta=math.inf),
            "generalised: beta must be a finite number >= 0; got inf",
        ),
        (lambda: penalised(-1.0), "penalised: beta must be a finite number >= 0; got -1.0"),
        (lambda: normalised(beta=math.nan), "normalised: beta must be a finite number >= 0; got nan"),
    ],
)
def test_numbers_that_make_no_credit_are_refused(make, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        make()


@pytest.mark.parametrize("credit", [generalised(gamma=1.0, lam=0.9, beta=0.0), normalised(beta=0.0)])
def test_credit_has_no_loop_over_rollouts_or_tokens(credit):
    def calls(lengths):
        with torch.profiler.profile() as profile:
            credit(ragged(lengths, [0] * len(lengths)))
        return sum(event.count for event in profile.key_averages())

    assert calls((5,) * 64) == calls((50,) * 3)
