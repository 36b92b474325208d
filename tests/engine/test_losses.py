"""Token losses: the gradient of each is that of its formula, and neither cutting nor dropping tokens changes it.

The formulas are loops over rollouts in float64, one number for the whole batch.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from batches import each_rollout, pairs, ragged, three
from loss_formulas import LOSSES

from fuserl.engine import checks
from fuserl.engine.importance import mean_importance, rollout_importance, token_importance
from fuserl.engine.losses import (
    Loss,
    asymmetric,
    asymmetric_rollouts,
    clipped,
    clipped_rollouts,
    decoupled,
    gated,
    geometric_rollouts,
    mean_over,
    negative_logprob,
    rollout_mean,
    rollout_sum,
    squared_value,
    summed,
    token_mean,
    truncated,
)
from fuserl.engine.preferences import bradley_terry, preference
from fuserl.kernels.policy_statistics import STATISTICS
from fuserl.kernels.surrogates import Truncate, Within

ALL = pytest.mark.parametrize("name", LOSSES)
CORRECTED = {name for name in LOSSES if "corrected" in name or name == "decoupled"}
OF_ROLLOUTS = {"rollouts", "rollouts_by_token", "rollouts_corrected", "geometric", "corrected_rollouts"}
TOPR = {"asymmetric_rollouts", "asymmetric_rollouts_corrected"}
OF_ROLLOUTS |= TOPR
OF_TOKENS = {"clipped", "dual", "truncated", "asymmetric", "asymmetric_corrected", "gated", "decoupled"}
FUSED = sorted(OF_ROLLOUTS | OF_TOKENS | {"kl", "corrected_kl"})


def batch_for(loss, seed=0):
    """A batch of ragged rollouts, some of them empty, in groups that are not contiguous; pairs for losses of pairs."""
    if loss.scope == "group":
        return pairs((3, 1, 4, 2, 2, 5, 1, 1), seed=seed)
    return ragged((3, 0, 5, 2, 1, 4, 2, 6, 0), (1, 0, 1, 2, 0, 2, 2, 0, 1), seed=seed)


def outputs_for(batch, seed=0):
    """What a model might say of each token, in float32."""
    random = torch.Generator().manual_seed(seed + 100)
    names = ("logprob", "entropy", "value", "score")
    found = {name: torch.randn(len(batch.tokens), generator=random) for name in names}
    return {**found, "logprob": (found["logprob"] - 1.5).clamp(max=-0.05)}


def evaluated(loss, batch, outputs):
    """Losses, their gradient in each output that the loss asks for, and statistics; it is given no other output."""
    leaves = {name: outputs[name].clone().requires_grad_() for name in loss.outputs}
    each, statistics = loss(SimpleNamespace(**leaves), batch)
    gradients = torch.autograd.grad(each.sum(), list(leaves.values()))
    return each.detach(), dict(zip(leaves, gradients, strict=True)), statistics


@ALL
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_are_those_of_the_formula(name, seed):
    loss, formula = LOSSES[name]
    batch = batch_for(loss, seed)
    outputs = outputs_for(batch, seed)
    each, gradients, _ = evaluated(loss, batch, outputs)
    leaves = {name: outputs[name].double().requires_grad_() for name in loss.outputs}
    expected = formula(leaves, batch)
    truth = torch.autograd.grad(expected, list(leaves.values()))
    assert float(each.double().sum()) == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for got, wanted in zip(gradients.values(), truth, strict=True):
        assert got.dtype == torch.float32 and wanted.abs().max() > 1e-3
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*FUSED])
def test_without_old_logprobs_the_update_is_on_policy(name):
    loss = LOSSES[name][0]
    batch = batch_for(loss)
    outputs = outputs_for(batch)
    without = evaluated(loss, batch.replace(old_logprobs=None), outputs)
    current = evaluated(loss, batch.replace(old_logprobs=outputs["logprob"]), outputs)
    assert torch.equal(without[0], current[0]) and torch.equal(without[1]["logprob"], current[1]["logprob"])


def pieces(loss, batch, seed):
    """The batch in three parts, of what its loss must see together: (a part, its rows of the whole) of each."""
    random = torch.Generator().manual_seed(seed)
    if loss.scope == "token":
        rows = torch.randperm(len(batch.tokens), generator=random)
        yield from ((batch.take(part), part) for part in rows.tensor_split(3))
    everyone = torch.randperm(len(batch.group), generator=random)
    if loss.scope == "group":
        groups = batch.group.unique()[torch.randperm(len(batch.group.unique()), generator=random)]
        members = [[b for b in everyone.tolist() if batch.group[b] in part] for part in groups.tensor_split(3)]
        parts = [torch.tensor(part) for part in members]
    else:
        parts = everyone.tensor_split(3)
    for part in parts:
        rows = batch.rows_of(part)
        yield batch.take(rows), rows
        yield batch.rollouts_at(part), rows
        some = batch.rollouts_at(part)
        for micro in some.micro_batches(torch.arange(len(part)), 6, whole_groups=loss.scope == "group"):
            yield some.rollouts_at(micro), rows[some.rows_of(micro)]


@ALL
@pytest.mark.parametrize("seed", range(3))
def test_no_cut_changes_a_loss_or_a_gradient(name, seed):
    loss = LOSSES[name][0]
    batch = batch_for(loss, seed)
    outputs = outputs_for(batch, seed)
    each, gradients, statistics = evaluated(loss, batch, outputs)
    for part, rows in pieces(loss, batch, seed):
        losses_there, gradients_there, seen = evaluated(loss, part, {name: x[rows] for name, x in outputs.items()})
        assert torch.allclose(losses_there, each[rows], rtol=1e-6, atol=1e-9)
        for name, got in gradients_there.items():
            assert torch.allclose(got, gradients[name][rows], rtol=1e-6, atol=1e-9)
        for name, got in seen.items():
            if statistics[name].dim() == 1:
                assert torch.allclose(got, statistics[name][rows], rtol=1e-6, equal_nan=True)


@ALL
def test_where_a_loss_is_not_live_its_gradient_vanishes_and_dropping_it_changes_nothing(name):
    loss = LOSSES[name][0]
    batch = batch_for(loss)
    outputs = outputs_for(batch)
    each, gradients, _ = evaluated(loss, batch, outputs)
    live = loss.live(batch)
    if live is None:
        return
    assert live.dtype == torch.bool and live.shape == batch.tokens.shape and 0 < live.sum() < len(live)
    assert (gradients["logprob"][~live] == 0).all() and (each[~live] == 0).all()
    rows = live.nonzero().squeeze(-1)
    kept, gradients_there, _ = evaluated(loss, batch.take(rows), {name: x[rows] for name, x in outputs.items()})
    assert torch.allclose(kept, each[rows], rtol=1e-6) and float(kept.sum()) == pytest.approx(float(each.sum()))
    assert torch.allclose(gradients_there["logprob"], gradients["logprob"][rows], rtol=1e-6)
    if loss.scope == "rollout":  # the rows of a rollout stay together, or go together
        assert all(live[span].all() or not live[span].any() for span in each_rollout(batch))


@ALL
def test_live_spares_all_that_can_be_known_to_vanish(name):
    loss = LOSSES[name][0]
    by_advantage = OF_ROLLOUTS | OF_TOKENS | {"sum", "mean_over", "likelihood"}
    assert (loss.live(batch_for(loss)) is not None) == (name in by_advantage)
    # Rows of a rollout stay together where one ratio is of all, and an importance weight may be 0 beyond a bound.
    if name in by_advantage - TOPR - {"rollouts_by_token", "corrected_rollouts", "asymmetric_corrected"}:
        batch = batch_for(loss).replace(old_logprobs=None)
        _, gradients, _ = evaluated(loss, batch, outputs_for(batch))
        assert ((gradients["logprob"] != 0) == loss.live(batch)).all()  # on-policy nothing is clipped


@ALL
def test_a_loss_reads_what_it_says_and_gives_float32_and_statistics_of_either_shape(name):
    loss = LOSSES[name][0]
    batch = batch_for(loss)
    unread = {"ref_logprobs", "values"} - set(loss.reads)
    unread |= set() if name in CORRECTED else {"rollout_logprobs"}
    bare = batch.replace(extra={}, **dict.fromkeys(unread))
    each, _, statistics = evaluated(loss, bare, outputs_for(batch))
    assert each.dtype == torch.float32 and each.shape == batch.tokens.shape and each.isfinite().all()
    shapes = {value.shape for value in statistics.values()}
    assert statistics and shapes <= {batch.tokens.shape, (1, len(STATISTICS))}
    assert not any(value.requires_grad for key, value in statistics.items() if key in ("policy", "ratio", "margin"))
    for wanted in loss.reads:
        with pytest.raises((TypeError, ValueError, AttributeError)):
            evaluated(loss, batch.replace(**{wanted: None}), outputs_for(batch))


@ALL
def test_nothing_of_nothing(name):
    loss = LOSSES[name][0]
    batch = batch_for(loss)
    nothing = torch.zeros(0, dtype=torch.int64)
    outputs = {name: torch.zeros(0, requires_grad=True) for name in loss.outputs}
    for empty in (batch.take(nothing), batch.rollouts_at(nothing)):
        assert loss(SimpleNamespace(**outputs), empty)[0].shape == (0,)


@pytest.mark.parametrize(
    ("first", "second", "scope"),
    [("clipped", "value", "token"), ("value", "rollouts", "rollout"), ("preference", "value", "group")],
)
def test_a_sum_needs_what_either_needs(first, second, scope):
    one, two = LOSSES[first][0], LOSSES[second][0]
    for both in (summed(one, two, 1.0), summed(two, one, 1.0)):
        assert both.scope == scope and set(both.outputs) == {*one.outputs, *two.outputs}
        assert len(both.outputs) == len(set(both.outputs)) and set(both.reads) == {*one.reads, *two.reads}


def test_reductions_weigh_tokens():
    batch = three()
    assert token_mean(batch).tolist() == pytest.approx([1 / 6] * 6)
    assert rollout_mean(batch).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9])
    assert rollout_sum(batch).tolist() == pytest.approx([1 / 3] * 6)
    assert mean_over(5)(batch).tolist() == pytest.approx([1 / 15] * 6)
    for reduce in (token_mean, rollout_mean, rollout_sum, mean_over(5)):
        assert reduce(batch).dtype == torch.float32 and reduce(batch.to("meta")).device.type == "meta"


def test_clipping_stops_only_the_side_that_gains():
    old, ratio = torch.full((6,), -1.0), torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9])
    batch = three().replace(old_logprobs=old, advantages=torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]))
    outputs = {"logprob": old + ratio.log()}
    _, gradients, statistics = evaluated(clipped(low=0.2, high=0.3, reduce=token_mean), batch, outputs)
    expected = -ratio * batch.advantages / 6 * torch.tensor([0.0, 1, 1, 0, 1, 1])
    assert torch.allclose(gradients["logprob"], expected)
    seen = dict(zip(STATISTICS, statistics["policy"][0].tolist(), strict=True))
    assert (seen["tokens"], seen["clipped_low"], seen["clipped_high"], seen["clipped_dual"]) == (6, 1, 1, 0)


def test_the_divergence_from_a_reference_is_watched_without_a_weight():
    batch = batch_for(clipped())
    outputs = outputs_for(batch)
    gap = batch.ref_logprobs.double() - outputs["logprob"].double()
    with_it, without = (
        dict(zip(STATISTICS, evaluated(clipped(), each, outputs)[2]["policy"][0].tolist(), strict=True))
        for each in (batch, batch.replace(ref_logprobs=None))
    )
    whole = seen(evaluated(clipped_rollouts(low=0.2, high=0.2), batch, outputs)[2])
    assert whole["kl"] == with_it["kl"] > 0 and whole["tokens"] == with_it["tokens"]
    assert with_it["kl"] == pytest.approx(float((gap.exp() - gap - 1).sum()), rel=1e-5) and without["kl"] == 0


def seen(statistics):
    return dict(zip(STATISTICS, statistics["policy"][0].tolist(), strict=True))


def test_statistics_of_truncated_weights():
    batch = three().replace(old_logprobs=torch.zeros(6), advantages=torch.tensor([1.0, 1, 1, 1, 1, -1]))
    outputs = {"logprob": torch.tensor([0.1, 1, 4, 1.5, 2.001, 9]).log()}
    found = seen(evaluated(truncated(low=0.5, high=1.0), batch, outputs)[2])
    assert found["ratio"] == pytest.approx(17.601) and found["ratio_max"] == pytest.approx(9)
    assert [found[f"clipped_{bound}"] for bound in ("low", "high", "dual")] == [1, 2, 1]
    found = seen(evaluated(geometric_rollouts(low=0.5, high=1.0), batch, outputs)[2])
    assert [found[f"clipped_{bound}"] for bound in ("low", "high", "dual")] == [0, 1, 0]
    batch = batch.replace(rollout_logprobs=-torch.tensor([0.5, 1, 1, 1, 4, 1]).log())
    found = seen(evaluated(decoupled(importance=token_importance(Truncate(2.0))), batch, outputs)[2])
    assert found["importance"] == pytest.approx(6.5) and found["importance_cut"] == 1


def test_a_rollout_is_cut_as_one():
    """The product of its tokens' weights is within the bounds for rollout 1 only, their geometric mean for 0 and 1."""
    batch = three().replace(old_logprobs=torch.zeros(6), advantages=torch.ones(6))
    batch = batch.replace(rollout_logprobs=-torch.tensor([1.5, 2, 1.2, 3, 3, 3]).log())
    outputs = {"logprob": torch.full((6,), -0.1)}
    for importance, alive in ((rollout_importance, [0, 0, 1, 0, 0, 0]), (mean_importance, [1, 1, 1, 0, 0, 0])):
        _, gradients, statistics = evaluated(clipped(importance=importance(Within(0.5, 2.0))), batch, outputs)
        assert (gradients["logprob"] != 0).tolist() == [bool(each) for each in alive]
        assert seen(statistics)["importance_cut"] == 6 - sum(alive)


