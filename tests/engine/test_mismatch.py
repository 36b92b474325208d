"""Mismatch of rollout and update: against plain float64, however it is cut, and where weights would overflow."""

import math

import pytest
import torch

from fuserl.engine import mismatch


def batch(seed, spread, rollouts=9):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rollouts,), generator=random)
    rollout = torch.arange(rollouts).repeat_interleave(lengths)
    drawn = -3 * torch.rand(len(rollout), generator=random)
    return drawn + spread * torch.randn(len(rollout), generator=random), drawn, rollout


def plain(logprobs, drawn, rollout):
    """The definitions, one by one, in Python's integers and exact sums of float64."""
    gaps = [a - b for a, b in zip(logprobs.tolist(), drawn.tolist(), strict=True)]
    whole = {}
    for each, gap in zip(rollout.tolist(), gaps, strict=True):
        whole[each] = whole.get(each, 0.0) + gap

    def ess(logs):
        top = max(logs)
        w = [math.exp(each - top) for each in logs]
        return math.fsum(w) ** 2 / (len(w) * math.fsum(each * each for each in w))

    return {
        "mismatch": math.fsum(map(abs, gaps)) / len(gaps), "mismatch_max": max(map(abs, gaps)),
        "mismatch_ess": ess(gaps), "mismatch_rollout_ess": ess(list(whole.values())),
    }  # fmt: skip


def of_parts(logprobs, drawn, rollout, cuts):
    """The statistics of runs of whole rollouts, merged."""
    parts = []
    for first, last in zip([0, *cuts], [*cuts, int(rollout.max()) + 1], strict=True):
        at = (rollout >= first) & (rollout < last)
        parts.append(mismatch.statistics(logprobs[at], drawn[at], rollout[at] - first, last - first))
    return mismatch.merged(torch.stack(parts))


def values(whole):
    return {name: float(value) for name, value in mismatch.named(whole).items()}


@pytest.mark.parametrize("spread", [1e-4, 0.5, 5.0, 100.0])
@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3, 8], [0, 5, 5]])
def test_parts_give_what_the_definition_gives(spread, cuts):
    for seed in range(5):
        given = batch(seed, spread)
        # Float64 rounds each step by 2^-53; the logarithms of sums, of size `spread` and a dozen gaps, lose that much.
        rounding = 2.0**-52 * (64 + 24 * spread * 12)
        assert values(of_parts(*given, cuts)) == pytest.approx(plain(*given), rel=rounding)


def test_merging_of_merged_parts_is_merging_of_all():
    given, parts = batch(0, 2.0), []
    for first in range(9):
        at = given[2] == first
        parts.append(mismatch.statistics(given[0][at], given[1][at], given[2][at] - first, 1))
    nested = torch.stack([mismatch.merged(torch.stack(each)) for each in (parts[:2], parts[2:7], parts[7:])])
    assert values(mismatch.merged(nested)) == pytest.approx(plain(*given), rel=1e-12)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_weights_beyond_float32_count_as_they_should(shift):
    drawn, rollout = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    logprobs = torch.tensor([shift, shift, shift, shift])
    assert math.isinf(torch.tensor(abs(shift)).exp())  # in float32
    even = values(mismatch.statistics(logprobs, drawn, rollout, 2))
    assert [even["mismatch_ess"], even["mismatch_rollout_ess"]] == pytest.approx([1.0, 1.0])
    assert even["mismatch"] == even["mismatch_max"] == 100.0
    one = values(mismatch.statistics(torch.tensor([100.0, -100, -100, -100]), drawn, rollout, 2))
    assert one["mismatch_ess"] == pytest.approx(1 / 4) and one["mismatch_rollout_ess"] == pytest.approx(1 / 2)


def test_the_same_policy_has_every_sample():
    same = torch.randn(30)
    found = values(mismatch.statistics(same, same, torch.arange(30) // 5, 6))
    assert found["mismatch"] == found["mismatch_max"] == 0.0
    assert [found["mismatch_ess"], found["mismatch_rollout_ess"]] == pytest.approx([1.0, 1.0])


def test_tokens_without_log_probs_count_nowhere():
    logprobs, drawn, rollout = batch(1, 1.0)
    holes = drawn.clone()
    holes[rollout == 3] = math.nan
    kept = rollout != 3
    expected = plain(logprobs[kept], drawn[kept], rollout[kept])
    assert values(mismatch.statistics(logprobs, holes, rollout, 9)) == pytest.approx(expected, rel=1e-12)
    nothing = values(mismatch.statistics(logprobs, torch.full_like(drawn, math.nan), rollout, 9))
    assert all(map(math.isnan, nothing.values()))
    assert all(map(math.isnan, values(mismatch.statistics(*torch.empty(2, 0), rollout[:0], 0)).values()))


def test_a_token_that_the_model_would_never_draw_has_weight_zero():
    found = values(mismatch.statistics(torch.tensor([-math.inf, 0.0]), torch.zeros(2), torch.tensor([0, 1]), 2))
    assert found["mismatch_ess"] == found["mismatch_rollout_ess"] == 0.5 and math.isinf(found["mismatch"])
