"""Constrained optimisation: which rollouts each strategy learns from, with what weight, and the sum over tasks."""

import math
from types import SimpleNamespace

import pytest
import torch
from batches import ragged

from fuserl.engine import checks, constrained
from fuserl.engine.constrained import Strategy, codpo, crpg, crraft, log_ratios, preferred, reinforced, several
from fuserl.engine.losses import every_token

LENGTHS, GROUP = (3, 1, 4, 2, 2, 5), (0, 0, 0, 1, 1, 1)
STORED = (0, 0, 1, 0, 0, 1)


def judged(passes, score, *, task=(0,) * 6, small=False):
    """Two drawn completions and a stored one of each of two prompts, in float64."""
    batch = ragged(LENGTHS, GROUP)
    wide = {
        name: getattr(batch, name).double() for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "rewards")
    }
    if small:
        wide["ref_logprobs"] = wide["old_logprobs"].clone()
    score, stored = torch.tensor(score, dtype=torch.float64), torch.tensor(STORED, dtype=torch.float64)
    found = constrained.calibrated(score, batch.group, stored > 0)
    facts = {
        "passes": torch.tensor(passes, dtype=torch.float64),
        "score": score,
        "calibrated": found,
        "baseline": stored,
    }
    facts["task"] = torch.tensor(task, dtype=torch.float64)
    return batch.replace(**wide, facts=facts, advantages=None, values=None, returns=None, extra={})


def start(batch):
    return batch.replace(rollout_logprobs=batch.old_logprobs)


def test_calibration_is_beside_the_stored_one():
    batch = judged((1,) * 6, (1.0, 2.0, 0.5, -1.0, 3.0, -2.0))
    expected = torch.tensor([0.5, 1.5, 0.0, 1.0, 5.0, 0.0], dtype=torch.float64).sigmoid()
    assert torch.equal(batch.facts["calibrated"], expected)


def test_crpg_is_its_equation():
    batch = judged((1, 1, 1, 0, 1, 1), (1.0, 2.0, 0.5, -1.0, 3.0, -2.0))
    k = [sum((batch.old_logprobs - batch.ref_logprobs)[batch.rollout == b].tolist()) for b in range(6)]
    assert log_ratios(batch).tolist() == pytest.approx(k)
    drawn = [0, 1, 3, 4]
    rewards = [float(batch.facts["passes"][b] * batch.facts["calibrated"][b]) * max(1 - k[b] / 1.5, 0) for b in drawn]
    made = crpg(batch, 1.5)
    mean = sum(rewards) / 4
    assert made.counts.rollouts == 4 and made.lengths.tolist() == [3, 1, 2, 2]
    assert [float(made.advantages[made.rollout == b][0]) for b in range(4)] == pytest.approx(
        [r - mean for r in rewards]
    )
    gradient = checks.gradient(start(made), reinforced())
    assert torch.allclose(gradient, -made.advantages / 4, rtol=1e-12)


def test_what_is_too_far_or_does_not_pass_earns_nothing():
    batch = judged((1, 1, 1, 0, 1, 1), (1.0, 2.0, 0.5, -1.0, 3.0, -2.0))
    least = float(log_ratios(batch).clamp(min=1e-6).min())
    rewards = constrained.regularised(batch, least)
    assert (rewards[log_ratios(batch) >= least] == 0).all() and rewards[3] == 0
    nothing = crpg(judged((0,) * 6, (1.0, 2.0, 0.5, -1.0, 3.0, -2.0)), 5.0)
    assert torch.equal(checks.gradient(start(nothing), reinforced()), torch.zeros(8).double())


@pytest.mark.parametrize(
    ("passes", "score", "chosen"),
    [
        ((1, 0, 1, 0, 1, 1), (1.0, 2.0, 9.0, 4.0, 3.0, -9.0), [(0, 1), (4, 3)]),
        ((1, 0, 1, 0, 1, 1), (-3.0, -5.0, 0.0, -1.0, -8.0, 0.0), [(0, 1), (4, 3)]),  # masks, no products
        ((1, 1, 0, 1, 1, 0), (1.0, 2.0, 0.0, 4.0, 3.0, 0.0), [(1, 0), (3, 4)]),  # all pass: the worst of them
        ((0, 0, 1, 1, 0, 1), (1.0, 2.0, 0.0, 4.0, 3.0, 0.0), [(3, 4)]),  # a prompt of which nothing passes
        ((0, 0, 1, 0, 0, 1), (1.0, 2.0, 0.0, 4.0, 3.0, 0.0), []),
        ((1, 1, 0, 1, 1, 0), (2.0, 2.0, 0.0, 4.0, 3.0, 0.0), [(0, 0), (3, 4)]),
    ],
)
def test_codpo_pairs_the_best_that_passes_with_the_worst_that_does_not(passes, score, chosen):
    made = codpo(judged(passes, score))
    assert made.lengths.tolist() == [LENGTHS[b] for pair in chosen for b in pair]
    assert made.rewards.tolist() == [1, 0] * len(chosen) and made.counts.groups == len(chosen)