def test_an_importance_weight_of_one_changes_nothing():
    batch = batch_for(clipped())
    batch = batch.replace(rollout_logprobs=batch.old_logprobs)
    outputs = outputs_for(batch)
    for importance in (token_importance, rollout_importance, mean_importance):
        some = evaluated(decoupled(importance=importance(Within(0.5, 2.0))), batch, outputs)
        plain = evaluated(clipped(), batch, outputs)
        assert torch.equal(some[0], plain[0]) and torch.equal(some[1]["logprob"], plain[1]["logprob"])


def test_where_a_rollout_has_one_advantage_a_ratio_by_token_gives_the_same_gradient():
    batch = batch_for(clipped())
    batch = batch.replace(advantages=batch.to_tokens(batch.rewards))
    outputs = outputs_for(batch)
    whole, by_token = (
        evaluated(clipped_rollouts(low=0.2, high=0.2, per_token=per_token), batch, outputs)
        for per_token in (False, True)
    )
    assert torch.allclose(whole[0], by_token[0]) and torch.allclose(whole[1]["logprob"], by_token[1]["logprob"])


def test_on_policy_gradients_are_one():
    """At a ratio of 1 every surrogate has the gradient of the plain policy gradient, -A."""
    batch = batch_for(clipped())
    batch, outputs = batch.replace(old_logprobs=batch.rollout_logprobs), {"logprob": batch.rollout_logprobs}
    plain = evaluated(negative_logprob(), batch, outputs)[1]["logprob"]
    for loss in (clipped(reduce=token_mean), truncated(low=1.0, high=0.0), truncated(low=0.1, high=0.1), asymmetric()):
        assert torch.allclose(evaluated(loss, batch, outputs)[1]["logprob"], plain, rtol=1e-7, atol=0)
    for loss in (gated(reduce=token_mean), clipped(dual=1.4, reduce=token_mean)):
        assert torch.allclose(evaluated(loss, batch, outputs)[1]["logprob"], plain, rtol=1e-6, atol=0)


