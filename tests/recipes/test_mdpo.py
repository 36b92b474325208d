"""mdpo: the loss and its schedule, the off-policy form, Tsallis logarithms, and a run with its proximity."""

import math
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from batches import ragged, recipe

from fuserl.engine import checks, loop
from fuserl.engine.losses import clipped, token_mean
from fuserl.engine.mirror import annealed, constant, proximal, replayed, small, tsallis
from fuserl.engine.second_models import Teacher
from fuserl.engine.toys import point_mass


def seen(batch, shift=0.0):
    random = torch.Generator().manual_seed(3)
    kl = torch.rand(len(batch.tokens), generator=random)
    return SimpleNamespace(logprob=(batch.old_logprobs + shift).requires_grad_(), reverse_kl=kl)


@pytest.mark.parametrize(("step", "t"), [(1, 1.0), (3, 0.8), (10, 0.1)])
def test_the_loss_is_unclipped_and_its_proximity_weighs_more_each_turn(step, t, tmp_path):
    batch, mdpo = ragged((3, 1, 5, 2), (0, 1, 0, 1)).replace(step=step), recipe(tmp_path, "mdpo", steps=10)
    batch = checks.credited(batch, mdpo.advantage)
    out = seen(batch, shift=2.0)
    expected = (-math.exp(2.0) * batch.advantages + out.reverse_kl / t) / 11
    torch.testing.assert_close(mdpo.loss(out, batch)[0].detach(), expected, rtol=1e-5, atol=1e-6)
    fixed = recipe(tmp_path, "mdpo", t=0.25)
    expected = (-math.exp(2.0) * batch.advantages + out.reverse_kl / 0.25) / 11
    torch.testing.assert_close(fixed.loss(out, batch)[0].detach(), expected, rtol=1e-5, atol=1e-6)
    assert mdpo.teacher == Teacher("old") and mdpo.loss.live(batch) is None


def test_the_schedule_ends_above_nothing_and_bad_numbers_are_refused(tmp_path):
    batch = ragged((1,), (0,))
    assert annealed(4)(batch.replace(step=9)) == 0.25
    for wrong in (lambda: constant(0.0), lambda: annealed(0), lambda: recipe(tmp_path, "mdpo", t=-1.0)):
        with pytest.raises(ValueError, match="must be a"):
            wrong()


def test_importance_weighs_the_surrogate_alone():
    batch = ragged((3, 2), (0, 0)).replace(ref_logprobs=None)
    from fuserl.engine.importance import token_importance
    from fuserl.kernels.surrogates import Truncate

    out, importance = seen(batch), token_importance(Truncate(1.5))
    weighed = proximal(t=constant(1.0)).weighed(importance)
    plain = clipped(low=math.inf, high=math.inf, importance=importance, reduce=token_mean)
    expected = plain(out, batch)[0] + out.reverse_kl / 5
    torch.testing.assert_close(weighed(out, batch)[0], expected)
    assert weighed.weighed is None


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.0])
def test_tsallis_logarithms(q):
    x = torch.tensor([0.01, 0.3, 1.0, 4.0], dtype=torch.float64)
    expected = x.log() if q == 1 else (x ** (1 - q) - 1) / (1 - q)
    torch.testing.assert_close(tsallis(x.log(), q), expected, rtol=1e-12, atol=1e-14)
    near = tsallis(x.log(), 1 + 1e-9)
    torch.testing.assert_close(near, x.log(), rtol=1e-7, atol=1e-7)


def test_the_off_policy_loss_is_its_formula():
    logprob, old, value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kappa, lam in ((1.0, 0.2), (0.5, 0.0), (0.3, 0.3)):
        expected = kappa * logprob + (lam - kappa) * old - value
        torch.testing.assert_close(
            replayed(logprob, old, value, kappa=kappa, lam=lam), expected, rtol=1e-12, atol=1e-14
        )
    assert torch.equal(replayed(logprob, old * torch.nan, value, kappa=0.2, lam=0.2), 0.2 * logprob - value)  # SAC
    q = replayed(logprob, old, value, q=1.5)
    torch.testing.assert_close(q, tsallis(logprob, 1.5) - 0.8 * tsallis(old, 1.5) - value)
    assert torch.equal(small(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0]])), torch.tensor([7e-3]))
    with pytest.raises(ValueError, match="kappa"):
        replayed(logprob, old, value, kappa=-1.0)


def test_a_replay_keeps_the_newest():
    replay, random = point_mass.Replay(4, 1), torch.Generator().manual_seed(0)
    replay.add(torch.tensor([[1.0], [2.0], [3.0]]))
    assert set(replay.draw(50, random).flatten().tolist()) == {1, 2, 3}
    replay.add(torch.tensor([[4.0], [5.0], [6.0]]))
    assert set(replay.draw(80, random).flatten().tolist()) == {3, 4, 5, 6}


def test_the_old_policy_is_renewed_and_the_slow_value_follows():
    learner = point_mass.Learner(point_mass.Settings(renewed=3, tau=0.5, batch=8))
    first = [p.clone() for p in learner.old.parameters()]
    for step in range(1, 4):
        before = [p.clone() for p in learner.slow.parameters()]
        learner.step()
        kept = all(torch.equal(a, b) for a, b in zip(first, learner.old.parameters(), strict=True))
        assert kept == (step < 3)
        for old, slow, value in zip(before, learner.slow.parameters(), learner.value.parameters(), strict=True):
            torch.testing.assert_close(slow, (old + value) / 2)
    assert all(torch.equal(a, b) for a, b in zip(learner.policy.parameters(), learner.old.parameters(), strict=True))


def test_a_run_measures_its_proximity(tmp_path, monkeypatch):
    tiny_runs.use(monkeypatch)
    settings = dict(recipe="mdpo", reward="tiny_runs:shortness", steps=2, eval_every=0, epochs=3)
    rows = [row for row in tiny_runs.run(tmp_path, "on", **settings) if "proximity" in row]
    assert all(row["proximity"] > 0 for row in rows)
    single = tiny_runs.config(tmp_path, "one", **settings | {"epochs": 1})
    row = next(row for row in tiny_runs.rows(loop.train(single)) if "proximity" in row)
    assert row["proximity"] == 0  # nothing has moved by the first of the m steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_off_policy_forms_learn_from_any_start(seed):
    several = point_mass.Settings(), point_mass.Settings(lam=0.0), point_mass.Settings(q=1.5)
    assert all(figure.holds for figure in point_mass.figures(*several, steps=1600, seed=seed))