def test_codpo_is_its_equation():
    """lam / |y_w| of the chosen one's log-prob beside DPO, averaged over pairs."""
    made, beta, lam = codpo(judged((1, 0, 1, 0, 1, 1), (1.0, 2.0, 9.0, 4.0, 3.0, -9.0))), 0.3, 0.7
    logprob = made.old_logprobs + 0.1
    sums = [float((logprob - made.ref_logprobs)[made.rollout == b].sum()) for b in range(4)]
    means = [float(logprob[made.rollout == b].mean()) for b in range(4)]
    margins = [beta * (sums[0] - sums[1]), beta * (sums[2] - sums[3])]
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 2 - lam * (means[0] + means[2]) / 2
    found = preferred(beta, lam)(SimpleNamespace(logprob=logprob), made)[0].sum()
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_crraft_takes_the_best_that_is_near_and_the_stored_one_where_none_is():
    batch = judged((1, 1, 1, 0, 0, 1), (1.0, 2.0, 0.5, -1.0, 3.0, -2.0), small=True)
    made = crraft(batch, 1.0)
    assert made.lengths.tolist() == [LENGTHS[1], LENGTHS[5]] and made.counts.rollouts == 2
    weights = [float(made.advantages[made.rollout == b][0]) for b in range(2)]
    assert weights == pytest.approx([1 / (1 + math.exp(-1.5)), 0.5])
    skipped = crraft(judged((1, 1, 1, 0, 0, 0), (1.0, 2.0, 0.5, -1.0, 3.0, -2.0), small=True), 1.0)
    assert skipped.lengths.tolist() == [LENGTHS[1]]
    far = judged((1,) * 6, (1.0, 2.0, 0.5, -1.0, 3.0, -2.0))
    far = far.replace(ref_logprobs=far.old_logprobs - 1)  # k is the length
    assert crraft(far, 2.0).lengths.tolist() == [LENGTHS[1], LENGTHS[4]] and not len(crraft(far, 0.5).group)


def test_the_gradient_is_the_weighted_sum_of_the_tasks():
    """Each task normalised by its own, as if it were alone."""
    batch = judged((1, 0, 1, 0, 1, 1), (1.0, 2.0, 9.0, 4.0, 3.0, -9.0), task=(0, 0, 0, 1, 1, 1))
    for names in (("crpg", "codpo"), ("codpo", "crraft"), ("crraft", "crpg")):
        strategies = [Strategy(name, 3.0, weight) for name, weight in zip(names, (1.0, 0.25), strict=True)]
        advantage, loss = several(strategies, beta=0.1, lam=1.0)
        made = advantage(batch)
        total = float(loss(SimpleNamespace(logprob=made.old_logprobs + 0.2), made)[0].sum())
        expected = 0.0
        for number, each in enumerate(strategies):
            own = constrained.mixtures.only(batch, batch.facts["task"] == number)
            own = constrained.OPTIMIZERS[each.optimizer](own, 3.0)
            alone = preferred(0.1, 1.0) if each.optimizer == "codpo" else reinforced()
            expected += each.weight * float(alone(SimpleNamespace(logprob=own.old_logprobs + 0.2), own)[0].sum())
        assert total == pytest.approx(expected, rel=1e-12)


def test_dropping_changes_nothing():
    batch = judged((1, 0, 1, 0, 0, 1), (1.0, 2.0, 9.0, 4.0, 3.0, -9.0), task=(0, 0, 0, 1, 1, 1))
    advantage, loss = several([Strategy("crpg"), Strategy("crpg")], beta=0.1, lam=1.0)
    made = advantage(batch)
    live = loss.live(made)
    found = loss(SimpleNamespace(logprob=made.old_logprobs), made)[0]
    assert not live.all() and live.any() and every_token(made) is None
    assert (found[~live] == 0).all()
    part = made.take(live.nonzero().squeeze(-1))
    assert float(loss(SimpleNamespace(logprob=part.old_logprobs), part)[0].sum()) == pytest.approx(float(found.sum()))


def test_pairs_of_data_are_for_dpo_alone():
    batch = judged((1,) * 6, (0.0,) * 6).rollouts_at(torch.tensor([0, 1, 3, 4])).counted()
    batch = batch.replace(facts={}, rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]).double())
    advantage, loss = several([Strategy(), Strategy("codpo")], beta=0.2, lam=1.0)
    made = advantage(batch.replace(rollout_logprobs=torch.full_like(batch.old_logprobs, math.nan)))
    out = SimpleNamespace(logprob=batch.old_logprobs + 0.1)
    expected = constrained.preference(beta=0.2)(out, batch)[0].sum()
    assert torch.allclose(loss(out, made)[0].sum(), expected, rtol=1e-12) and not made.rollout_logprobs.isnan().any()


def test_settings_are_one_for_all_or_one_for_each():
    assert constrained.each_of("judges", "a, b", ["t", "u"]) == ["a", "b"]
    assert constrained.numbers_of("k", "4", ["t", "u"], int) == [4, 4]
    for text, says in (("1,2,3", "one, or one for each of 2 tasks"), ("x", "must be numbers"), ("0", "numbers > 0")):
        with pytest.raises(ValueError, match=says):
            constrained.numbers_of("kl_max", text, ["t", "u"], float)