def test_statistics_of_pairs():
    paired = pairs((2, 1, 1, 3)).replace(rewards=torch.tensor([1.0, 0, 0, 1]))
    paired = paired.replace(ref_logprobs=torch.zeros(7))
    logprob = torch.tensor([1.0, 2, 3, 4, 5, 6, 7])  # chosen: 1 + 2 over 4, and 5 + 6 + 7 over 3
    _, _, seen = evaluated(preference(beta=0.5), paired, {"logprob": logprob})
    last = paired.last
    assert seen["margin"][last].tolist() == [-0.5, 7.5, -0.5, 7.5] and seen["margin"][~last].isnan().all()
    assert seen["pair_accuracy"][last].tolist() == [0, 1, 0, 1] and seen["pair_accuracy"][~last].isnan().all()


def test_the_bounds_of_a_value_hold_both_ways():
    batch = three().replace(values=torch.zeros(6), returns=torch.tensor([5.0, 5, -5, -5, 0.1, 3]))
    value = torch.tensor([1.0, -1, -1, 1, 0.2, 0.2])
    _, gradients, _ = evaluated(squared_value(clip=0.5), batch, {"value": value})
    expected = torch.tensor([0.0, -6, 0, 6, 0.1, -2.8]) / 6  # none where it moved far towards the return
    assert torch.allclose(gradients["value"], expected)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: clipped(low=-0.1), "clipped: low must be a number >= 0; inf bounds nothing; got -0.1"),
        (lambda: clipped(high=math.nan), "clipped: high must be a number >= 0; inf bounds nothing; got nan"),
        (lambda: clipped(dual=1.0), "clipped: dual must be above 1, or None for no such bound; got 1.0"),
        (lambda: clipped(beta=math.inf), "clipped: beta must be a finite number >= 0; got inf"),
        (lambda: clipped(beta=-1.0), "clipped: beta must be a finite number >= 0; got -1.0"),
        (lambda: clipped(entropy_coef=math.inf), "clipped: entropy_coef must be a finite number; got inf"),
        (lambda: clipped_rollouts(low=-1.0, high=0.1), "clipped_rollouts: low must be"),
        (lambda: truncated(low=0.1, high=-1.0), "truncated: high must be"),
        (lambda: truncated(low=0.1, high=1.0, beta=-1.0), "truncated: beta must be a finite number >= 0; got -1.0"),
        (lambda: clipped_rollouts(low=0.1, high=0.1, beta=-1.0), "clipped_rollouts: beta must be a finite number >= 0"),
        (lambda: geometric_rollouts(low=-1.0), "geometric_rollouts: low must be"),
        (lambda: asymmetric_rollouts(negative=(0.0, 0.0)), "asymmetric_rollouts: negative must be 0 <= least"),
        (lambda: asymmetric(positive=(2.0, 1.0)), r"asymmetric: positive must be 0 <= least .*; got \(2.0, 1.0\)"),
        (lambda: gated(negative=0.0), "gated: negative must be a finite number > 0; got 0.0"),
        (lambda: squared_value(clip=0.0), "squared_value: clip must be a number > 0"),
        (
            lambda: summed(clipped(), squared_value(), -0.5),
            "summed: coefficient must be a finite number >= 0; got -0.5",
        ),
        (lambda: preference(beta=0.0), "preference: beta must be a finite number > 0; got 0.0"),
        (
            lambda: preference(beta=0.1, label_smoothing=0.6),
            r"preference: label_smoothing must be in \[0, 0.5\]; got 0.6",
        ),
        (lambda: bradley_terry(centre=math.inf), "bradley_terry: centre must be a finite number >= 0; got inf"),
    ],
)
def test_numbers_that_make_no_loss_are_refused(make, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        make()


def test_infinite_bounds_bound_nothing():
    batch = batch_for(clipped())
    outputs = outputs_for(batch)
    unbound = evaluated(clipped(low=math.inf, high=math.inf), batch, outputs)[1]["logprob"]
    ratio = (outputs["logprob"] - batch.old_logprobs).exp()
    assert torch.allclose(unbound, -ratio * batch.advantages * rollout_mean(batch))


def test_loss_defaults_are_the_simplest():
    loss = Loss(lambda out, batch: None)
    assert (loss.outputs, loss.scope, loss.reads) == (("logprob",), "token", ()) and loss.live(three()) is None


def test_the_formulas_meet_every_case():
    """Tokens clipped on either side, by the dual bound, and not at all: else the comparisons above would be empty."""
    seen = set()
    for seed in range(5):
        batch = batch_for(clipped(), seed)
        ratio = (outputs_for(batch, seed)["logprob"] - batch.old_logprobs).exp()
        for (kind, where), sign in itertools.product(
            {"low": ratio < 0.8, "high": ratio > 1.3, "within": (ratio > 0.8) & (ratio < 1.2)}.items(), (-1, 0, 1)
        ):
            if (where & (batch.advantages.sign() == sign)).any():
                seen.add((kind, sign))
    assert len(seen) == 9


def test_a_sum_is_dead_where_both_are():
    batch = checks.example().with_advantages(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    odd = torch.arange(len(batch.tokens)) % 2 == 1
    second = Loss(lambda out, batch: (out.logprob * odd, {}), live=lambda batch: odd)
    both = summed(clipped(), second, 1.0)
    assert torch.equal(both.live(batch), (batch.advantages != 0) | odd) and not both.live(batch).all()
    assert not checks.gradient(batch, both)[~both.live(batch)].any()
    assert summed(clipped(), squared_value(), 1.0).live(batch) is None
